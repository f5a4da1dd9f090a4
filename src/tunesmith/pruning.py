"""Models without some of their attention heads and feed-forward channels: cutting, saving and loading them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .engine.sites import Site, sites
from .engine.store import CARD as ADAPTER
from .engine.store import pruned_blocks, pruned_units, read_json, read_parts, write_parts
from .errors import TunesmithError, nearest
from .methods.select import HEADS, Coupled, coupled

CARD, WEIGHTS = "pruned.json", "pruned.safetensors"
COUNTS = {"heads": (*HEADS, "num_key_value_heads", "all_head_size", "split_size"), "channels": ("intermediate_size",)}  # a module's own numbers that follow its units

Units = Mapping[str, list[int]]
"""Path of the layer that reads a block's units → the numbers of the units that are kept, ascending."""


def prunable(model: nn.Module) -> dict[str, Coupled]:
    """The attentions and feed-forward blocks that can lose units, by the path of the layer that reads them.

    In these nothing but the layers themselves tells the units apart or shares their weights.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = [c for c in coupled(model) if c.free and all(s.kind == "linear" for s in (c.outer, *c.inner))]
    return {c.outer.path: c for c in found if all(uses[id(p)] == 1 for s in (c.outer, *c.inner) for p in s.values.values())}


@torch.no_grad()
def prune(model: nn.Module, keep: Units | str | Path) -> nn.Module:
    """Cut attention heads and feed-forward channels out of a model, in place and for good. Returns the model.

    `keep`: for some blocks the units they keep, by the path of the layer that reads them (`encoder.layer.0.output.dense`), or
    the folder of an adapter that was trained on a pruned model. A unit of an attention is a key-value head with its query heads.
    Raises `TunesmithError`, with nothing changed, for a block that is not there or cannot lose units, units that it does not
    have, and a model that has adapters.
    """
    if "_tunesmith" in model.__dict__:
        raise TunesmithError("this model has adapters; prune it before the first one is attached")
    if isinstance(keep, str | Path):
        keep = left(model, read_json(Path(keep) / ADAPTER).get("pruned", {}))
    blocks = prunable(model)
    for path, units in keep.items():
        if path not in blocks:
            raise TunesmithError(f"{type(model).__name__} has no block that ends at {path!r} and can lose units{nearest(path, blocks)}")
        if not units or sorted(set(units)) != list(units) or not 0 <= units[0] <= units[-1] < blocks[path].units:
            raise TunesmithError(f"{path!r} reads {blocks[path].units} {blocks[path].kind}; what is kept are numbers from 0 to {blocks[path].units - 1}, ascending, and one at least")
    remaining = whole(model, keep)
    for path, units in keep.items():
        c, kept = blocks[path], torch.tensor(units)
        for site in c.inner:
            _keep(site, 0, c.rows(site)[kept].flatten().sort().values)
        _keep(c.outer, 1, c.columns()[kept].flatten())
        for module in {model.get_submodule(site.path.rpartition(".")[0]) for site in (c.outer, *c.inner)}:
            for name in COUNTS[c.kind]:
                if isinstance(size := module.__dict__.get(name), int):
                    setattr(module, name, size * len(units) // c.units)
    model._tunesmith_blocks = pruned_blocks(model) | {path: (blocks[path].kind, [s.path for s in blocks[path].inner]) for path in keep}
    model._tunesmith_pruned = remaining
    return model


def left(model: nn.Module, units: Units) -> Units:
    """Units of the whole model, as files number them, in the numbers of those that a model has, which may have lost some."""
    before = pruned_units(model)
    if gone := [path for path in units if path in before and not set(units[path]) <= set(before[path])]:
        raise TunesmithError(f"this model has lost units that {gone[0]!r} is to keep; load the whole model")
    return {path: [before[path].index(i) for i in kept] if path in before else kept for path, kept in units.items()}


def whole(model: nn.Module, units: Units) -> Units:
    """The inverse of `left`."""
    before = pruned_units(model)
    return before | {path: [before[path][i] for i in kept] if path in before else list(kept) for path, kept in units.items()}


def _keep(site: Site, dim: int, index: torch.Tensor) -> None:
    """Keep some outputs (0) or inputs (1) of a linear layer."""
    W, b = site.matrix(site.values)
    index = index.to(W.device)
    values = {site.weight: W.index_select(dim, index)}
    if site.transposed:
        values[site.weight] = values[site.weight].T
    if b is not None and dim == 0:
        values[site.bias] = b[index]
    for name, value in values.items():
        site.holder._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=site.holder._parameters[name].requires_grad)
    for name in ("out_features", "nf") if dim == 0 else ("in_features", "nx"):
        if name in site.holder.__dict__:
            setattr(site.holder, name, len(index))


def save(model: nn.Module, folder: Path, original: str) -> None:
    """Write a pruned model into an existing folder: what is whole as Hugging Face does, and beside it the weights of the blocks that are not.

    `original`: the name of the model that was pruned.
    """
    cut = {f"{s.path}.{name}": p.detach().cpu().contiguous() for path, c in prunable(model).items() if path in pruned_units(model) for s in (c.outer, *c.inner) for name, p in s.values.items()}
    model.save_pretrained(folder, state_dict={key: t for key, t in model.state_dict().items() if key not in cut})
    write_parts(folder / WEIGHTS, folder / CARD, cut, {"original": original, "units": pruned_units(model)})


def is_pruned(folder: str | Path) -> bool:
    return (Path(folder) / CARD).is_file()


@torch.no_grad()
def restore(model: nn.Module, folder: str | Path) -> nn.Module:
    """Prune a model that was loaded from a folder that `save` wrote, and fill the blocks. Raises `TunesmithError` where the files are damaged or do not fit."""
    folder = Path(folder)
    card, found = read_parts(folder / WEIGHTS, folder / CARD)
    if "units" not in card:
        raise TunesmithError(f"{folder / CARD} is damaged: it names no units; merge the run again")
    prune(model, card["units"])
    places = {f"{s.path}.{name}": p for s in sites(model) for name, p in s.values.items()}
    for key, value in found.items():
        if key not in places or places[key].shape != value.shape:
            raise TunesmithError(f"{folder} does not fit this {type(model).__name__}: it has no {key!r} of shape {tuple(value.shape)}")
        places[key].copy_(value)
    return model


def described(model: nn.Module) -> str:
    """A line about what is left of a pruned model."""
    kept = pruned_units(model)
    left = {kind: sum(c.units for path, c in prunable(model).items() if path in kept and c.kind == kind) for kind in ("heads", "channels")}
    return f"{left['heads']:,} heads and {left['channels']:,} channels are left of the blocks that were pruned; the whole model has {sum(p.numel() for p in model.parameters()):,} parameters"
