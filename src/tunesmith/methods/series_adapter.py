"""Series adapters: a small bottleneck before or after a linear layer."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import Adapter
from ..engine.sites import Site, Targets, check_kind, sites
from ..errors import TunesmithError
from .method import Dropout, Method, Rank, empty
from .select import coupled, mlp_outputs


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"tanh": F.tanh, "relu": F.relu, "gelu": F.gelu, "quick-gelu": quick_gelu, "silu": F.silu}


class Bottleneck(Adapter):
    """`branch(h)` = s·(U f(D h + d) + u) on the last dimension, D (b, in), U (out, b); d (b,), u (out,) only where `bias` is set."""

    def __init__(self, config: "BottleneckMethod", site: Site, inputs: int, outputs: int):
        super().__init__()
        self.scale, self.dropout, self.act = config.scale, config.dropout, ACTIVATIONS[config.activation]
        self.down, self.up = empty(config.bottleneck, inputs, like=site.parameter), empty(outputs, config.bottleneck, like=site.parameter)
        if config.init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
            nn.init.zeros_(self.up)
        self.down_bias = nn.init.zeros_(empty(config.bottleneck, like=site.parameter)) if config.bias else None
        self.up_bias = nn.init.zeros_(empty(outputs, like=site.parameter)) if config.bias else None

    def branch(self, h: Tensor) -> Tensor:
        d, u = (None if v is None else v.to(h.dtype) for v in (self.down_bias, self.up_bias))
        z = F.linear(F.dropout(h, self.dropout, self.training), self.down.to(h.dtype), d)
        return self.scale * F.linear(self.act(z), self.up.to(h.dtype), u)


class BottleneckMethod(Method):
    """What the methods with a bottleneck have in common."""

    family = "adapter"
    mergeable = False

    targets: Targets = "default"
    bottleneck: Rank = 64
    activation: Literal["tanh", "relu", "gelu", "quick-gelu", "silu"] = "tanh"
    scale: float = Field(1.0, gt=0)
    dropout: Dropout = 0.0
    bias: bool = False
    init: Literal["zero", "bert"] = "zero"

    def resized(self, rank):
        return self.model_copy(update={"bottleneck": rank})

    def cost(self, inputs: int, outputs: int) -> int:
        """Parameters of a bottleneck between so many inputs and outputs."""
        return self.bottleneck * (inputs + outputs) + (self.bottleneck + outputs if self.bias else 0)


class SeriesAdapterLayer(Bottleneck):
    """after: y = h + branch(h), h = base(x); before: y = base(x + branch(x)). D (b, d), U (d, b)."""

    def __init__(self, config: "SeriesAdapter", site: Site, before: bool):
        d = site.in_features if before else site.out_features
        super().__init__(config, site, d, d)
        side = "in" if before else "out"
        self.before, self.dims = before, {"down": ("rank", side), "up": (side, "rank"), "down_bias": ("rank",), "up_bias": (side,)}

    def forward(self, base, x, *args, **kwargs):
        if self.before:
            return base(x + self.branch(x), *args, **kwargs)
        h = base(x, *args, **kwargs)
        return h + self.branch(h)


class SeriesAdapter(BottleneckMethod):
    """Series adapter of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933, eq. 2), without norms.

    `placement` says where, unless `targets` names layers: "pfeiffer" (Pfeiffer et al. 2021, arXiv 2005.00247) puts one adapter
    behind the last linear layer of each feed-forward block, the placement of the published parameter counts, "houlsby" (Houlsby
    et al. 2019, arXiv 1902.00751) one more behind the attention's output projection. Both are before the residual is added; in
    those papers they have biases (`bias=True`), and Houlsby's norms train too (`combined` with `ln-tuning`). `place="auto"` puts
    the adapter before a layer that widens and after any other, as the authors' code does. The library's start is U = 0 (identity); `init="bert"` is the authors' N(0, 0.02²), not an identity.
    """

    method, title, paper = "series-adapter", "Series bottleneck adapter", "arXiv:2304.01933"

    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    place: Literal["auto", "before", "after"] = "auto"

    def default(self, model):
        ends, known = mlp_outputs(model), sites(model)
        outputs = [c.outer for c in coupled(model) if c.kind == "heads"] if self.placement == "houlsby" else []
        what = "feed-forward block of linear layers" if not ends else "attention's output projection" if self.placement == "houlsby" and not outputs else None
        if what:
            raise TunesmithError(f"{self.method} found no {what} in {type(model).__name__}; name layers with targets")
        for site in outputs:
            check_kind(site, self.works_on, self.method, known)
        return outputs + ends

    def _before(self, site: Site) -> bool:
        return self.place == "before" or (self.place == "auto" and site.out_features > site.in_features)

    def layer(self, site):
        return SeriesAdapterLayer(self, site, self._before(site))

    def count(self, site):
        d = site.in_features if self._before(site) else site.out_features
        return self.cost(d, d)
