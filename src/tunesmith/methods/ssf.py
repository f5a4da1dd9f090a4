"""SSF: a learned scale and shift behind every operation with weights."""

from typing import Literal

import torch
from torch import nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, Targets, head_paths, sites, swapped
from .method import Method, empty


def has_bias(site: Site) -> bool:
    return site.bias is not None if site.weight else "bias" in site.names


def channels(site: Site) -> int:
    return site.out_features if site.weight else site.parameter.numel()


@torch.no_grad()
def offset(site: Site) -> float:
    """What a norm without a bias adds to its weight before it multiplies by it: 1 for Gemma's, 0 for most."""
    module, stored = site.owner, site.parameter
    x = torch.linspace(1, 2, channels(site), dtype=stored.dtype, device="cpu" if stored.is_meta else stored.device)
    if not hasattr(module, "weight"):
        return 0.0
    forward = getattr(type(module), "_tunesmith_base", type(module)).forward
    try:
        without, once = (_under(module, forward, x, torch.full_like(x, w)).float().sum().item() for w in (0, 1))
    except TypeError:  # it wants more than x
        return 0.0
    return round(without / (once - without), 3) if once != without else 0.0


def _under(module: nn.Module, forward, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with swapped(module, {"weight": weight}):
        return forward(module, x[None])


class SSFLayer(WeightAdapter):
    """y = γ ⊙ base(x) + β, γ (out,) and, where the layer has a bias, β (out,); of a norm γ multiplies what its own weight does."""

    def __init__(self, config: "SSF", site: Site):
        super().__init__()
        self.offset = 0.0 if site.weight or has_bias(site) else offset(site)
        spread = 0.02 if config.init == "normal" else 0.0
        self.scale = nn.init.normal_(empty(channels(site), like=site.parameter), 1.0, spread)
        self.shift = nn.init.normal_(empty(channels(site), like=site.parameter), 0.0, spread) if has_bias(site) else None

    def merged(self, W, b):
        return W * self.scale[:, None], b if b is None else b * self.scale + self.shift

    def fold(self, site, values):
        if site.weight:
            return super().fold(site, values)
        weight, bias = values["weight"], values.get("bias")
        new = {"weight": ((weight + self.offset) * self.scale - self.offset).to(weight.dtype)}
        return values | (new if bias is None else new | {"bias": (bias * self.scale + self.shift).to(bias.dtype)})

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":  # whose channels may be any dimension
            return base.with_values(self.fold(base.site, base.values))(x, *args, **kwargs)
        y = base(x, *args, **kwargs)  # in half precision γ ≈ 1 has to multiply before it is rounded
        return (y * self.scale if self.shift is None else torch.addcmul(self.shift, y, self.scale)).to(y.dtype)


class SSF(Method):
    """SSF (Lian et al. 2022, arXiv 2210.08823): γ ⊙ o + β for the output o of every linear layer, convolution and norm but the head.

    A layer without a bias is only scaled, so that all of it merges. The library starts at γ = 1, β = 0 (identity);
    `init="normal"` is the authors' N(1, 0.02²) and N(0, 0.02²). Trained are 205,824 numbers for ViT-B/16.
    """

    method, family, title, paper = "ssf", "scaling", "Scaling and shifting features", "arXiv:2210.08823"
    works_on = ("linear", "conv", "attention", "norm")
    default_lr = 5e-3

    targets: Targets = "default"
    init: Literal["identity", "normal"] = "identity"

    def default(self, model):
        heads = head_paths(model)
        return [s for s in sites(model) if s.kind in self.works_on and s.path not in heads]

    def layer(self, site):
        return SSFLayer(self, site)

    def count(self, site):
        return channels(site) * (1 + has_bias(site))
