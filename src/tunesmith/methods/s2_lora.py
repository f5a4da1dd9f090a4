"""S2-LoRA: one A and one B for all matrices, and a sparse vector of coefficients for each."""

import weakref
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..engine.sites import Site
from .adalora import TripletLayer, orthogonality
from .method import Dropout, Method, Rank, empty


class Factor(nn.Module):
    """An orthonormal matrix that several sites read: as a module, so that a parameter put in its place is put there for all."""

    def __init__(self, *shape: int, like):
        super().__init__()
        self.weight = empty(*shape, like=like)
        nn.init.orthogonal_(self.weight)


class S2LoRALayer(TripletLayer):
    """y = base(x) + s·B diag(E) A drop(x), A (r, ≥ in) and B (≥ out, r) shared with other sites."""

    def __init__(self, config: "S2LoRA", site: Site, A: Factor, B: Factor):
        super().__init__(config, site, config.rank)
        self.A, self.B, self.shape = A, B, site.shape

    def factors(self):
        out_features, in_features = self.shape
        return self.A.weight[:, :in_features], self.B.weight[:out_features] * self.E


class SoftThreshold:
    """The proximal step of λ‖E‖₁ after each optimiser step: E ← sign(E)·max(|E| − λ·lr, 0).

    lr is what E was just trained with, which torch's hook after a step tells of any optimiser, under any schedule.
    """

    def __init__(self, layers: list[S2LoRALayer], weight: float):
        self.layers, self.weight, self.rates = layers, weight, {}
        note = weakref.WeakMethod(self._note)
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: (own := note()) and own(optimizer))
        weakref.finalize(self, hook.remove)

    def _note(self, optimizer: Optimizer) -> None:
        own = {id(layer.E) for layer in self.layers}
        self.rates |= {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"] if id(p) in own}

    @torch.no_grad()
    def step(self) -> None:
        for layer in self.layers:
            layer.E.copy_(F.softshrink(layer.E, self.weight * float(self.rates.pop(id(layer.E), 0))))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class S2LoRA(Method):
    """Sparsely shared LoRA (Liu et al. 2023, arXiv 2309.11756): W_i + α/(r + 10⁻⁵)·B diag(e_i) A with one A and one B for all i.

    The paper shares over matrices of one shape. Here `share="dim"` has an A for each input width and a B for each output
    width, `"shape"` a pair for each shape, `"pad"` one pair of the largest widths that narrower matrices read the first
    part of. No code is public: the form of the two terms that are added to the loss is this library's. A and B are held
    near orthonormal by AdaLoRA's term, without which scaling A up and e down would get round the sparsity.
    `sparsity="proximal"` shrinks every coefficient by `l1_weight`·lr after each step and so reaches exact zeros, which
    the plain term `l1_weight`·mean|e| (`"l1"`) does not under Adam. `ranks(model)` counts the coefficients left.
    """

    method, family, title, paper = "s2-lora", "low-rank", "Sparsely shared low-rank adaptation", "arXiv:2309.11756"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 1e-3

    rank: Rank = 16
    alpha: PositiveFloat = 16
    dropout: Dropout = 0.0
    share: Literal["dim", "shape", "pad"] = "dim"
    sparsity: Literal["proximal", "l1"] = "proximal"
    l1_weight: NonNegativeFloat = 0.1
    orth_weight: NonNegativeFloat = 0.1
    lr_ratio: PositiveFloat = Field(10.0, description="learning rate of the coefficients over that of A and B")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def build(self, model, configs, by_path):
        made: dict[tuple, Factor] = {}
        padded = [by_path[path].shape for path, config in configs.items() if config.share == "pad"]
        built = {}
        for path, config in configs.items():
            site, r, share = by_path[path], config.rank, config.share
            out_features, in_features = site.shape if share != "pad" else map(max, zip(*padded, strict=True))
            pair = (out_features, in_features) if share == "shape" else None
            shapes = (r, in_features), (out_features, r)
            for side, shape in enumerate(shapes):
                if (key := (side, share, shape, pair)) not in made:
                    made[key] = Factor(*shape, like=site.parameter)
            built[path] = site, S2LoRALayer(config, site, *(made[side, share, shape, pair] for side, shape in enumerate(shapes)))
        return built

    def count(self, site):
        return self.rank * (site.in_features + site.out_features + 1)

    def param_groups(self, adapters, lr):
        coefficients = {id(a.E): a.E for a in adapters.values()}
        factors = [p for p in super().param_groups(adapters, lr)[0]["params"] if id(p) not in coefficients]
        return [{"params": factors, "lr": lr}, {"params": list(coefficients.values()), "lr": lr * self.lr_ratio, "weight_decay": 0.0}]

    def auxiliary_loss(self, adapters):
        A = {id(a.A): a.A.weight for a in adapters.values()}
        B = {id(a.B): a.B.weight.T for a in adapters.values()}
        loss = self.orth_weight * orthogonality([*A.values(), *B.values()])
        return loss + self.l1_weight * torch.cat([a.E for a in adapters.values()]).abs().mean() if self.sparsity == "l1" else loss

    def stage(self, adapters, total_steps):
        return SoftThreshold(list(adapters.values()), self.l1_weight) if self.sparsity == "proximal" else None
