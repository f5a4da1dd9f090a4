"""RepAdapter: a linear bottleneck in front of a layer, which merges into it."""

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, Targets
from ..errors import TunesmithError
from .method import Dropout, Method, empty
from .parallel_adapter import first_layers
from .select import coupled


class Reparametrised(nn.Module):
    """A (h, d) and B (d, h/g), whose i-th g-th of rows reads the i-th g-th of hidden units; with biases a (h,) and b (d,) or without."""

    def __init__(self, config: "RepAdapter", site: Site):
        super().__init__()
        h, d, g, like = config.bottleneck, site.in_features, config.groups, site.parameter
        if h % g or d % g:
            raise TunesmithError(f"repadapter: groups={g} must divide bottleneck={h} and the {d} inputs of {site.path!r}")
        self.groups = g
        self.A, self.B = nn.init.xavier_uniform_(empty(h, d, like=like)), nn.init.zeros_(empty(d, h // g, like=like))
        self.a, self.b = (nn.init.zeros_(empty(n, like=like)) if site.bias else None for n in (h, d))

    def dense(self) -> Tensor:
        """B as a matrix (d, h) that is zero outside its groups."""
        return torch.block_diag(*self.B.chunk(self.groups))


class RepAdapterLayer(WeightAdapter):
    """y = base(x + s·(B drop(A x + a) + b)): W + s·W B A, and the bias + s·W (B a + b)."""

    def __init__(self, config: "RepAdapter", inner: Reparametrised):
        super().__init__()
        self.scale, self.dropout, self.inner = config.scale, config.dropout, inner

    def merged(self, W, b):
        f, W = self.inner, W.to(torch.promote_types(W.dtype, self.inner.A.dtype))
        B = f.dense()
        return W + self.scale * (W @ B) @ f.A, b if f.a is None else b + self.scale * W @ (B @ f.a + f.b)

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        A, B, a, b = (None if t is None else t.to(x.dtype) for t in (self.inner.A, self.inner.dense(), self.inner.a, self.inner.b))
        change = F.linear(F.dropout(F.linear(x, A, a), self.dropout, self.training), B, b)
        return base(x + self.scale * change, *args, **kwargs)


class RepAdapter(Method):
    """RepAdapter (Luo et al. 2023, arXiv 2302.08106): x + s·(B(A x + a) + b) in place of the input of each attention and feed-forward block.

    The layers that read one input (queries, keys and values; gate and up) share an adapter. It has no a and b in front of layers
    without a bias, so that all of it merges. The authors choose s for each task among 0.1, 0.5, 1, 5, 10. Trained are 239,808
    numbers for ViT-B/16; the paper's 0.22 M are those without a and b. Raises `TunesmithError` where `groups` do not divide the bottleneck and the layer's inputs.
    """

    method, family, title, paper = "repadapter", "adapter", "Reparametrised adapter", "arXiv:2302.08106"
    works_on = ("linear", "attention")

    targets: Targets = "default"
    bottleneck: PositiveInt = 8
    groups: PositiveInt = Field(2, description="of hidden units and of channels, each group of channels reading one of units")
    scale: PositiveFloat = 1.0
    dropout: Dropout = 0.0

    def default(self, model):
        return [s for c in coupled(model) for s in first_layers(model, c) if s.kind in self.works_on]

    def build(self, model, configs, by_path):
        readers = {s.path: first_layers(model, c)[0].path for c in coupled(model) for s in first_layers(model, c)}
        shared: dict[tuple, Reparametrised] = {}
        built = {}
        for path, config in configs.items():
            site = by_path[path]
            key = readers.get(path, path), site.in_features, site.bias is None, config.bottleneck, config.groups
            if key not in shared:
                shared[key] = Reparametrised(config, site)
            built[path] = site, RepAdapterLayer(config, shared[key])
        return built

    def count(self, site):
        h, d = self.bottleneck, site.in_features
        return h * d + d * h // self.groups + (h + d if site.bias else 0)
