"""Hugging Face peft's adapter files (adapter_config.json, adapter_model.safetensors), read and written.

What is common to all methods is here; each method says which `peft_type` it is, which config fields it has and what
its tensors are called (`Method.to_peft`, `from_peft`, `peft_tensors`, `own_tensors`).
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..engine.model import Record, adapters, attach, check_name, record_of, unwrap
from ..engine.sites import Site, matches, sites
from ..engine.store import fill, pruned_units, read_json, read_tensors, tensors, tensors_of, write
from ..engine.tokens import token_site
from ..errors import TunesmithError
from .method import Method, build, override, registry, values_of

WEIGHTS, CARD = "adapter_model.safetensors", "adapter_config.json"
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS", "ForSequenceClassification": "SEQ_CLS",
}  # fmt: skip


def save_peft(model: nn.Module, folder: str | Path, name: str) -> None:
    """Write one adapter as peft does. Raises `TunesmithError` for a method or site that the format has no words for."""
    root, record = unwrap(model), record_of(model, name)
    if pruned_units(root):
        raise TunesmithError("the peft format knows no pruned models; save this adapter with format='tunesmith', or merge it")
    kinds = {type(config) for config in record.sites.values()}
    if len(kinds) > 1 or record.config.peft_type is None:
        names = ", ".join(sorted({c.method for c in record.sites.values()}))
        raise TunesmithError(f"the peft format cannot hold this adapter ({names}); save it with format='tunesmith'")
    attached, found = adapters(model, name), tensors_of(model, name, once=False)
    values, prefix = {}, _prefix(type(record.config))
    for path, adapter in attached.items():
        own = {key: found[full] for key in tensors(adapter) if (full := f"{path}.{key}".lstrip(".")) in found}
        if path not in record.sites:
            values |= {f"{prefix}{path}.{key}": t for key, t in own.items()}
            continue
        theirs = record.sites[path].peft_tensors(_site_at(root, path), own)
        values |= {f"{prefix}{path}.{key}": t for key, t in theirs.items()} if record.config.peft_by_site else theirs
    values |= {key: t.detach().cpu() for key, t in record.config.peft_shared({path: attached[path] for path in record.sites}).items()}
    task = named = next((t for end, t in TASKS.items() if type(root).__name__.endswith(end)), None)
    if fused := [path for path, config in record.sites.items() if config.peft_by_site and _site_at(root, path).kind == "attention"]:
        raise TunesmithError(f"the peft format cannot hold the adapter at {fused[0]!r}, a projection inside nn.MultiheadAttention; save it with format='tunesmith'")
    modules = record.config.saved_paths(root) or None
    if others := [p for p, _ in root.named_modules() if modules and p.endswith(tuple(modules)) and not any(f"{p}.".startswith(f"{m}.") for m in modules)]:
        raise TunesmithError(f"peft would take {others[0]!r} for one of modules_to_save ({', '.join(modules)}); save this adapter with format='tunesmith'")
    if task in HEADS and not any(m.split(".")[-1] in HEADS[task] for m in modules or []):
        task = None  # peft would expect a trained head in the file
    fields = record.config.to_peft(record.sites, root)
    if task is None and not record.config.peft_by_site:
        wanted = f"; adapt with modules_to_save=[{HEADS[named][0]!r}]" if named in HEADS else ""
        raise TunesmithError(f"peft leaves virtual tokens out of a {type(root).__name__} without the head of a task in the file{wanted}, or save this adapter with format='tunesmith'")
    card = {
        "peft_type": record.config.peft_type,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": str(getattr(getattr(root, "config", None), "_name_or_path", "")),
        "revision": None,
        "inference_mode": True,
        "modules_to_save": modules,
        **fields,
    }
    data = save_tensors({k: v.clone(memory_format=torch.contiguous_format) for k, v in values.items()}, metadata={"format": "pt"})
    write(folder, {WEIGHTS: data, CARD: json.dumps(card, indent=2, sort_keys=True) + "\n"})


def load_peft(model: nn.Module, folder: str | Path, name: str) -> None:
    """Read an adapter that peft wrote. Raises `TunesmithError` where it does not fit the model, key by key."""
    folder, root = Path(folder), unwrap(model)
    check_name(model, name)
    fields = read_json(folder / CARD)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise TunesmithError(f"{folder} holds a pickled adapter_model.bin, which is not opened because pickles can run code; save it again as safetensors")
    cls = next((c for c in registry.values() if c.reads_peft(fields)), None)
    if cls is None:
        known = sorted({c.peft_type for c in registry.values() if c.peft_type})
        raise TunesmithError(f"{folder / CARD}: peft_type {fields.get('peft_type')!r} is not one that tunesmith reads ({', '.join(known)})")
    by_path = {s.path: s for s in sites(root)}
    found = _stripped(read_tensors(folder / WEIGHTS), _prefix(cls), by_path)
    try:
        config, overrides = cls.from_peft(fields, root, found)
        modules = [m for m in fields.get("modules_to_save") or [] if any(matches(m, p) for p, _ in root.named_modules() if p)]
    except TunesmithError as error:
        raise TunesmithError(f"{folder / CARD}: {error}") from None
    except (TypeError, AttributeError, LookupError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise TunesmithError(f"{folder / CARD} is damaged: {error}") from None
    config = config.model_copy(update={"modules_to_save": modules})
    configs = {path: override(config, over) for path, over in overrides.items()}
    for path in configs:
        by_path.setdefault(path, _site_at(root, path))
    built = build(config, root, configs, by_path, tied=False)
    own, plain, seen = {}, dict(found), set()
    for path in configs:
        (site, adapter), start = built[path], f"{path}." if cls.peft_by_site else ""
        mine = {key: t for key, t in found.items() if (key.startswith(start) if start else "." not in key)}
        plain = {key: t for key, t in plain.items() if key not in mine}
        anew = {key: t for key, t in tensors(adapter).items() if not isinstance(t, nn.Parameter) and id(t) not in seen}  # by peft, at loading
        seen |= {id(t) for t in anew.values()}
        named = anew | configs[path].own_tensors(site, {key[len(start) :]: t for key, t in mine.items()})
        own |= {f"{path}.{key}".lstrip("."): t for key, t in named.items()}
    # Whole modules that peft saved though its config does not name them, as it does with resized embeddings.
    more = sorted({path for path in (key.rpartition(".")[0] for key in plain) if path in by_path and path not in built})
    built |= {path: (by_path[path], values_of(by_path[path])) for path in more}
    fill(built, own | plain, str(folder / WEIGHTS))
    config = config.model_copy(update={"modules_to_save": modules + more})
    attach(root, name, Record(config, configs), built)


def _prefix(cls: type[Method]) -> str:
    """What peft puts before a module's path."""
    return "base_model.model." if cls.peft_by_site else "base_model."


def _stripped(found: dict[str, Tensor], prefix: str, by_path: dict[str, Site]) -> dict[str, Tensor]:
    """The tensors by `module path.tensor`, without the base's own, which peft adds to some.

    Raises `TunesmithError` where those are not this model's.
    """
    stripped = {}
    for key, t in found.items():
        key = key.removeprefix(prefix).replace(".modules_to_save.", ".")
        path, _, base = key.partition(".base_layer.")
        if base == "weight" and path in by_path:
            own = by_path[path].parameter
            if own.shape != t.shape or not (own.is_meta or torch.equal(own.cpu(), t.to(own.dtype))):
                raise TunesmithError(f"the peft file was trained with another base weight of {path!r} {tuple(t.shape)} than this model's {tuple(own.shape)}; give the model that weight first")
        elif ".original_module." not in key:
            stripped[f"{path}.{base}" if base else key] = t
    return stripped


def _site_at(model: nn.Module, path: str) -> Site:
    return next((s for s in sites(model) if s.path == path), None) or token_site(model.get_submodule(path), model)
