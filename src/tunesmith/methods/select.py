"""The parts of a transformer that papers name, found by shape and by the field's usual names."""

from dataclasses import dataclass

from torch import nn

from ..engine.sites import Site, head_paths, sites, width

QUERIES = {"q_proj", "query", "q", "q_lin", "query_proj"}
VALUES = {"v_proj", "value", "v", "v_lin", "value_proj"}
KEYS_AND_VALUES = {"k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "key_proj", "value_proj"}


def mlp_outputs(model: nn.Module) -> list[Site]:
    """The linear layer that ends each feed-forward block: more inputs than outputs, outputs as wide as the residual."""
    hidden, heads = width(model), head_paths(model)
    return [
        s for s in sites(model)
        if s.kind == "linear" and s.out_features == hidden < s.in_features and s.path not in heads and "att" not in s.path.rsplit(".", 2)[-2:][0].lower()
    ]


def keys_and_values(model: nn.Module) -> list[Site]:
    """The attention projections that make keys or values (fused ones included)."""
    return [s for s in sites(model) if s.kind == "linear" and s.path.split(".")[-1] in KEYS_AND_VALUES]


@dataclass(frozen=True)
class Coupled:
    """Linear layers around the same inner units: rows of the `inner` ones make a unit, and `outer` reads it by its columns.

    `kind`: "heads" (with grouped queries a unit is one key-value head and all its query heads) or "channels".
    """

    kind: str
    outer: Site
    inner: tuple[Site, ...]
    units: int

    @property
    def values(self) -> tuple[Site, int]:
        """(the layer that makes what is mixed, its first row for it): the values' projection, or the widening one without activation."""
        named = [s for s in self.inner if s.path.split(".")[-1] in VALUES | {"up_proj", "wi_1"}]
        site = (named or [self.inner[-1]])[0]
        return site, site.out_features - site.out_features // parts(self, site)


def parts(coupled: Coupled, site: Site) -> int:
    """How many equal parts an inner layer's rows have, each with a row group for every unit: 3 for fused queries, keys and values."""
    return 3 if coupled.kind == "heads" and site.out_features == 3 * coupled.outer.in_features else 1


def coupled(model: nn.Module) -> list[Coupled]:
    """The attention blocks and feed-forward blocks of a transformer."""
    heads, hidden = set(head_paths(model)), width(model)
    known = [s for s in sites(model) if s.kind in ("linear", "attention") and s.path not in heads]
    ends = {s.path for s in mlp_outputs(model)}
    found = []
    for outer in known:
        if outer.path in ends:
            inner = _around(outer, [s for s in known if s.out_features == outer.in_features and s.in_features == hidden])
            found += [Coupled("channels", outer, inner, outer.in_features)] if inner else []
        elif outer.out_features == hidden and (inner := _around(outer, [s for s in known if _attends(s)])) and not _attends(outer) and "att" in outer.path.lower():
            if (units := _groups(model, outer)) and all(s.out_features % (units * (3 if s.out_features == 3 * outer.in_features else 1)) == 0 for s in inner):
                found.append(Coupled("heads", outer, inner, units))
    return found


def _attends(site: Site) -> bool:
    return site.path.split(".")[-1] in QUERIES | KEYS_AND_VALUES | {"in_proj"}


def _around(outer: Site, candidates: list[Site]) -> tuple[Site, ...]:
    """The candidates in the smallest module around a layer that holds any."""
    top = outer.path
    while top:
        top = top.rpartition(".")[0]
        if inside := tuple(s for s in candidates if s is not outer and s.path.startswith(top + "." if top else "")):
            return inside
    return ()


def _groups(model: nn.Module, outer: Site) -> int | None:
    """Key-value heads of the attention that a layer ends."""
    if isinstance(outer.owner, nn.MultiheadAttention):
        return outer.owner.num_heads
    config = getattr(model, "config", None)
    return next((n for key in ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads") if isinstance(n := getattr(config, key, None), int)), None)
