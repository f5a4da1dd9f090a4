"""Saving and loading adapters, in tunesmith's own format or Hugging Face peft's."""

from pathlib import Path
from typing import Literal

from torch import nn

from .. import __version__
from ..engine import store
from ..engine.model import Record, attach, check_name, state_of, unwrap
from ..engine.sites import sites
from ..errors import TunesmithError, nearest
from .method import build, parse
from .peft_format import CARD as PEFT_CARD
from .peft_format import _site_at, load_peft, save_peft


def save(model: nn.Module, folder: str | Path, name: str = "default", format: Literal["tunesmith", "peft"] = "tunesmith") -> None:
    """Write the adapter `name` into `folder`, which appears whole or not at all. On a sharded model every process calls it.

    Raises `TunesmithError` for an unknown name or format, a method the peft format cannot hold, or a full disk.
    """
    if format == "tunesmith":
        store.save(model, folder, name, __version__)
    elif format == "peft":
        save_peft(model, folder, name)
    else:
        raise TunesmithError(f"unknown adapter format {format!r}; there are 'tunesmith' and 'peft'")


def load(model: nn.Module, folder: str | Path, name: str | None = None, force: bool = False) -> nn.Module:
    """Attach a saved adapter of either format and make it the active one. Returns the model.

    `name`: what to call it here (default: as it was saved; `default` for peft files). `force`: accept an adapter
    whose base has other weights or that was trained on top of adapters not present here.
    Raises `TunesmithError`, with the model unchanged, where the files are damaged or do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TunesmithError(f"there is no adapter folder {folder}")
    if (folder / store.CARD).exists():
        _load_own(model, folder, name, force)
    elif (folder / PEFT_CARD).exists():
        load_peft(model, folder, name or "default")
    else:
        inside = sorted(p.name for p in folder.iterdir() if (p / store.CARD).exists() or (p / PEFT_CARD).exists())
        hint = f"; there are adapters in its sub-folders {', '.join(inside)}" if inside else ""
        raise TunesmithError(f"{folder} holds no adapter: neither {store.CARD} nor {PEFT_CARD} is there{hint}")
    return model


def _load_own(model: nn.Module, folder: Path, name: str | None, force: bool) -> None:
    root = unwrap(model)
    card, found = store.read(folder)
    try:
        config = parse(card["method"])
        configs = {path: parse(own) if own else config for path, own in card["sites"].items()}
        lineage, name = list(card["lineage"]), name or card["name"]
        store.check_base(root, card, force)
        check_name(root, name)
        _check_lineage(root, lineage, force)
    except (KeyError, TypeError, AttributeError) as error:
        raise TunesmithError(f"{folder / store.CARD} is damaged: {error!r}") from None
    by_path = {s.path: s for s in sites(root)}
    modules = {path for path, _ in root.named_modules()}
    for path, each in configs.items():
        if path not in by_path:
            if path not in modules or "tokens" not in each.works_on or path not in each.select(root):
                raise TunesmithError(f"the adapter in {folder} acts on {path!r}, which {store.base_class(root)} does not have{nearest(path, by_path)}")
            by_path[path] = _site_at(root, path)
        if by_path[path].kind not in each.works_on:
            raise TunesmithError(f"the adapter in {folder} acts on {path!r}, which is a {by_path[path].kind} layer here; {each.method} cannot")
        if (count := each.count(by_path[path])) > sum(t.numel() for t in found.values()):
            raise TunesmithError(f"the adapter in {folder} does not hold what its card says: {each.method} at {path!r} is {count:,} numbers")
    built = build(config, root, configs, by_path)
    store.fill(built, found, str(folder / store.WEIGHTS))
    attach(root, name, Record(config, configs, lineage), built)


def _check_lineage(model: nn.Module, lineage: list[dict], force: bool) -> None:
    merged = state_of(model).merged if "_tunesmith" in model.__dict__ else {}
    lacking = [entry["name"] for entry in lineage if entry["name"] not in merged]
    if lacking and not force:
        raise TunesmithError(f"this adapter was trained on top of adapter {lacking[0]!r} merged into the base; load and merge {lacking[0]!r} first, or force it")
