"""Hugging Face peft's adapter files (adapter_config.json, adapter_model.safetensors), read and written.

What is common to all methods is here; each method says which `peft_type` it is, which config fields it has and what
its tensors are called (`Method.to_peft`, `from_peft`, `peft_tensors`, `own_tensors`).
"""

import json
from pathlib import Path

from safetensors.torch import save as save_tensors
from torch import nn

from ..engine.model import Record, adapters, attach, check_name, record_of, unwrap
from ..engine.sites import Site, matches, sites
from ..engine.store import fill, read_json, read_tensors, tensors, tensors_of, write
from ..engine.tokens import token_site
from ..errors import TunesmithError
from .method import Method, build, override, registry

WEIGHTS, CARD, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS", "ForSequenceClassification": "SEQ_CLS",
}  # fmt: skip


def save_peft(model: nn.Module, folder: str | Path, name: str) -> None:
    """Write one adapter as peft does. Raises `TunesmithError` for a method or site that the format has no words for."""
    root, record = unwrap(model), record_of(model, name)
    kinds = {type(config) for config in record.sites.values()}
    if len(kinds) > 1 or record.config.peft_type is None:
        names = ", ".join(sorted({c.method for c in record.sites.values()}))
        raise TunesmithError(f"the peft format cannot hold this adapter ({names}); save it with format='tunesmith'")
    attached, found = adapters(model, name), tensors_of(model, name)
    values = {}
    for path, adapter in attached.items():
        own = {key: found[full] for key in tensors(adapter) if (full := f"{path}.{key}".lstrip(".")) in found}
        if path in record.sites:
            site = _site_at(root, path, record.sites[path])
            values |= {_key(path, key): t for key, t in record.sites[path].peft_tensors(site, own).items()}
        else:
            values |= {f"{PREFIX}{path}.{key}": t for key, t in own.items()}
    task = next((t for end, t in TASKS.items() if type(root).__name__.endswith(end)), None)
    modules = record.config.saved_paths(root) or None
    if task == "SEQ_CLS" and not modules:
        task = None  # peft would expect a trained head in the file
    card = {
        "peft_type": record.config.peft_type,
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": str(getattr(getattr(root, "config", None), "_name_or_path", "")),
        "revision": None,
        "inference_mode": True,
        "modules_to_save": modules,
        **record.config.to_peft(record.sites, root),
    }
    data = save_tensors({k: v.contiguous() for k, v in values.items()}, metadata={"format": "pt"})
    write(folder, {WEIGHTS: data, CARD: json.dumps(card, indent=2, sort_keys=True) + "\n"})


def load_peft(model: nn.Module, folder: str | Path, name: str) -> None:
    """Read an adapter that peft wrote. Raises `TunesmithError` where it does not fit the model, key by key."""
    folder, root = Path(folder), unwrap(model)
    check_name(model, name)
    fields = read_json(folder / CARD)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise TunesmithError(f"{folder} holds a pickled adapter_model.bin, which is not opened because pickles can run code; save it again as safetensors")
    found = {_strip(key): t for key, t in read_tensors(folder / WEIGHTS).items()}
    cls = next((c for c in registry.values() if c.reads_peft(fields)), None)
    if cls is None:
        known = sorted({c.peft_type for c in registry.values() if c.peft_type})
        raise TunesmithError(f"{folder / CARD}: peft_type {fields.get('peft_type')!r} is not one that tunesmith reads ({', '.join(known)})")
    try:
        config, overrides = cls.from_peft(fields, root, found)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise TunesmithError(f"{folder / CARD} is damaged: {error}") from None
    modules = [m for m in fields.get("modules_to_save") or [] if any(matches(m, p) for p, _ in root.named_modules() if p)]
    config = config.model_copy(update={"modules_to_save": modules})
    by_path = {s.path: s for s in sites(root)}
    configs = {path: override(config, over) for path, over in overrides.items()}
    for path in configs:
        by_path.setdefault(path, _site_at(root, path, config))
    built = build(config, root, configs, by_path)
    own = {}
    for path, (site, adapter) in built.items():
        start = f"{path}."
        if path not in configs:
            own |= {k: t for k, t in found.items() if k.startswith(start) and "." not in k[len(start) :]}
            continue
        mine = {k[len(start) :]: t for k, t in found.items() if k.startswith(start)} if path and config.peft_by_site else found
        named = configs[path].own_tensors(site, mine)
        named |= {key: t for key, t in dict(adapter.named_buffers()).items() if key not in named}  # what peft computes anew at loading
        own |= {f"{path}.{key}".lstrip("."): t for key, t in named.items()}
    fill(built, own, str(folder / WEIGHTS))
    attach(root, name, Record(config, configs), built)


def _site_at(model: nn.Module, path: str, config: Method) -> Site:
    found = {s.path: s for s in sites(model)}
    if path in found:
        return found[path]
    return token_site(model.get_submodule(path), model)


def _key(path: str, key: str) -> str:
    return key if key == "prompt_embeddings" else f"{PREFIX}{path}.{key}"


def _strip(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".default.", ".").replace(".base_layer.", ".")
