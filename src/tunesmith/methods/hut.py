"""HUT: each weight multiplied by an entry of a low-rank mask, each output scaled and shifted."""

import torch
from pydantic import PositiveFloat
from torch import nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site
from .method import Method, Rank, empty


class HUTLayer(WeightAdapter):
    """W' = γ ⊙ W ⊙ (1 + s·B A), b' = γ ⊙ b + β; A (r, in), B (out, r), γ = 1 + g and β (out,), β where there is a b."""

    def __init__(self, config: "HUT", site: Site):
        super().__init__()
        self.scale = config.scale
        self.A = empty(config.rank, site.in_features, like=site.parameter)
        self.B = empty(site.out_features, config.rank, like=site.parameter)
        self.g = empty(site.out_features, like=site.parameter) if config.affine else None
        self.beta = empty(site.out_features, like=site.parameter) if config.affine and site.bias else None
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        for p in (self.B, self.g, self.beta):
            if p is not None:
                nn.init.zeros_(p)

    def factors(self):
        """(γ (out, 1), A, C) with γ ⊙ (1 + s·B A) = γ + C A."""
        gamma = self.B.new_ones(1, 1) if self.g is None else 1 + self.g[:, None]
        return gamma, self.A, self.scale * gamma * self.B

    def merged(self, W, b):
        gamma, A, C = self.factors()
        return torch.addmm(gamma, C, A).mul_(W), b if self.beta is None else gamma[:, 0] * b + self.beta

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "embedding":
            return super().forward(base, x, *args, **kwargs)
        gamma, A, C = self.factors()
        y = base(x, *args, **kwargs)
        return (y * (gamma[:, 0] + base.site.mix(base.site.apply(x, A), C))).to(y.dtype)


class HUT(Method):
    """HUT (Zhang et al. 2024, arXiv 2409.13501): W' = W ⊙ (1 + s·BA), y = γ ⊙ (x W'ᵀ + b) + β.

    The authors' code is not public; W' is the reading that fits the paper's abstract and its summaries. "Hadamard" is
    the product of entries, so an entry of W that is 0 stays 0. γ is trained as 1 + g, so that weight decay pulls it to
    1, and β only where the layer has a bias for it to be merged into. With `affine=False` the method is HiRA (Huang et
    al. 2025). Training costs the gradient of W' (out, in) at each layer, which LoRA never forms.
    """

    method, family, title, paper = "hut", "multiplicative", "Hadamard updated transformation", "arXiv:2409.13501"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 3e-3

    rank: Rank = 8
    scale: PositiveFloat = 1.0
    affine: bool = True

    def layer(self, site):
        return HUTLayer(self, site)

    def count(self, site):
        affine = (2 if site.bias else 1) * site.out_features if self.affine else 0
        return self.rank * (site.in_features + site.out_features) + affine
