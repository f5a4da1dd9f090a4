"""Models whose linear layers are stored in few bits: making, measuring, saving and loading them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.calls import parts, score
from ..engine.sites import Site, Targets, find, sites
from ..engine.store import read_parts, write_parts
from ..errors import TunesmithError
from . import feedback
from .formats import Format, parse
from .packed import PackedWeight

CARD, WEIGHTS = "quantized.json", "quantized.safetensors"
PASSES = 8  # over the calibration data, at least: layers are rounded for what those before them, rounded already, give them


def quantize(
    model: nn.Module,
    format: Format | str | dict = "nf4",
    targets: Targets = "all-linear",
    calibrate: Callable[[nn.Module], None] | None = None,
    keep: bool = False,
    rounding: Callable[[Tensor, Format, bool], PackedWeight] = PackedWeight.of,
) -> nn.Module:
    """Store the weights of linear layers in few bits, in place. Returns the model.

    `format`: a name (nf4, int8, int4, int3, int2, mxfp4, nvfp4, sketch4, …) or `{"format": "int4", "group_size": 64}`. `targets`: as
    for adapters; "all-linear" leaves the head alone. Weights are rounded to nearest; with `calibrate(model)`, which runs the
    model on some batches and is called PASSES times or more, so that the layers' outputs there change little (GPTQ). `keep`: keep
    the weights as they were for adapters that start from the difference, until `forget(model)`. `rounding(W, format, keep)`: in place of rounding to nearest.
    Raises `TunesmithError` for an unknown format, a layer that is no `nn.Linear`, a model that has adapters, and both ways of rounding at once.
    """
    format = parse(format)
    if calibrate and rounding != PackedWeight.of:
        raise TunesmithError("calibrate rounds so that outputs change little, and rounding as it says; leave one of them out")
    if "_tunesmith" in model.__dict__:
        raise TunesmithError("this model has adapters; quantise it before the first one is attached")
    chosen = {path: site for path, (site, _) in find(model, targets, ("linear",), "quantisation").items()}
    for path, site in chosen.items():
        if site.transposed:
            raise TunesmithError(f"{path!r} is a {type(site.holder).__name__}, which keeps its weight transposed; only nn.Linear can be quantised")
        if isinstance(site.parameter, PackedWeight):
            raise TunesmithError(f"{path!r} is in {site.parameter.format.format} already; quantise the original model")
    done: dict[int, nn.Parameter] = {}  # layers that share a weight go on sharing it
    for part in parts(chosen, PASSES) if calibrate else [chosen]:
        if calibrate:
            score(model, part, calibrate, ("moments",))
        for path, site in part.items():
            key = id(site.parameter)
            if key not in done:
                done[key] = _packed(path, site, format, keep, rounding)
            site.holder._parameters[site.weight] = done[key]
            site.seen = {}
    return _told_ddp(model)


def _told_ddp(model: nn.Module) -> nn.Module:
    """DistributedDataParallel is not to send packed weights around, which every process has read alike."""
    model._ddp_params_and_buffers_to_ignore = list(packed_weights(model))
    return model


@torch.no_grad()
def _packed(path: str, site: Site, format: Format, keep: bool, rounding: Callable) -> nn.Parameter:
    W = site.parameter.detach()
    if not torch.isfinite(W).all():
        raise TunesmithError(f"the weight of {path!r} is not finite and cannot be quantised")
    if site.moments is None:
        packed = rounding(W, format, keep)
    else:
        packed = PackedWeight(format, feedback.encode(W, site.moments, format, order=True), W.shape, W.dtype, W if keep else None)
    return nn.Parameter(packed, requires_grad=False)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by their parameter's path."""
    return {path: p for path, p in model.named_parameters(remove_duplicate=False) if isinstance(p, PackedWeight)}


def dequantize(model: nn.Module) -> nn.Module:
    """Make the packed weights matrices again, in place. Returns the model."""
    plain: dict[int, nn.Parameter] = {}
    for site in sites(model):
        if isinstance(W := site.values.get(site.weight), PackedWeight):
            if id(W) not in plain:
                plain[id(W)] = nn.Parameter(W.dequantize(), requires_grad=False)
            site.holder._parameters[site.weight] = plain[id(W)]
    return _told_ddp(model)


def forget(model: nn.Module) -> nn.Module:
    """Drop the originals that `quantize(keep=True)` kept."""
    for weight in packed_weights(model).values():
        weight.original = None
    return model


def footprint(model: nn.Module) -> dict[str, Any]:
    """What the model's weights take: {"layers", "weights", "bytes", "closed_form", "bits_per_weight"} of the packed ones, "total_bytes" of all."""
    packed = {id(p): p for p in packed_weights(model).values()}
    weights, bytes = sum(p.numel() for p in packed.values()), sum(p.nbytes for p in packed.values())
    return {
        "layers": len(packed),
        "weights": weights,
        "bytes": bytes,
        "closed_form": sum(p.format.bytes(tuple(p.shape)) for p in packed.values()),
        "bits_per_weight": 8 * bytes / weights if weights else None,
        "total_bytes": sum(p.nbytes for p in model.parameters()),
    }


def save(model: nn.Module, folder: Path, original: str | None) -> None:
    """Write the packed weights into an existing folder, and beside them the rest of the model as Hugging Face does.

    `original`: the name of the model that was quantised; None where the weights were trained since.
    """
    packed = packed_weights(model)
    if not packed:
        raise TunesmithError("no weight of this model is quantised; quantise it before saving")
    model.save_pretrained(folder, state_dict={key: t for key, t in model.state_dict().items() if not isinstance(t, PackedWeight)})
    tensors = {f"{path}.{name}": t.detach().cpu().contiguous() for path, p in packed.items() for name, t in p.parts.items()}
    formats = {path: {**p.format.model_dump(exclude_none=True), "shape": list(p.shape)} for path, p in packed.items()}
    write_parts(folder / WEIGHTS, folder / CARD, tensors, {"original": original, "weights": formats})


def is_quantized(folder: str | Path) -> bool:
    return (Path(folder) / CARD).is_file()


def original_of(folder: str | Path) -> str | None:
    """The model that was quantised into `folder`; None where training changed its weights."""
    return json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))["original"]


def restore(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the packed weights of a folder that `save` wrote into a model that was loaded from it.

    Raises `TunesmithError` where the files are damaged or do not fit the model.
    """
    folder = Path(folder)
    card, tensors = read_parts(folder / WEIGHTS, folder / CARD)
    try:
        found = {}
        for path, about in card["weights"].items():
            shape = tuple(about.pop("shape"))
            parts = {key.removeprefix(f"{path}."): t for key, t in tensors.items() if key.startswith(f"{path}.")}
            found[path] = parse(about), parts, shape
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TunesmithError(f"{folder / CARD} is damaged ({error}); quantise the model again") from None
    places = {f"{site.path}.{site.weight}": site for site in sites(model) if site.kind == "linear" and not site.transposed}
    for path, (format, parts, shape) in found.items():
        if path not in places or tuple(places[path].parameter.shape) != shape:
            raise TunesmithError(f"{folder} does not fit this {type(model).__name__}: it has no weight {path!r} of shape {shape}")
        before = places[path].parameter
        places[path].holder._parameters[places[path].weight] = nn.Parameter(PackedWeight(format, parts, shape, before.dtype), requires_grad=False)
    return _told_ddp(model)
