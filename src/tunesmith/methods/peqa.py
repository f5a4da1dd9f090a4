"""PEQA: the scales of an integer-quantised weight train, the integers stay."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ..quantize import Format
from .method import Method
from .parts import PartLayer


class PEQALayer(PartLayer):
    """Ŵ = s₀·exp(δ)·(q − z), δ (groups,): a scale can neither change its sign nor outrun its own size."""

    def start(self, part):
        return nn.Parameter(torch.zeros_like(part))

    def trained(self, part):
        return part * self.values.exp()


class PEQA(Method):
    """PEQA (Kim et al. 2023, arXiv 2305.14152): y = x·Ŵᵀ + b with Ŵ = s·(q − z), of which the scales s alone train.

    On a base in an int format its own integers and scales serve; otherwise each weight is rounded to `bits` here. δ of
    s = s₀·exp(δ) trains in place of s, so that one learning rate suits scales of every size (the paper trains s itself).
    Merging stores s in place of s₀: the bits of a weight stay what they were.
    """

    method, family, title, paper = "peqa", "quantised", "Parameter-efficient quantisation-aware adaptation", "arXiv:2305.14152"
    identity = False
    default_lr = 5e-3

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | Literal["row"] = Field("row", description="weights that share a scale, where the base is not quantised already")

    def format(self) -> Format:
        return Format(format=f"int{self.bits}", group_size=self.group_size)

    def layer(self, site):
        return PEQALayer("scale", self.format(), site)

    def count(self, site):
        format = getattr(site.parameter, "format", None) or self.format()
        return site.out_features * site.in_features // format.group(site.shape)
