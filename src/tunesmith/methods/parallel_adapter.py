"""Parallel adapters: a small bottleneck beside a layer or a whole feed-forward block."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..engine.adapter import Adapter
from ..engine.sites import Site, Targets, sites, within
from ..errors import TunesmithError
from .method import Method
from .select import QUERY_KEY_VALUE, Coupled, coupled, makers
from .series_adapter import Bottleneck, BottleneckMethod

# The norm that a feed-forward block begins with, by the field's usual names; `layer_norm` is T5's, the only one, around its block.
NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "layernorm_after", "layer_norm2", "norm2", "norm_2", "ln_2", "ffn_norm", "mlp_norm", "layer_norm")


def first_layers(model: nn.Module, block: Coupled) -> tuple[Site, ...]:
    """The layers that read what a block is given, none where they are not found."""
    if block.inner:
        return block.inner
    if block.kind == "channels":
        _, made = makers(block.outer, sites(model))
        return tuple(made) if len(made) == 1 and made[0].out_features == 2 * block.outer.in_features else ()  # gate and up in one
    inside = block.outer.path.rpartition(".")[0]
    return tuple(s for s in sites(model) if s.path in {f"{inside}.{names[0]}" for names in QUERY_KEY_VALUE if len(names) == 1})


class Given:
    """What the block under way was given, and the (rows, columns) of an image's patches; blocks run one after another, so that one place serves them all."""

    x: Tensor | None = None
    grid: tuple[int, int] | None = None

    def __getstate__(self):  # copies and pickles hold no activations
        return {}


class Reader(Adapter):
    """Where a block begins: notes its input."""

    def __init__(self, given: Given):
        super().__init__()
        self.given = given

    def forward(self, base, x, *args, **kwargs):
        self.given.x = x
        return base(x, *args, **kwargs)


class Beside(Method):
    """Shared by methods whose adapter may read what a block is given, at its first layer or norm, and add to what its last layer gives."""

    targets: Targets = "default"
    input: str | None = Field(None, description="the layer that is given the input of the block which ends at a site; filled in")

    def blocks(self, model: nn.Module) -> list[tuple[Site, Site]]:
        """(first, last) layer of each block that `targets="default"` means."""
        raise TypeError(f"{type(self).__name__} defines no blocks")

    def select(self, model):
        if self.input is not None:
            raise TunesmithError(f"{self.method} finds itself what a block is given; leave input out")
        skip = self.saved_paths(model)
        pairs = [pair for pair in self.blocks(model) if not any(within(s.path, skip) for s in pair)] if self.targets == "default" else []
        return {s.path: (s, {"input": first.path}) for first, last in pairs for s in (first, last)} or super().select(model)

    def build(self, model, configs, by_path):
        given, built = Given(), {}
        for path, config in configs.items():
            adapter = Reader(given) if config.input == path else config.layer(by_path[path])
            if config.input not in (None, path):
                adapter.given = given
            built[path] = by_path[path], adapter
        return built


class Branch(Adapter):
    """Adds `branch`, which a subclass has: y = base(x) + branch(x); where a block ends, + branch(what the block was given) instead."""

    given: Given | None = None

    def forward(self, base, x, *args, **kwargs):
        z = x if self.given is None else self.given.x
        if z is None:
            raise TunesmithError(f"{base.site.path!r} ran before the norm that its block seems to begin with; name linear layers with targets")
        y = base(x, *args, **kwargs)
        return y + self.branch(z).to(y.dtype)


class ParallelAdapterLayer(Branch, Bottleneck):
    """y = base(x) + s·(U f(D z + d) + u), D (b, in), U (out, b); z is x, or what the block was given."""


class ParallelAdapter(Beside, BottleneckMethod):
    """Scaled parallel adapter (He et al. 2022, arXiv 2110.04366) as in AdaptFormer (Chen et al. 2022, arXiv 2205.13535).

    By default one adapter is beside each feed-forward block: it reads the residual stream, before the block's norm, and adds to
    what the block's last layer gives, so that a scale or norm behind that, as BEiT and Gemma 2 have, holds for both. Where no norm
    with one of the usual names begins the block, as after a post-norm, it reads the input of the block's first linear layer.
    `targets` puts adapters beside single linear layers, or norms of the last dimension, instead:
    `ParallelAdapter(targets=["up_proj", "down_proj"], bottleneck=256, activation="tanh", scale=1.0, bias=False)` are those of
    LLM-Adapters (arXiv 2304.01933). `dropout` drops what the adapter reads; AdaptFormer's drops hidden units.
    """

    method, title, paper = "parallel-adapter", "Parallel bottleneck adapter", "arXiv:2110.04366"
    works_on = ("linear", "norm")

    activation: Literal["tanh", "relu", "gelu", "quick-gelu", "silu"] = "relu"
    scale: float = Field(0.1, gt=0)
    bias: bool = True

    def blocks(self, model):
        by_path = {s.path: s for s in sites(model)}
        first = [(inner[0], c.outer) for c in coupled(model) if c.kind == "channels" and (inner := first_layers(model, c))]
        if not first:
            raise TunesmithError(f"{self.method} found no feed-forward block of linear layers in {type(model).__name__}; name layers with targets")
        return [(_norm(model, inner, by_path) or inner, outer) for inner, outer in first]

    def _shape(self, site: Site) -> tuple[int, int]:
        """(inputs, outputs) of the adapter at a site."""
        if self.input:
            return site.out_features, site.out_features
        return (site.in_features, site.out_features) if site.weight else (site.parameter.numel(),) * 2

    def layer(self, site):
        if isinstance(site.holder, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            raise TunesmithError(f"{self.method} cannot act on {site.path!r}, a {type(site.holder).__name__}: an adapter's channels are the last dimension")
        return ParallelAdapterLayer(self, site, *self._shape(site))

    def count(self, site):
        return 0 if self.input == site.path else self.cost(*self._shape(site))


def _norm(model: nn.Module, first: Site, by_path: dict[str, Site]) -> Site | None:
    """The norm that the feed-forward block with this first linear layer begins with, where one of the usual names says so."""
    inside = first.path.rpartition(".")[0]
    for place in (inside, inside.rpartition(".")[0]):
        layer = model.get_submodule(place)
        here = {name: site for name, _ in layer.named_children() if (site := by_path.get(f"{place}.{name}".lstrip("."))) and site.kind == "norm"}
        name = next((name for name in NORMS if name in here), None)
        behind = not getattr(layer, "norm_first", True) or (name == "post_attention_layernorm" and "post_feedforward_layernorm" in here)  # torch, OLMo 2
        behind |= type(layer).__name__.startswith("Swinv2") or (name == "layer_norm" and (place == inside or len(here) > 1))  # XLNet, Funnel
        if name and not behind:
            return here[name]
    return None
