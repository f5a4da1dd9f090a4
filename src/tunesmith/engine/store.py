"""Adapter files: `adapter.safetensors` with the tensors and `adapter.json` with everything needed to rebuild them."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..errors import TunesmithError, nearest
from ..files import atomic_folder
from .adapter import Adapter
from .model import adapters, record_of, unmerged, unwrap
from .pack import pack, packable, unpack
from .sites import Site

FORMAT = 1
WEIGHTS, CARD = "adapter.safetensors", "adapter.json"


def tensors_of(model: nn.Module, name: str, once: bool = True) -> dict[str, Tensor]:
    """The adapter's tensors by `site path.tensor name`, shared ones `once`, gathered where they are sharded.

    Raises `TunesmithError` for a tensor of size zero, which is a shard that was never gathered.
    """
    found, seen = {}, set()
    for path, adapter in adapters(model, name).items():
        for key, tensor in tensors(adapter).items():
            if once and id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if not full.numel() and not adapter.grows:
                raise TunesmithError(f"tensor {key!r} of adapter {name!r} at {path!r} is empty: the model is sharded; gather its parameters before saving")
            found[f"{path}.{key}".lstrip(".")] = full.detach().cpu().contiguous()
    return found


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Parameters and persistent buffers of one adapter by name."""
    return dict(adapter.named_parameters()) | {n: b for n, b in adapter.named_buffers() if n in adapter.state_dict()}


def fingerprint(model: nn.Module, without: set[str] = frozenset()) -> dict[str, str]:
    """Hashes of the base: `structure` of names and shapes, `content` of a sample of values (the same in bf16 and fp32).

    `without`: site paths whose own parameters are left out, such as a new head.
    """
    structure, content = hashlib.sha256(), hashlib.sha256()
    with unmerged(model):
        for path, p in unwrap(model).named_parameters():
            if ".tunesmith." in f".{path}" or path.rpartition(".")[0] in without:
                continue
            p = p.full_tensor() if hasattr(p, "full_tensor") else p
            structure.update(f"{path}{tuple(p.shape)}".encode())
            if not p.is_meta and p.numel():
                sample = p.detach().flatten()[:: max(1, p.numel() // 64)][:64]
                content.update(zlib.crc32(sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()).to_bytes(4, "big"))
    return {"structure": structure.hexdigest()[:16], "content": content.hexdigest()[:16]}


def pruned_units(model: nn.Module) -> dict[str, list[int]]:
    """What is left of the units of a pruned model's blocks, by the path of the layer that reads them."""
    return dict(unwrap(model).__dict__.get("_tunesmith_pruned", {}))


def pruned_blocks(model: nn.Module) -> dict[str, tuple[str, list[str]]]:
    """(heads or channels, the paths of the layers that make them) of a pruned model's blocks, by the path of the layer that reads them."""
    return dict(unwrap(model).__dict__.get("_tunesmith_blocks", {}))


def save(model: nn.Module, folder: str | Path, name: str, version: str) -> None:
    """Write one adapter as a folder that appears whole or not at all."""
    record = record_of(model, name)
    found = tensors_of(model, name)
    packed = {key: pack(t) for key, t in found.items() if packable(t)}
    data = save_tensors(found | packed, metadata={"format": "pt"})
    saved = {path for path in adapters(model, name) if path not in record.sites}
    card = {
        "format": FORMAT,
        "tunesmith": version,
        "name": name,
        "method": record.config.dump(),
        "sites": {path: {} if config is record.config else config.dump() for path, config in record.sites.items()},
        "modules_to_save": sorted(saved),
        "base": {"class": base_class(model), "name": str(getattr(getattr(unwrap(model), "config", None), "_name_or_path", "")), **fingerprint(model, saved)},
        "tensors": {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in found.items()},
        "packed": sorted(packed),
        "sha256": hashlib.sha256(data).hexdigest(),
        "lineage": record.lineage,
        "pruned": pruned_units(model),
    }
    card["checksum"] = checksum(card)
    write(folder, {WEIGHTS: data, CARD: json.dumps(card, indent=1) + "\n"})


def base_class(model: nn.Module) -> str:
    cls = type(unwrap(model))
    return getattr(cls, "_tunesmith_base", cls).__name__


def checksum(card: dict) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in card.items() if k != "checksum"}, sort_keys=True).encode()).hexdigest()


def write(folder: str | Path, contents: dict[str, bytes | str]) -> None:
    """A folder of files, written by the first process of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    with atomic_folder(folder) as new:
        for file, content in contents.items():
            (new / file).write_bytes(content.encode() if isinstance(content, str) else content)


def write_parts(weights: Path, card: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Tensors and a JSON card with `facts` and their checksum, beside the files of a model in Hugging Face's format."""
    data = save_tensors(tensors, metadata={"format": "pt"})
    weights.write_bytes(data)
    card.write_text(json.dumps({"format": FORMAT, **facts, "sha256": hashlib.sha256(data).hexdigest()}, indent=1) + "\n", encoding="utf-8")


def read_parts(weights: Path, card: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_parts` wrote. Raises `TunesmithError` for files that are missing or damaged."""
    facts = read_json(card)
    return facts, _verified(weights, facts.get("sha256"))


def _verified(path: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of a file whose bytes have this hash."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TunesmithError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise TunesmithError(f"{path} is damaged (truncated or changed: its checksum does not fit); copy the folder again")
    return read_tensors(path, data)


def read_json(path: Path) -> dict[str, Any]:
    """Raises `TunesmithError` for a file that is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise TunesmithError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TunesmithError(f"{path} is damaged: it is not JSON; copy the adapter folder again") from None
    if not isinstance(value, dict):
        raise TunesmithError(f"{path} is not an adapter's JSON object")
    return value


def read_tensors(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Raises `TunesmithError` for a file that is missing, truncated or not safetensors."""
    try:
        return load_tensors(path.read_bytes() if data is None else data)
    except OSError as error:
        raise TunesmithError(f"cannot read {path}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise TunesmithError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); copy the adapter folder again") from None


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and tensors of a saved adapter, with both checksums verified."""
    folder = Path(folder)
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        raise TunesmithError(f"{folder / CARD} has adapter format {card.get('format')!r}; this version reads format {FORMAT}")
    if card.get("checksum") != checksum(card):
        raise TunesmithError(f"{folder / CARD} is damaged or was edited by hand: its checksum does not fit; save the adapter again")
    path = folder / WEIGHTS
    found = _verified(path, card.get("sha256"))
    try:
        return card, found | {key: unpack(found[key]) for key in card.get("packed", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise TunesmithError(f"{path} is damaged ({error}); copy the adapter folder again") from None


def check_base(model: nn.Module, card: dict, force: bool) -> None:
    """Raises `TunesmithError` where the adapter was trained on another base, unless `force`."""
    if force:
        return
    if (pruned := card.get("pruned", {})) != pruned_units(model):
        what = "a model without some heads and channels; call prune(model, folder) first" if pruned else "the whole model, not for one that was pruned; load the model anew"
        raise TunesmithError(f"the adapter is for {what}")
    now, then = fingerprint(model, set(card["modules_to_save"])), card["base"]
    if now["structure"] != then["structure"]:
        raise TunesmithError(f"the adapter is for another base: {then['class']} {then['name']!r} with other layers than this {base_class(model)}; load that model, or force it")
    if now["content"] != then["content"] and not any(p.is_meta for p in unwrap(model).parameters()):
        raise TunesmithError(f"the adapter was trained on other weights of {then['class']} ({then['name']!r}) than this model has; load that model, or force it")


def fill(built: dict[str, tuple[Site, Adapter]], found: dict[str, Tensor], where: str) -> None:
    """Put loaded tensors into newly built adapters, all or none.

    Raises `TunesmithError` naming missing, unexpected and misshaped keys with their nearest names.
    """
    shared: dict[int, list] = {}  # tensor -> every place it is at; the file names it by one of them
    for path, (_, adapter) in built.items():
        for key, tensor in tensors(adapter).items():
            shared.setdefault(id(tensor), []).append((f"{path}.{key}".lstrip("."), adapter, key, tensor))
    wanted = {next((key for key, *_ in places if key in found), places[0][0]): places for places in shared.values()}
    problems = [f"missing {key!r}{nearest(key, found.keys() - wanted.keys(), 1)}" for key in wanted if key not in found]
    problems += [f"unexpected {key!r}{nearest(key, wanted.keys() - found.keys(), 1)}" for key in found if key not in wanted]
    for key, [(_, adapter, name, t), *_] in wanted.items():
        if key in found and found[key].shape != t.shape:
            problems.append(f"{key!r} has shape {tuple(found[key].shape)}, the model needs {tuple(t.shape)}")
        elif key in found and found[key].is_floating_point() != t.is_floating_point():
            problems.append(f"{key!r} is {found[key].dtype}, the model needs {t.dtype}")
        elif key in found and (limit := adapter.limits.get(name)) and found[key].numel() and not (0 <= found[key].min() and found[key].max() < limit):
            problems.append(f"{key!r} points outside of the layer, which has positions 0 to {limit - 1:,}")
    if problems:
        problems = [p if len(p) < 300 else p[:300] + " …" for p in problems]
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise TunesmithError(f"{where} does not fit this model: {'; '.join(problems[:4])}{more}")
    for key, places in wanted.items():
        tensor = places[0][-1]
        value = found[key].to(tensor.dtype)
        if tensor.is_meta:
            new = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
            for _, adapter, name, _ in places:
                owner = adapter.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], new)
        else:
            with torch.no_grad():
                tensor.copy_(value)
