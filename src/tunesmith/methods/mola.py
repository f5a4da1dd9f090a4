"""MoLA: each token through the best few of a layer's LoRA experts, with more experts in some layers than in others."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.fused import routed_change, routed_linear, traced
from ..engine.sites import Site
from ..errors import TunesmithError, nearest
from .method import Dropout, Method, Rank, empty
from .select import layers

ALLOCATIONS = {"triangle": "8642", "inverted-triangle": "2468", "hourglass": "8228", "rectangle": "5555"}
Experts = Annotated[int, Field(ge=1, le=256)]


class MoLALayer(WeightAdapter):
    """y = base(x) + s·Σ_e w_e·B_e A_e drop(x), w the softmax of the k largest of the logits R x; A (E, r, in), B (E, out, r), R (E, in)."""

    why_not = "what its experts add depends on the input; keep it attached (only with experts=1 it is a change of the weights)"

    def __init__(self, config: "MoLA", site: Site):
        super().__init__()
        E = config.experts_at(site)
        self.scale, self.dropout, self.mergeable = config.alpha / config.rank, config.dropout, E == 1
        self.gate, self.balanced = partial(gates, top_k=config.top_k), config.balance > 0
        self.place, self.logits = None, None
        self.A = empty(E, config.rank, site.in_features, like=site.parameter)
        self.B = empty(E, site.out_features, config.rank, like=site.parameter)
        self.R = empty(E, site.in_features, like=site.parameter)
        for weight in (self.A, self.R):
            nn.init.uniform_(weight, -(site.in_features**-0.5), site.in_features**-0.5)
        nn.init.zeros_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (E·r, in), B (out, E·r)) of all experts side by side."""
        return self.A.flatten(0, 1), self.B.movedim(0, 1).flatten(1)

    def merged(self, W, b):
        A, B = self.factors()
        return torch.addmm(W.to(A.dtype), B, A, alpha=self.scale), b

    def forward(self, base, x, *args, **kwargs):
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        factors = *self.factors(), self.R, self.gate, self.scale, dropped
        if base.plain:
            y, logits = routed_linear(x, base.W, base.b, *factors)
        else:
            change, logits = routed_change(x, *factors)
            y = base(x, *args, **kwargs) + change
        if not _again():
            self.logits = logits if self.balanced and logits.requires_grad else None
        return y

    def __getstate__(self):
        return self.__dict__ | {"logits": None}


def _again() -> bool:
    """Whether this forward is one that gradient checkpointing runs once more during backward, or one under a transform of `torch.func`."""
    return not torch.compiler.is_compiling() and (traced() or torch._C._current_graph_task_id() != -1)


def gates(logits: Tensor, top_k: int) -> Tensor:
    """Weights of the experts (N, E): softmax over the `top_k` largest logits of each row, 0 elsewhere."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, index = wide.topk(min(top_k, wide.shape[1]), dim=1)
    return torch.zeros_like(wide).scatter(1, index, best.softmax(1))


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """E·Σ_e f_e P_e: f_e the share of the rows' top-k places that expert e has, P_e the mean of its probability; logits (N, E)."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    chosen = p.topk(min(top_k, p.shape[1]), dim=1).indices
    f = F.one_hot(chosen.flatten(), p.shape[1]).to(p.dtype).mean(0)
    return p.shape[1] * (f * p.mean(0)).sum()


class MoLA(Method):
    """MoLA (Gao et al. 2024, arXiv 2402.08562): a mixture of LoRA experts at each linear layer, top-k of them for each token.

    `experts` is their number: one number, a list with one for each layer, digits such as "2468" for as many equal blocks
    of depth (layer i of L is in block ⌊i·blocks/L⌋, so that blocks differ by at most one layer), or a shape of the paper:
    triangle 8642, inverted-triangle 2468, hourglass 8228, rectangle 5555. A layer is a member of the outermost list of
    modules of one type on a path; what is outside of such lists counts as the layer before it, or the first. Encoder and
    decoder count apart.

    `balance` times the load-balancing loss is added while training, once for each layer over the rows of all its modules
    (padding included), as in the authors' code; it needs the non-reentrant gradient checkpointing of `train.prepare`.
    The gates of one expert alone are 1, so that with `top_k=1` the balance loss alone teaches the router, and 0 is refused.
    One dropout mask serves all experts, where the authors draw one for each; experts without tokens get a gradient of zero.
    """

    method, family, title, paper = "mola", "routed", "Mixture of LoRA experts with an allocation over depth", "arXiv:2402.08562"
    mergeable = False
    default_lr = 1e-3

    rank: Rank = 8
    alpha: PositiveFloat = 16
    dropout: Dropout = 0.0
    experts: Experts | list[Experts] | str = Field("inverted-triangle", description='experts per module: a number, a list per layer, digits for blocks of depth ("2468"), or a shape')
    top_k: PositiveInt = 2
    balance: NonNegativeFloat = Field(1e-3, description="coefficient of the load-balancing loss")

    @field_validator("experts", mode="before")
    @classmethod
    def _digits(cls, value):
        """Four digits that YAML has read as a number are digits."""
        return str(value) if isinstance(value, int) and value >= 1000 else value

    @model_validator(mode="after")
    def _sensible(self):
        if isinstance(self.experts, str) and self.experts not in ALLOCATIONS and not (self.experts.isascii() and self.experts.isdigit() and "0" not in self.experts):
            raise TunesmithError(f"mola: experts={self.experts!r} is no allocation{nearest(self.experts, ALLOCATIONS)}; it is a number, a list with one number per layer, digits such as '2468', or {', '.join(ALLOCATIONS)}")
        if self.top_k == 1 and not self.balance and self.experts != 1:
            raise TunesmithError("mola: with top_k=1 nothing but the balance loss teaches the router; set balance above 0, or top_k=2")
        return self

    def experts_at(self, site: Site) -> int:
        if not isinstance(self.experts, int):
            raise TunesmithError(f"mola at {site.path!r} as a target's own method needs experts as one number; an allocation over depth such as {self.experts!r} is for the method of the whole model")
        return self.experts

    def select(self, model):
        places = layers(model)
        return {p: (s, over if "method" in over else {"experts": self._allotted(*places[p])} | over) for p, (s, over) in super().select(model).items()}

    def _allotted(self, stack: str, layer: int, depth: int) -> int:
        """The experts of one layer of a stack of `depth`."""
        if isinstance(self.experts, list) and len(self.experts) != depth:
            raise TunesmithError(f"mola: experts lists {len(self.experts)} layers and {stack or 'the model'} has {depth}")
        if isinstance(self.experts, str):
            blocks = ALLOCATIONS.get(self.experts, self.experts)
            return int(blocks[layer * len(blocks) // depth])
        return self.experts[layer] if isinstance(self.experts, list) else self.experts

    def layer(self, site):
        return MoLALayer(self, site)

    def count(self, site):
        return self.experts_at(site) * (self.rank * (site.in_features + site.out_features) + site.in_features)

    def build(self, model, configs, by_path):
        built, places = super().build(model, configs, by_path), layers(model)
        for path, (_, adapter) in built.items():
            adapter.place = places[path][:2]
        return built

    def auxiliary_loss(self, adapters):
        rows: dict[tuple, list[Tensor]] = {}
        for a in adapters.values():
            if isinstance(a, MoLALayer) and a.logits is not None:
                rows.setdefault((*a.place, a.gate.keywords["top_k"], a.logits.shape[1]), []).append(a.logits)
        losses = [balance_loss(torch.cat([l.to(each[0].device) for l in each]), top_k) for (_, _, top_k, _), each in rows.items()]
        return self.balance * torch.stack([l.to(losses[0].device) for l in losses]).sum() if losses else None
