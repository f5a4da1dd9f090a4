"""Mask tuning: one scale for each attention head and each feed-forward channel."""

import torch
from pydantic import Field
from torch import nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, Targets, float_dtype
from .method import Method
from .select import coupled


class MaskLayer(WeightAdapter):
    """y = base(m ⊙ x), m (units,), each for as many neighbouring inputs as a unit has."""

    def __init__(self, site: Site, units: int):
        super().__init__()
        self.each = site.in_features // units
        self.m = nn.Parameter(torch.ones(units, dtype=float_dtype(site.parameter), device=site.parameter.device))

    def merged(self, W, b):
        return W * self.m.repeat_interleave(self.each), b

    def forward(self, base, x, *args, **kwargs):
        return base(x * self.m.to(x.dtype).repeat_interleave(self.each), *args, **kwargs)


class MaskTuning(Method):
    """Masks of heads and channels, from 1, as Light-PEFT (Gu et al. 2024, arXiv 2406.03792) learns them to see what can be cut.

    A head's mask scales what it gives, a channel's the activated intermediate; both are the inputs of the layer that reads them.
    With `targets` it acts on the layers named, where they read no such units on each input.
    """

    method, family, title, paper = "mask-tuning", "scaling", "Masks of heads and channels", "arXiv:2406.03792"
    default_lr = 5e-3

    targets: Targets = "default"
    l1: float = Field(0.0, ge=0, description="weight of the masks' magnitudes in the loss")
    units: int | None = Field(None, ge=1, description="heads or channels that a layer reads; filled in")

    def default(self, model):
        return [c.outer for c in coupled(model) if c.outer.kind == "linear"]

    def select(self, model):
        units = {c.outer.path: c.units for c in coupled(model)}
        return {path: (site, {"units": units.get(path)} | over) for path, (site, over) in super().select(model).items()}

    def auxiliary_loss(self, adapters):
        return self.l1 * torch.stack([a.m.abs().sum() for a in adapters.values()]).sum() if self.l1 else None

    def layer(self, site):
        return MaskLayer(site, self.units or site.in_features)

    def count(self, site):
        return self.units or site.in_features
