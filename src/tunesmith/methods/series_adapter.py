"""Series adapters: a small bottleneck before or after a linear layer."""

from typing import Literal

from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional as F

from ..engine.adapter import Adapter
from ..engine.sites import Site, Targets
from .method import Dropout, Method, empty
from .select import mlp_outputs

ACTIVATIONS = {"tanh": F.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class SeriesAdapterLayer(Adapter):
    """after: y = h + s·U f(D h), h = base(x); before: y = base(x + s·U f(D x)). D (b, d), U (d, b)."""

    def __init__(self, config: "SeriesAdapter", site: Site, before: bool):
        super().__init__()
        self.before, self.scale, self.dropout, self.act = before, config.scale, config.dropout, ACTIVATIONS[config.activation]
        d = site.in_features if before else site.out_features
        self.down, self.up = empty(config.bottleneck, d, like=site.parameter), empty(d, config.bottleneck, like=site.parameter)
        if config.init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
            nn.init.zeros_(self.up)

    def change(self, h):
        z = F.linear(F.dropout(h, self.dropout, self.training), self.down.to(h.dtype))
        return h + self.scale * F.linear(self.act(z), self.up.to(h.dtype))

    def forward(self, base, x, *args, **kwargs):
        return base(self.change(x), *args, **kwargs) if self.before else self.change(base(x, *args, **kwargs))


class SeriesAdapter(Method):
    """Series adapter of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933, eq. 2), without biases or norms.

    By default one adapter follows the last linear layer of each feed-forward block, the placement of the published
    parameter counts. `place="auto"` puts it before a layer that widens and after any other, as the authors' code
    does. The library's start is U = 0 (identity); `init="bert"` is the authors' N(0, 0.02²), not an identity.
    """

    method, family, title, paper = "series-adapter", "adapter", "Series bottleneck adapter", "arXiv:2304.01933"
    mergeable = False
    quantized_base_ok = True
    default_lr = 1e-3

    targets: Targets = "default"
    bottleneck: PositiveInt = 64
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    scale: float = Field(1.0, gt=0)
    dropout: Dropout = 0.0
    place: Literal["auto", "before", "after"] = "auto"
    init: Literal["zero", "bert"] = "zero"

    def default(self, model):
        return mlp_outputs(model)

    def _before(self, site: Site) -> bool:
        return self.place == "before" or (self.place == "auto" and site.out_features > site.in_features)

    def layer(self, site):
        return SeriesAdapterLayer(self, site, self._before(site))

    def count(self, site):
        return 2 * self.bottleneck * (site.in_features if self._before(site) else site.out_features)
