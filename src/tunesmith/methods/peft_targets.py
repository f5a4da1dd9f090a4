"""How Hugging Face peft chooses layers: exclusions, then a regex or suffixes, then layer numbers, then patterns."""

import re
from collections.abc import Iterable

from torch import nn

from ..engine.sites import head_paths, sites
from ..errors import TunesmithError


def target_paths(fields: dict, model: nn.Module, kinds: tuple[str, ...]) -> set[str]:
    """The module paths that peft's targeting rules choose (exclude, then regex or suffixes, then layers)."""
    wanted, excluded = fields.get("target_modules"), fields.get("exclude_modules") or []
    saved = fields.get("modules_to_save") or []
    heads = set(head_paths(model))
    chosen = set()
    for site in sites(model):
        path = site.path
        if site.kind not in kinds:
            continue
        if re.fullmatch(excluded, path) if isinstance(excluded, str) else any(_suffix(e, path) for e in excluded):
            continue
        if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in saved):
            continue
        if isinstance(wanted, str):
            hit = site.kind == "linear" and path not in heads if wanted.lower() == "all-linear" else re.fullmatch(wanted, path)
        else:  # layer numbers narrow suffixes down, not whole paths
            hit = path in wanted or (any(_suffix(t, path) for t in wanted) and _in_layers(fields, path))
        if hit:
            chosen.add(path)
    return chosen


def _suffix(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def _in_layers(fields: dict, path: str) -> bool:
    layers = fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = fields.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    number = next((m.group(1) for form in forms if (m := re.match(form, path))), None)
    return number is not None and int(number) in ([layers] if isinstance(layers, int) else layers)


def patterned(patterns: dict | None, path: str, otherwise):
    """The value of the first pattern that matches the path's end, as peft looks ranks and alphas up."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def exactly(paths: Iterable[str], model: nn.Module) -> list[str] | str:
    """What peft is to be told so that it chooses these modules alone: their paths, or a regex where paths are ends of others."""
    paths = sorted(paths)
    if any(name.endswith(tuple(paths)) and name not in paths for name, _ in model.named_modules()):
        return "|".join(map(re.escape, paths))
    return paths


def patterns(values: dict[str, int | float], otherwise) -> dict[str, int | float]:
    """The pattern → value mapping that gives each path its own value, where that is not `otherwise`."""
    plain = {path: value for path, value in sorted(values.items()) if value != otherwise}
    if all(patterned(plain, path, otherwise) == value for path, value in values.items()):
        return plain
    return {"^" + re.escape(path): value for path, value in plain.items()}


def check_paths(fields: dict, model: nn.Module, kinds: tuple[str, ...], found: set[str]) -> None:
    """Raises `TunesmithError` where the file lacks a targeted layer, or holds one that is no target."""
    where = "target_modules"
    if fields.get(where) is None:
        return  # peft then looks up the model's type in a table
    expected = target_paths(fields, model, kinds)
    if lacking := sorted(expected - found):
        raise TunesmithError(f"the peft file has no tensors for {lacking[0]!r}" + (f" and {len(lacking) - 1} more targeted layers" if lacking[1:] else "") + f", which its config targets ({where})")
    if extra := sorted(found - expected):
        raise TunesmithError(f"the peft file has tensors for {extra[0]!r}, which is not a layer that its config targets in this model ({where})")
