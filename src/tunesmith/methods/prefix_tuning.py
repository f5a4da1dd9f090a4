"""Prefix tuning: learned keys and values in front of every layer's own."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from ..engine.adapter import Adapter
from ..engine.sites import backbone, float_dtype
from ..engine.tokens import TokenAdapter, arguments, cache_name, cached, extend, past, reads_first, token_backbone, token_site
from ..errors import TunesmithError
from .method import Method, check_layers, empty
from .p_tuning import encoded


class PrefixLayer(TokenAdapter):
    """Every layer's cache starts with m learned pairs; a table (m, 2·layers·kv_heads·head_dim) as layer 0 K, layer 0 V, layer 1 K, …

    The table is the trained prefix, or encoder(prefix) with a prefix (m, d). Keys enter as they are (no rotary embedding); the
    text starts at position m. A layer that is to have no prefix has m pairs of zeros in its cache, which `PrefixReader` hides.
    """

    def __init__(self, config: "PrefixTuning", shapes: list[tuple[int, int]], like):
        super().__init__()
        self.length, self.shapes, self.numbers = config.tokens, shapes, config.numbers(len(shapes))
        widths = config.widths(shapes)
        self.prefix = empty(config.tokens, widths[0], like=like)
        nn.init.normal_(self.prefix)
        self.encoder = projection(widths, like.device, float_dtype(like)) if config.prefix_projection else None

    def table(self) -> torch.Tensor:
        return self.prefix if self.encoder is None else self.encoder(self.prefix)

    def drop_encoder(self):
        self.prefix = nn.Parameter(self.table().detach(), self.prefix.requires_grad)
        self.encoder = None

    def pairs(self, batch: int, dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, keys and values (batch, kv_heads, m, head_dim)."""
        shapes = [self.shapes[i] for i in self.numbers for _ in "kv"]
        pieces = self.table().to(dtype).split([h * d for h, d in shapes], dim=1)
        heads = [p.view(self.length, h, d).transpose(0, 1).expand(batch, -1, -1, -1) for p, (h, d) in zip(pieces, shapes, strict=True)]
        own = dict(zip(self.numbers, zip(heads[::2], heads[1::2], strict=True), strict=True))
        return [own[i] if i in own else (self.prefix.new_zeros(batch, h, self.length, d, dtype=dtype),) * 2 for i, (h, d) in enumerate(self.shapes)]

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        cache, owner = cached(call), base.site.owner
        inputs = call.get("input_ids") if call.get("input_ids") is not None else call["inputs_embeds"]
        extend(call, self.length, new=False)
        if past(cache):
            return base(**call)
        pairs = self.pairs(len(inputs), next(owner.parameters()).dtype)
        name = cache_name(base.forward)
        if cache is None and self.training and torch.is_grad_enabled():
            call[name] = _read_only(pairs)
            return _without_cache(base(**call | {"use_cache": False}))
        call[name] = _filled(_new_cache() if cache is None else cache, pairs)
        output = base(**call)
        return output if cache is not None or call.get("use_cache") is not False else _without_cache(output)


def projection(widths: list[int], device, dtype=None) -> nn.Sequential:
    """W₂·tanh(W₁·e + b₁) + b₂ between these widths."""
    d, h, out = widths
    return nn.Sequential(nn.Linear(d, h, device=device, dtype=dtype), nn.Tanh(), nn.Linear(h, out, device=device, dtype=dtype))


def _without_cache(output):
    """The output of a call that was not to keep a cache."""
    if isinstance(output, tuple):
        return output
    return type(output)(**{k: v for k, v in output.items() if k not in ("cache", "past_key_values")})


def _new_cache():
    from transformers import DynamicCache

    return DynamicCache()


def _filled(cache, pairs):
    for i, (k, v) in enumerate(pairs):
        cache.update(k, v, i)
    return cache


def _read_only(pairs):
    """A cache that layers read but do not grow, so that a layer recomputed in the backward finds it unchanged."""
    cache = _filled(_new_cache(), pairs)
    cache.update = lambda k, v, layer, *args, **kwargs: (torch.cat([pairs[layer][0], k], -2), torch.cat([pairs[layer][1], v], -2))
    return cache


class Hiding:
    """A cache that gives a layer everything but its first `length` pairs."""

    def __init__(self, cache, length: int):
        self.cache, self.length = cache, length

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update(self, *args, **kwargs):
        return tuple(states[..., self.length :, :] for states in self.cache.update(*args, **kwargs))


class PrefixReader(Adapter):
    """At each attention module: gives it the prefix where gradient checkpointing has taken its cache away, and hides what stands
    for a prefix where the layer is to have none."""

    def __init__(self, prefix: PrefixLayer, hides: bool):
        super().__init__()
        self.prefix, self.hides = [prefix], hides  # in a list: the parameters belong to the backbone's site alone

    def forward(self, base, *args, **kwargs):
        call, (prefix,), name = arguments(base, args, kwargs), self.prefix, cache_name(base.forward)
        if cached(call) is None:
            hidden = call["hidden_states"]
            call[name] = _read_only(prefix.pairs(len(hidden), hidden.dtype))
        if self.hides:
            mask = call.get("attention_mask")
            if not isinstance(mask, torch.Tensor | None):
                raise TunesmithError(f"a prefix in some layers alone needs masks that are tensors, and {type(base.site.owner).__name__} has {type(mask).__name__}; load the model with attn_implementation='sdpa'")
            call |= {name: Hiding(cached(call), prefix.length), "attention_mask": None if mask is None else mask[..., prefix.length :]}
        return base(**call)


class PrefixTuning(Method):
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190): m learned keys and values in front of every layer's own.

    With `prefix_projection` a two-layer MLP d → h → 2·layers·d makes them of m trained vectors, d being a layer's kv_heads·head_dim;
    it wants lower rates, 1e-3 and less. The MLP serves training alone: `drop_encoder` puts what it makes in its place, and peft's
    files hold just that. In layers beyond `layers` nothing attends to a prefix; the text's positions are the same in all. Raises
    `TunesmithError` for a model without a KV cache, for encoder-decoders, and for some layers of a model with sliding windows.
    """

    method, family, title, paper = "prefix-tuning", "prompt", "Prefix tuning", "arXiv:2101.00190"
    works_on = ("tokens",)
    mergeable = False
    identity = False
    default_lr = 3e-2

    targets: Literal["tokens"] = "tokens"
    tokens: PositiveInt = 20
    prefix_projection: bool = Field(False, description="make the prefix by an MLP while training")
    encoder_hidden_size: PositiveInt | None = Field(None, description="width h of that MLP; default: d")

    @property
    def front(self):
        return self.tokens

    own_layers = True

    def numbers(self, depth: int) -> list[int]:
        """The layers that have a prefix, of so many."""
        return list(range(depth)) if self.layers is None else sorted({i % depth for i in self.layers})

    def widths(self, shapes: list[tuple[int, int]]) -> list[int]:
        """Of what trains and, with a projection, of its hidden layer and what it makes, (kv_heads, head_dim) of each layer of the model being given."""
        shapes = [shapes[i] for i in self.numbers(len(shapes))]
        out, d = 2 * sum(h * d for h, d in shapes), shapes[0][0] * shapes[0][1]
        return [d, self.encoder_hidden_size or d, out] if self.prefix_projection else [out]

    def select(self, model):
        inner = token_backbone(model, self.method)
        if getattr(model.config, "is_encoder_decoder", False):
            raise TunesmithError("prefix-tuning works on decoder-only and encoder-only models; prompt-tuning works on encoder-decoders")
        readers = [m for m in inner.modules() if hasattr(m, "layer_idx") and "attention" in type(m).__name__.lower() and cache_name(m.forward)]
        if self.layers is not None:
            depth = len(cache_shapes(model))
            check_layers(self, model, depth, self.layers)
            types = getattr(model.config, "layer_types", None)
            if "sliding_attention" in types if types else getattr(model.config, "sliding_window", None):
                raise TunesmithError(f"prefix-tuning in some layers alone does not work with sliding windows, which {type(model).__name__} has; leave layers out")
            if without := set(range(depth)) - {m.layer_idx for m in readers}:
                raise TunesmithError(f"prefix-tuning finds no attention module of layer {min(without)} of {type(model).__name__}; leave layers out")
        return {site.path: (site, {}) for site in (token_site(m, model) for m in [inner, *readers])}

    def build(self, model, configs, by_path):
        (path, *readers), owner = configs, backbone(model)
        prefix = PrefixLayer(self, cache_shapes(owner), next(owner.parameters()))
        return {path: (by_path[path], prefix)} | {p: (by_path[p], PrefixReader(prefix, by_path[p].owner.layer_idx not in prefix.numbers)) for p in readers}

    def count(self, site):
        if hasattr(site.owner, "layer_idx"):
            return 0
        widths = self.widths(cache_shapes(site.owner))
        return self.tokens * widths[0] + sum((d + 1) * out for d, out in pairwise(widths))

    peft_type, peft_by_site = "PREFIX_TUNING", False
    plain: ClassVar[dict[str, Any]] = {"prefix_projection": False}  # what the config says of a prefix without the MLP that made it

    def to_peft(self, configs, model):
        shapes = cache_shapes(model)
        if reads_first(model):
            raise TunesmithError("peft runs no prefix in an encoder; save this one with format='tunesmith'")
        if len(set(shapes)) > 1 or len(self.numbers(len(shapes))) < len(shapes):
            raise TunesmithError("the peft format needs a prefix in every layer, with the same key and value heads; save this one with format='tunesmith'")
        heads, dim = shapes[0]
        return {
            "num_virtual_tokens": self.tokens, "token_dim": heads * dim, "num_attention_heads": heads, "num_layers": len(shapes),
            "num_transformer_submodules": 1, "prefix_projection": False, "encoder_hidden_size": self.encoder_hidden_size or heads * dim,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        config = cls(tokens=len(found["prompt_embeddings"]))
        return config, dict.fromkeys(config.select(model), {})

    def peft_tensors(self, site, own):
        if not own or not self.prefix_projection:
            return {"prompt_embeddings": own["prefix"]} if own else {}
        (h, d), out = own["encoder.0.weight"].shape, len(own["encoder.2.weight"])
        return {"prompt_embeddings": encoded(projection([d, h, out], "meta"), own, "prefix")}

    def own_tensors(self, site, theirs):
        return {} if hasattr(site.owner, "layer_idx") else {"prefix": theirs["prompt_embeddings"]}


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer, seen from the cache that one token leaves."""
    training = model.training
    cache = _new_cache()
    inner = backbone(model)
    device = next(inner.parameters()).device
    try:
        with torch.no_grad():
            inner.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), **{cache_name(inner.forward) or 'cache': cache})
    except Exception as error:  # whatever a model raises that knows no such cache
        raise TunesmithError(f"prefix-tuning needs attention in every layer with a KV cache, and {type(model).__name__} takes none: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    finally:
        inner.train(training)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if not layers:
        raise TunesmithError(f"prefix-tuning needs attention layers with a KV cache; {type(model).__name__} keeps none")
    if any(layer.keys.shape != layer.values.shape for layer in layers):
        raise TunesmithError(f"prefix-tuning needs keys and values of one width, and those in the KV cache of {type(model).__name__} differ")
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]
