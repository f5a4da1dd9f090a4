"""L4Q: the weight is rounded after its low-rank change is added, and the grid is trained along."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.fused.quantised import FLOOR, columns, grid, limits, quantised, quantised_linear, summed
from ..engine.sites import Site
from ..quantize import Format, PackedWeight
from ..quantize.formats import nearest_divisor
from .method import Method, Rank, empty


class L4QLayer(WeightAdapter):
    """W_q = s·round(clamp((W + α/r·B A − b)/s)) + b; A (r, in), B (out, r), `step` s and `offset` b (groups,), row after row."""

    def __init__(self, config: "L4Q", site: Site):
        super().__init__()
        self.bits, self.scale, self.g = config.bits, config.alpha / config.rank, config.g(site)
        self.group_size = config.group(site)
        self.A = empty(config.rank, site.in_features, like=site.parameter)
        self.B = empty(site.out_features, config.rank, like=site.parameter)
        step, offset = (empty(config.groups(site), like=site.parameter) for _ in range(2))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        for p in (self.B, step, offset):
            nn.init.zeros_(p)
        W = site.matrix(site.values)[0].detach()
        if not W.is_meta:  # a file brings it
            step.data.copy_(smallest(W.to(step.dtype).reshape(len(step), -1), self.bits))
        for name, p in (("step", step), ("offset", offset)):
            self.register_parameter(name, p) if config.train_scale else self.register_buffer(name, p.data)

    def merged(self, W, b):
        return quantised(summed(W, self.A, self.B, self.scale), self.step, self.offset, self.bits, self.g), b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear" or not base.plain:
            return super().forward(base, x, *args, **kwargs)
        return quantised_linear(x, base.W, base.b, self.A, self.B, self.step, self.offset, self.scale, self.bits, self.g)

    def packed(self, W: Tensor) -> PackedWeight:
        """W_q of the layer's weight W (out, in) in its integers: (code − z)·s by group, with z = −Qn − b/s."""
        V = summed(W, self.A, self.B, self.scale).detach()
        s, b = columns(V, self.step.detach(), self.offset.detach())
        codes = grid(V, s, b, self.bits)[1].round_() - limits(self.bits)[0]
        format = Format(format=f"int{self.bits}", group_size=self.group_size)
        parts = {"codes": format.pack(codes.to(torch.uint8), V.numel()), "scale": s[:, 0], "zero": -limits(self.bits)[0] - (b / s)[:, 0]}
        return PackedWeight(format, parts, W.shape, W.dtype)

    def fold(self, site, values):
        W, b = site.matrix(values)
        if torch.is_grad_enabled() or site.transposed:
            return site.raw(*self.merged(W, b))
        return values | {site.weight: self.packed(W)}


def smallest(groups: Tensor, bits: int) -> Tensor:
    """The smallest step of each group (n, k) that clips nothing: max(min/Qn, max/Qp), (n,)."""
    low, high = limits(bits)
    s = torch.maximum(groups.amin(1).div(low).abs(), groups.amax(1).div(high).abs())
    return s.mul_(1 + torch.finfo(s.dtype).eps).clamp_(min=FLOOR)  # min or max over its own quotient may come out above the bound


class L4Q(Method):
    """L4Q (Jeon et al. 2024, arXiv 2402.04902): W_q = s·round(clamp((W + α/r·BA − b)/s, Qn, Qp)) + b, trained in A, B, s and b.

    The low-rank change is added before rounding, so that what training ends with is an integer of `bits` bits for each weight,
    with a step s and an offset b for each `group_size` consecutive inputs, and no adapter beside it; `merge` stores just that. The start is the base rounded to nearest with steps that clip nothing and b = 0. The gradient of W_q
    (out, in) is formed at each layer and reduced at once. Dropout has no place here: A acts on the weight, not on inputs.
    """

    method, family, title, paper = "l4q", "quantised", "Low-rank adaptive learned step size quantisation", "arXiv:2402.04902"
    identity = False
    default_lr = 3e-3

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=2)] = Field(128, description="inputs that share a step; where it does not divide a row, the divisor nearest to it does")
    rank: Rank = 4
    alpha: PositiveFloat = 16
    train_scale: bool = Field(True, description="whether steps and offsets are trained")
    lr_ratio: PositiveFloat = Field(0.1, description="learning rate of steps and offsets over that of A and B")
    grad_scale: Literal["lsq"] | PositiveFloat = Field("lsq", description="factor on the gradients of steps and offsets; lsq: 1/√(group size · Qp)")

    def group(self, site: Site) -> int:
        """Weights of a group."""
        return nearest_divisor(site.in_features, self.group_size)

    def groups(self, site: Site) -> int:
        """Groups of a matrix."""
        return site.out_features * (site.in_features // self.group(site))

    def g(self, site: Site) -> float:
        return (self.group(site) * limits(self.bits)[1]) ** -0.5 if self.grad_scale == "lsq" else self.grad_scale

    def layer(self, site):
        return L4QLayer(self, site)

    def count(self, site):
        return self.rank * (site.in_features + site.out_features) + (2 * self.groups(site) if self.train_scale else 0)

    def param_groups(self, adapters, lr):
        (own,) = super().param_groups(adapters, lr)
        factors, grids = ([p for p in own["params"] if (p.dim() == 1) == flat] for flat in (False, True))
        return [{"params": factors, "lr": lr}, {"params": grids, "lr": lr * self.lr_ratio}]
