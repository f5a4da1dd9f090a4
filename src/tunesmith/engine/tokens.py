"""Adapters that put virtual tokens in front of a Hugging Face model's input: masks, positions, caches, outputs."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TunesmithError
from .adapter import Adapter, Base
from .sites import Site, backbone


def token_site(module: nn.Module, model: nn.Module) -> Site:
    """The site of a whole backbone or stack, whose forward takes `input_ids`."""
    path = next(path for path, m in model.named_modules() if m is module)
    return Site(path, "tokens", module, module, names=())


def token_backbone(model: nn.Module, method: str) -> nn.Module:
    """Raises `TunesmithError` for a model that does not read token ids."""
    inner = backbone(model)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inner = getattr(inner, "decoder", inner)  # OPT's heads call it past the module around it
    if "input_ids" not in inspect.signature(inner.forward).parameters or not hasattr(inner, "get_input_embeddings"):
        raise TunesmithError(f"{method} acts on the input tokens of a Hugging Face language model; {type(model).__name__} takes none")
    return inner


class TokenAdapter(Adapter):
    """Shared by prompt and prefix methods; `length` is the number of virtual tokens."""

    length: int

    @classmethod
    def mixed(cls, base, rows, *args, **kwargs):
        call = arguments(base, args, kwargs)
        if cached(call) is not None:
            raise TunesmithError("a mixed batch with virtual tokens cannot share a KV cache; generate for one adapter at a time")
        if "use_cache" in inspect.signature(base.forward).parameters:
            call["use_cache"] = False
        return super().mixed(base, rows, **call)


def arguments(base: Base, args, kwargs) -> dict[str, Any]:
    """The call's arguments by name."""
    bound = inspect.signature(base.forward).bind_partial(base.site.owner, *args, **kwargs)
    call = dict(list(bound.arguments.items())[1:])
    return call | call.pop("kwargs", {})


def cache_name(forward) -> str | None:
    """What a forward calls its KV cache, which depends on the version of transformers."""
    taken = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def cached(call: dict):
    return call.get("cache", call.get("past_key_values"))


def past(cache) -> int:
    """Tokens already in a KV cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def reads_first(model: nn.Module) -> bool:
    """Whether a model's heads read the first token of a text, as those of BERT and other encoders do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) in ENCODERS and not getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False)


def extend(call: dict, length: int, new: bool, after: int = 0) -> None:
    """Make room for `length` virtual tokens in masks, positions and token types, behind the text's first `after` tokens.

    `new`: the virtual tokens are part of this call's input; otherwise they are in the cache already.
    """
    mask = call.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise TunesmithError("virtual tokens need a 2-D attention mask (batch, tokens); packed or 4-D masks cannot be extended")
        call["attention_mask"] = inserted(mask, mask.new_ones(len(mask), length), after)
    positions = call.get("position_ids")
    if positions is not None:
        text = torch.arange(positions.shape[-1], device=positions.device)
        call["position_ids"] = positions = positions + length * (text >= after)
        if new:
            own = torch.arange(length, device=positions.device) + (positions[..., after - 1 : after] + 1 if after else 0)
            call["position_ids"] = inserted(positions, own.expand(*positions.shape[:-1], length), after, -1)
    for name in ("token_type_ids", "global_attention_mask"):  # the latter is Longformer's
        types = call.get(name)
        if types is not None and new:
            call[name] = inserted(types, types.new_zeros(len(types), length), after)


def inserted(text: Tensor, virtual: Tensor, after: int, dim: int = 1) -> Tensor:
    """What belongs to the virtual tokens behind the first `after` of the text's."""
    first, rest = text.tensor_split([after], dim)
    return torch.cat([first, virtual, rest], dim)


def positions(module: nn.Module) -> int | None:
    """How many tokens a model with a table of positions can read; None where it has no such table."""
    for path, m in module.named_modules():
        if isinstance(m, nn.Embedding) and path.rsplit(".", 1)[-1] in ("wpe", "position_embeddings", "embed_positions"):
            return m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
    return None


def trim(output, length: int, after: int = 0):
    """The output without the virtual positions, so that it aligns with the caller's tokens and labels."""

    def cut(h):
        return torch.cat([h[:, :after], h[:, after + length :]], 1) if after else h[:, length:]

    if isinstance(output, tuple):
        return (cut(output[0]), *output[1:])
    output.last_hidden_state = cut(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(map(cut, output.hidden_states))
    return output
