"""The parts of a transformer that papers name, found by shape and by the field's usual names."""

from torch import nn

from ..engine.sites import Site, head_paths, sites, width

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
