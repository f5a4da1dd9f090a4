"""DoRA: magnitude and direction of the weight apart, the direction changed by LoRA."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..engine.fused import dora_linear, traced, weight_norm
from .lora import LoRA, LoRALayer


class DoRALayer(LoRALayer):
    """y = (m/‖V‖_row)·(V x) + b with V = W + s·BA; the norm is a constant in the backward (DoRA eq. 11)."""

    dims: ClassVar[dict[str, tuple[str, ...]]] = {}  # a norm holds for all of a row

    def __init__(self, config, site):
        super().__init__(config, site)
        W = site.matrix(site.values)[0].detach()
        self.magnitude = nn.Parameter(W.to(self.A.dtype).norm(dim=1))
        self.known = None

    def merged(self, W, b):
        V = super().merged(W, b)[0]
        return (self.magnitude / V.detach().norm(dim=1))[:, None] * V, b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear" or not base.plain:
            W, b = self.merged(base.W, base.b)
            return base.with_values(base.site.raw(W, b))(x, *args, **kwargs)
        dropped = F.dropout(x, self.dropout, True) if self.dropout and self.training else None
        return dora_linear(x, base.W, base.b, *self.factors(), self.scale, self.magnitude, dropped, self._known_norm(base.W))

    def _known_norm(self, W):
        """The rows' norms, kept from one evaluation to the next until a weight changes."""
        if torch.is_grad_enabled() or traced() or W.is_inference():
            self.known = None
            return None
        key = [(t.data_ptr(), t._version) for t in (W, self.A, self.B)]
        if self.known is None or self.known[0] != key:
            self.known = key, weight_norm(W, *self.factors(), self.scale)
        return self.known[1]


class DoRA(LoRA):
    """DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): W' = m·(W + s·BA)/‖W + s·BA‖, norms over each output row.

    With dropout the base part sees x and the change sees drop(x), as in the authors' code.
    """

    method, title, paper = "dora", "Weight-decomposed low-rank adaptation", "arXiv:2402.09353"
    works_on = ("linear", "conv", "attention")

    tensor_names = ("A", "B", "magnitude")

    def layer(self, site):
        return DoRALayer(self, site)

    def count(self, site):
        return super().count(site) + site.out_features
