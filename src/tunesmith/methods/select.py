"""The parts of a transformer that papers name, found by shape and by the field's usual names."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..engine.sites import Site, head_paths, sites, width, within
from ..engine.store import pruned_blocks, pruned_units

KEYS_AND_VALUES = {"k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "key_proj", "value_proj"}
QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
    ("in_proj",), ("c_attn",), ("query_key_value",), ("qkv_proj",), ("qkv",), ("Wqkv",),
)  # fmt: skip
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def mlp_outputs(model: nn.Module) -> list[Site]:
    """The linear layer that ends each feed-forward block: it narrows what `makers` have widened, whatever the width of its stage.

    Where a model has no such layer, those that narrow to the width of its residual stream.
    """
    hidden, heads, pruned = width(model), head_paths(model), pruned_blocks(model)
    known = sites(model)
    linear = [s for s in known if s.kind == "linear"]
    narrow = [s for s in linear if s.in_features > s.out_features and s.path not in heads and s.path not in pruned and not _in_attention(s)]
    ends = [s for s in narrow if makers(s, linear)[1]] or [s for s in narrow if s.out_features == hidden]
    paths = {s.path for s in ends} | {path for path, (kind, _) in pruned.items() if kind == "channels"}
    return [s for s in known if s.path in paths]


def _in_attention(site: Site) -> bool:
    """As the names of the modules in its layer say."""
    return re.search("att(n|ention)", re.sub(r".*\.\d+\.", "", site.path).rpartition(".")[0].lower()) is not None


def makers(outer: Site, known: list[Site]) -> tuple[str, list[Site]]:
    """The linear layers that make the inputs of one that ends a feed-forward block, up and gate or the two in one, and the module around all of them."""
    out, made = outer.shape
    fit = [s for s in known if s.kind == "linear" and s.shape in ((made, out), (2 * made, out)) and not _in_attention(s)]
    for place in _around(outer.path):
        if here := [s for s in fit if within(s.path, [place])]:
            return place, [s for s in here if s.shape[0] == made] or here
    return outer.path, []


def keys_and_values(model: nn.Module) -> list[Site]:
    """The attention projections that make keys or values (fused ones included)."""
    return [s for s in sites(model) if s.kind == "linear" and s.path.split(".")[-1] in KEYS_AND_VALUES]


@dataclass(frozen=True)
class Coupled:
    """Layers that share inner units: `inner` makes them, `outer` reads them.

    A unit of `heads` is a key-value head with its query heads, of `channels` one channel of a feed-forward block. `inner` is
    (query, key, value), the three in one, (up,) or (gate, up); empty where it was not found or its layout is not known.
    `free`: in any other order the units compute the same, since nothing but these layers tells them apart.
    """

    kind: Literal["heads", "channels"]
    outer: Site
    inner: tuple[Site, ...]
    units: int
    free: bool

    def columns(self) -> Tensor:
        """The inputs of `outer` that each unit is, (units, n)."""
        return torch.arange(self.outer.in_features).view(self.units, -1)

    def _parts(self) -> int:
        return 3 if self.kind == "heads" and len(self.inner) == 1 else 1

    def rows(self, site: Site) -> Tensor:
        """The outputs of one of `inner` that each unit is, (units, n)."""
        return torch.arange(site.out_features).view(self._parts(), self.units, -1).transpose(0, 1).flatten(1)

    def values(self) -> Tensor:
        """Those of the last of `inner` that are values, or the upward projection."""
        return self.rows(self.inner[-1]).chunk(self._parts(), 1)[-1]


def coupled(model: nn.Module) -> list[Coupled]:
    """The attentions and feed-forward blocks of a model; those that have lost units are what they were before, whatever sizes coincide now."""
    by_path, units = {s.path: s for s in sites(model)}, pruned_units(model)
    found = [Coupled(kind, by_path[path], tuple(by_path[p] for p in inner), len(units[path]), True) for path, (kind, inner) in pruned_blocks(model).items()]

    def others(listed: list[Site]) -> list[Site]:
        taken = {s.path for c in found for s in (c.outer, *c.inner)}
        return [s for s in listed if s.path not in taken]

    found += _attentions(model, others(list(by_path.values())))
    return found + _feed_forwards(others(mlp_outputs(model)), others(list(by_path.values())))


def _around(path: str) -> tuple[str, str]:
    """The module that a layer is in, and the one that that is in."""
    inside = path.rpartition(".")[0]
    return inside, inside.rpartition(".")[0]


def _beside(known: list[Site], top: str, own: tuple[Site, ...]) -> list[tuple[str, int]]:
    """(kind, size) of every dimension of what a block has beside its `own` layers."""
    return [(s.kind, size) for s in known if within(s.path, [top]) and s not in own for p in s.values.values() for size in p.shape]


def _attentions(model: nn.Module, known: list[Site]) -> list[Coupled]:
    linear, places, found = [s for s in known if s.kind in ("linear", "attention")], {}, []
    config = getattr(model, "config", None)
    alike = not getattr(config, "alibi", False) and getattr(config, "position_embedding_type", "") != "alibi"
    for s in linear:
        places.setdefault(s.path.rpartition(".")[0], {})[s.path.rpartition(".")[2]] = s
    for top, here in places.items():
        inner = next((tuple(here[name] for name in names) for names in QUERY_KEY_VALUE if here.keys() >= set(names)), ())
        heads = _heads(model.get_submodule(top), config)
        if not inner or not heads:
            continue
        made = sum(s.out_features for s in inner)
        for place in _around(inner[0].path):
            outer = [s for s in linear if within(s.path, [place]) and s not in inner and s.out_features == inner[0].in_features and _groups(made, heads, s.in_features)]
            outer = [s for s in outer if not re.match("pos_|.*_global$", s.path.rpartition(".")[2])]  # DeBERTa's and Longformer's further queries and keys
            if outer:
                break
        if len(outer) == 1:
            units, attention = _groups(made, heads, outer[0].in_features), inner[0].holder
            if isinstance(attention, nn.MultiheadAttention):
                alike &= attention.bias_k is None and (len(inner) == 1 or attention.in_proj_bias is None)
            sizes = {outer[0].in_features, inner[-1].out_features}
            alike &= not any(size in sizes or (size == heads and kind != "norm") for kind, size in _beside(known, top, (*inner, *outer)))
            read = len(inner) == 3 or (units == heads and (inner[0].kind == "attention" or inner[0].transposed))
            found.append((outer[0], inner if read else (), units))
    # one layer's position biases may serve all others
    return [Coupled("heads", outer, inner, units, alike and bool(inner)) for outer, inner, units in found]


def _heads(attention: nn.Module, config) -> int:
    """The number of query heads, 0 where nothing says."""
    for source in (attention, getattr(attention, "config", None), config):
        for name in HEADS:
            if isinstance(value := getattr(source, name, None), int):
                return value
    return 0


def _groups(made: int, heads: int, size: int) -> int:
    """The number of key-value heads where queries, keys and values have `made` outputs and attention `size`, 0 where that cannot be."""
    groups = (made * heads // size - heads) // 2
    return groups if groups > 0 and size % heads == heads % groups == 0 and (heads + 2 * groups) * size == made * heads else 0


def _feed_forwards(ends: list[Site], known: list[Site]) -> list[Coupled]:
    found = []
    for outer in ends:
        place, inner = makers(outer, known)
        if len(inner) > 2 or sum(within(s.path, [place]) for s in ends) > 1 or any(s.shape != outer.shape[::-1] for s in inner):
            inner = []
        inner, units = tuple(sorted(inner, key=lambda s: "gate" not in s.path.rpartition(".")[2])), outer.in_features
        free = bool(inner) and all(size != units for _, size in _beside(known, place, (*inner, outer)))
        found.append(Coupled("channels", outer, inner, units, free))
    return found


def layers(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Site path → (stack, layer, layers of the stack)."""
    numbered = {}
    for site in sites(model):
        parts = site.path.split(".")
        numbered[site.path] = [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()]
    equal = {path: [(stack, i) for stack, i in places if len({type(m) for m in model.get_submodule(stack).children()}) == 1] for path, places in numbered.items()}
    found = equal if any(equal.values()) else numbered
    last, outermost = next((places[0] for places in found.values() if places), ("", 0)), {}
    for path, places in found.items():
        outermost[path] = last = places[0] if places else last
    depths: dict[str, set[int]] = {}
    for stack, number in outermost.values():
        depths.setdefault(stack, set()).add(number)
    return {path: (stack, sorted(depths[stack]).index(number), len(depths[stack])) for path, (stack, number) in outermost.items()}
