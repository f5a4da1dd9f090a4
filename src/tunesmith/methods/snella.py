"""SNELLA: SNELL with a mixed kernel, whose non-zero entries are given out to the layers while training."""

import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from ..engine.sites import Site
from ..errors import TunesmithError
from .method import Method, empty
from .snell import SNELLLayer, Sparsity, kernel, sparsified

Beta = Annotated[float, Field(gt=0, lt=1)]


class SNELLALayer(SNELLLayer):
    """K = P + alpha·softmax(P/gamma) + beta over the outputs, P the kernel of SNELL; its sparsity is the layer's own."""

    def __init__(self, config: "SNELLA", site: Site):
        super().__init__(config, site)
        self.alpha, self.gamma, self.beta = (empty(1, like=site.parameter) for _ in range(3))
        for scalar, value in ((self.alpha, 1), (self.gamma, 1), (self.beta, 0)):
            nn.init.constant_(scalar, value)
        self.register_buffer("sparsity", torch.tensor(config.init_sparsity, dtype=torch.float64))

    def sparse(self):
        P = kernel(self.A, self.B, self.config.scale)
        gamma = self.gamma + torch.where(self.gamma.abs() < 1e-3, torch.where(self.gamma < 0, -1e-3, 1e-3) - self.gamma, 0).detach()
        return sparsified(P + self.alpha * torch.softmax(P / gamma, 0) + self.beta, 0.0 if P.is_meta else float(self.sparsity), "code")


class Allocator:
    """Gives the non-zero entries out over the layers, by the running importance of their factors, at the start of every round.

    Round 0 has the initial budget; then it falls as a cubic to its last value at round `rounds − final`.
    """

    def __init__(self, config: "SNELLA", layers: list[SNELLALayer], total_steps: int):
        self.config, self.layers, self.total, self.done = config, layers, total_steps, 0
        self.rounds = min(config.rounds, total_steps)
        self.first, self.last = config.warmup, self.rounds - config.final
        if self.first >= self.last and config.warmup:
            raise TunesmithError(f"snella has no rounds left to give entries out in: {self.rounds} rounds, of which the first {config.warmup} (warmup) and the last {config.final} (final) are without; lower them")
        self.sizes = [layer.A.shape[1] * layer.B.shape[1] for layer in layers]
        self.start, self.target = (sum((1 - share) * n for n in self.sizes) for share in (config.init_sparsity, config.target_sparsity))
        self.mean = [torch.zeros_like(p) for p in self._factors()]
        self.spread = [torch.zeros_like(p) for p in self._factors()]

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in (layer.A, layer.B)]

    def budget(self, r: int) -> int:
        """How many entries of all layers' changes may be non-zero in round r."""
        if r <= self.first:
            return int(self.start)
        left = max(1 - (r - self.first) / (self.last - self.first), 0) if self.last > self.first else 0
        return int(self.target + (self.start - self.target) * left**3)

    @torch.no_grad()
    def step(self) -> None:
        before, self.done = self.done, self.done + 1
        if self.mean:
            self._weigh()
        r = self.done * self.rounds // self.total
        if before * self.rounds // self.total < r < self.rounds and self.first < r <= max(self.last, 1):
            for layer, entries, n in zip(self.layers, self.given(self.budget(r), self.scores()), self.sizes, strict=True):
                layer.sparsity.fill_(min(max(1 - entries / n, 0.0), 1.0))
        if max(self.last, 1) <= r < self.rounds:
            self.mean, self.spread = [], []  # no more to give out

    def _weigh(self) -> None:
        """Sensitivity |θ·∂θ|, its running mean, and the running mean of its distance from that; not of a step that overflowed."""
        parameters = self._factors()
        now = torch._foreach_mul(parameters, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        torch._foreach_abs_(now)
        if any(t.isinf().any() for t in now):
            return
        now = [t.nan_to_num() for t in now]
        torch._foreach_lerp_(self.mean, now, 1 - self.config.beta1)
        torch._foreach_sub_(now, self.mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.spread, now, 1 - self.config.beta2)

    def scores(self) -> list[float]:
        """Each layer's importance, with sum 1; equal where nothing is known."""
        each = [float((m * s).mean()) for m, s in zip(self.mean, self.spread, strict=True)]
        total = [a + b for a, b in zip(each[::2], each[1::2], strict=True)]
        return [t / sum(total) for t in total] if sum(total) > 0 else [1 / len(total)] * len(total)

    def given(self, budget: int, scores: list[float]) -> list[int]:
        """Entries of each layer, in proportion to the scores; what a full layer cannot take goes to the others."""
        entries = [float(min(n, int(budget * score))) for n, score in zip(self.sizes, scores, strict=True)]
        for _ in range(len(entries) + 100):
            left, free = budget - sum(entries), [i for i, n in enumerate(self.sizes) if entries[i] < n]
            shared = sum(scores[i] for i in free)
            if left <= 1e-6 or not shared:
                break
            for i in free:
                entries[i] += min(left * scores[i] / shared, self.sizes[i] - entries[i])
        least = [math.ceil(self.config.min_density * n) if self.config.min_density else 0 for n in self.sizes]
        return [max(int(e), low) for e, low in zip(entries, least, strict=True)]

    def state_dict(self) -> dict:
        return {"done": self.done, "mean": self.mean, "spread": self.spread, "sparsity": [layer.sparsity for layer in self.layers]}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
        self.mean, self.spread = ([t.to(p.device, copy=True) for t, p in zip(state[k], self._factors(), strict=False)] for k in ("mean", "spread"))
        for layer, sparsity in zip(self.layers, state["sparsity"], strict=True):
            layer.sparsity.copy_(sparsity)


class SNELLA(Method):
    """SNELLA (Shen et al. 2025, arXiv 2510.24037): SNELL with a kernel mixed from distances and their softmax, and a sparsity for each layer.

    Training has `rounds` of equal length, the epochs of the authors' code. At the start of each, a budget of non-zero entries
    that falls from `init_sparsity` to `target_sparsity` is given out to the layers by the running importance of their
    factors, as AdaLoRA's ranks are (`stage`). The sparsity that a layer got is saved with it. Unlike in the authors' code, a layer
    keeps at least `min_density` of its entries, since one without any would never get a gradient again, and gamma stays 10⁻³
    away from zero.
    """

    method, family, title, paper = "snella", "selective", "Kernelised sparse tuning with bi-level competition", "arXiv:2510.24037"
    works_on = ("linear", "embedding", "conv", "attention")
    identity = False
    default_lr = 1e-3

    rank: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = Field(8, description="width of the factors, in two halves")
    init_sparsity: Sparsity = Field(0.01, description="share of zero entries at the start")
    target_sparsity: Sparsity = Field(0.8, description="share of zero entries of all layers together at the end")
    rounds: PositiveInt = Field(100, description="times that entries are given out; no more than there are steps")
    warmup: NonNegativeInt = Field(0, description="rounds at the start with the initial sparsity")
    final: NonNegativeInt = Field(1, description="rounds at the end with the target's entries")
    beta1: Beta = 0.85
    beta2: Beta = 0.85
    min_density: Annotated[float, Field(ge=0, le=1)] = Field(1e-3, description="share of non-zero entries that every layer keeps")
    scale: PositiveFloat = Field(0.1, description="of the kernel, fixed")

    def layer(self, site):
        return SNELLALayer(self, site)

    def count(self, site):
        return self.rank * (site.in_features + site.out_features) + 3

    def stage(self, adapters, total_steps):
        layers = [a for a in adapters.values() if isinstance(a, SNELLALayer)]
        return Allocator(self, layers, total_steps) if layers else None
