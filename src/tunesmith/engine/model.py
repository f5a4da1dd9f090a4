"""Adapters on a whole model: attach, choose, mix, merge, detach. Knows no method by name."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import TunesmithError, nearest
from .adapter import Adapter, Hub, State, Swap, adapted_class, fold
from .lean import unlean
from .sites import Site


@dataclass
class Record:
    """One named adapter: its method's config, the config that holds at each site, and what it was trained on top of."""

    config: Any
    sites: dict[str, Any]
    lineage: list[dict] = field(default_factory=list)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and the like."""
    while "_tunesmith" not in model.__dict__:
        inner = model._modules.get("module", model._modules.get("_orig_mod"))
        if inner is None:
            return model
        model = inner
    return model


def state_of(model: nn.Module) -> State:
    """Raises `TunesmithError` where the model has no adapter."""
    state = unwrap(model).__dict__.get("_tunesmith")
    if state is None:
        raise TunesmithError(f"this {type(model).__name__} has no adapter; attach one with adapt(model, method) or load(model, folder)")
    return state


def record_of(model: nn.Module, name: str) -> Record:
    records = state_of(model).records
    if name not in records:
        raise TunesmithError(f"the model has no adapter named {name!r}{nearest(name, records) or '; it has ' + ', '.join(records)}")
    return records[name]


def modules(root: nn.Module) -> Iterator[nn.Module]:
    """As `root.modules()`, several times as fast: switching adapters walks over the whole model."""
    seen, stack = set(), [root]
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(reversed(module._modules.values()))


def hubs(model: nn.Module) -> dict[str, Hub]:
    """The hubs of an adapted model by site path."""
    return {m.site.path: m for m in modules(unwrap(model)) if isinstance(m, Hub)}


def adapters(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The modules of one named adapter by site path."""
    record_of(model, name)
    return {path: hub.adapters[name] for path, hub in hubs(model).items() if name in hub.adapters}


def by_method(model: nn.Module, name: str) -> list[tuple[Any, dict[str, Adapter]]]:
    """(config, its modules by site path) of each method in one named adapter: most often one, more with per-pattern methods."""
    record, groups = record_of(model, name), {}
    for path, adapter in adapters(model, name).items():
        if path in record.sites:
            groups.setdefault(record.sites[path].method, {})[path] = adapter
    return [(record.config if method == record.config.method else record.sites[next(iter(own))], own) for method, own in groups.items()]


def attach(model: nn.Module, name: str, record: Record, built: dict[str, tuple[Site, Adapter]]) -> None:
    """Put built adapters into the model under a name, and make that name the only active one.

    Raises `TunesmithError` as `check_name` does, or where there is nothing to attach.
    """
    check_name(model, name)
    if not built:
        raise TunesmithError(f"{type(record.config).__name__} has nothing to act on in {type(model).__name__}")
    state = model.__dict__.get("_tunesmith")
    if state is None:
        flags = {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)}
        state = State(flags=flags, encoders=any(isinstance(m, nn.TransformerEncoderLayer) for m in modules(model)))
        model.__dict__["_tunesmith"] = state
        for p in model.parameters():
            p.requires_grad_(False)
    for site, adapter in built.values():
        hub = site.holder._modules.get("tunesmith")
        if hub is None:
            hub = Hub(site, state)
            site.holder.add_module("tunesmith", hub)
            if not hasattr(type(site.owner), "_tunesmith_base"):
                site.owner.__class__ = adapted_class(type(site.owner))
        hub.adapters[name] = adapter.train(site.owner.training)
    state.records[name] = record
    record.lineage = record.lineage or [
        {"name": n, "weight": w, "method": state.records[n].config.method} for n, w in state.merged.items()
    ]
    activate(model, name)


def check_name(model: nn.Module, name: str) -> None:
    """Raises `TunesmithError` for a name that is taken, or that cannot be part of a parameter's path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise TunesmithError(f"an adapter's name is letters, digits, '_' and '-'; {name!r} is not")
    if hasattr(nn.ModuleDict(), name):
        raise TunesmithError(f"an adapter's name cannot be {name!r}, which torch's modules use themselves; choose another name")
    state = unwrap(model).__dict__.get("_tunesmith")
    if state is not None and name in state.records:
        raise TunesmithError(f"the model has an adapter named {name!r} already; choose another name or detach it first")


def guard_fast_path(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer's fused evaluation reads weights past every forward, unless a hook is there.

    It is there exactly while adapters are in use, so that the base alone computes as it always did.
    """
    root, state = unwrap(model), state_of(model)
    if not state.encoders:
        return
    needed = state.enabled and bool(state.rows or state.active.keys() - state.merged.keys())
    for layer in modules(root):
        if isinstance(layer, nn.TransformerEncoderLayer):
            hook = layer.__dict__.pop("_tunesmith_hook", None)
            if hook:
                hook.remove()
            if needed and any(isinstance(m, Hub) for m in modules(layer)):
                layer.__dict__["_tunesmith_hook"] = layer.register_forward_pre_hook(_nothing)


def _nothing(module, args):
    return None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their path in the model."""
    state_of(model)
    found = {path: p for path, p in unwrap(model).named_parameters() if p.requires_grad}
    return {path: p for path, p in found.items() if ".tunesmith." in f".{path}"}


def virtual_tokens(model: nn.Module) -> int:
    """Positions that the adapters in use take before a text's."""
    state = unwrap(model).__dict__.get("_tunesmith")
    used = () if state is None or not state.enabled else state.active if state.rows is None else filter(None, state.rows)
    return max((state.records[name].config.front for name in used), default=0)


def activate(model: nn.Module, names: str | Iterable[str] | Mapping[str, float]) -> None:
    """Choose the adapters in use: a name, several (applied in that order), names with weights, or `[]` for none.

    With weight w an adapter's effect is below + w·(adapted − below). Only what is active can be trained.
    Raises `TunesmithError` for an unknown or merged name, for two prompts or prefixes at once, and for an adapter that stands for
    the whole weight (PEQA, SketchTune) over another, which would have no effect.
    """
    state = state_of(model)
    weights = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name in weights:
        record_of(model, name)
        if name in state.merged:
            raise TunesmithError(f"adapter {name!r} is merged into the weights; unmerge first")
    places = hubs(model).values()
    fronts = [name for name in weights if any(h.site.kind == "tokens" and name in h.adapters for h in places)]
    if len(fronts) > 1 or any(weights[name] != 1 for name in fronts):
        raise TunesmithError(f"virtual tokens are in front of the input or not: {' and '.join(map(repr, fronts))} cannot be weighted or combined with each other")
    for hub in places:
        below = [name for name in state.merged if name in hub.adapters]
        for name in weights:
            if name in hub.adapters:
                known = [each["name"] for each in state.records[name].lineage]
                if hub.adapters[name].replaces and weights[name] == 1 and (lost := [other for other in below if other not in known]):
                    raise TunesmithError(f"adapter {name!r} stands for the whole weight of {hub.site.path!r}, where {lost[0]!r} would have no effect below it; put it first")
                below.append(name)
    state.active = {name: float(weight) for name, weight in weights.items()}
    set_trained(places, set(state.active))
    guard_fast_path(model)


def set_trained(places: Iterable[Hub], names: set[str], only: bool = True) -> None:
    shared: dict[int, tuple[nn.Parameter, bool]] = {}
    for hub in places:
        for name, adapter in hub.adapters.items():
            for p in adapter.parameters():
                shared[id(p)] = (p, name in names or shared.get(id(p), (p, False))[1])
    for p, wanted in shared.values():
        if (only or wanted) and p.is_floating_point():
            p.requires_grad_(wanted)


@contextmanager
def disabled(model: nn.Module):
    """Within the block, the model is its base, bit for bit (merged weights are put aside too)."""
    state = state_of(model)
    before, state.enabled = state.enabled, False
    with unmerged(model):
        guard_fast_path(model)
        try:
            yield model
        finally:
            state.enabled = before
    guard_fast_path(model)


@contextmanager
def unmerged(model: nn.Module):
    """Within the block, merged weights are put aside."""
    state = unwrap(model).__dict__.get("_tunesmith")
    if state is None or state.aside:
        yield model
        return
    _swap_all(model, reverse=True)
    state.aside = True
    try:
        yield model
    finally:
        state.aside = False
        _swap_all(model)


def _swap_all(model: nn.Module, reverse: bool = False) -> None:
    for hub in hubs(model).values():
        for swap in reversed(hub.swaps) if reverse else hub.swaps:
            swap()


def merge(model: nn.Module, unload: bool = False) -> nn.Module:
    """Fold the active adapters into the weights. `unload=True` keeps the merged model and drops all else.

    A weight shared with another module (tied embeddings) is untied where the two change differently: each has its own value.
    Raises `TunesmithError`, with nothing changed, when an active adapter has no merged form, and within `disabled`.
    """
    state = state_of(model)
    if state.aside:
        raise TunesmithError("the adapters are disabled here; merge outside of the `with disabled(model)` block")
    names = [n for n in state.active if n not in state.merged]
    todo, uses = [], Counter(id(p) for m in modules(unwrap(model)) for p in m._parameters.values())
    for path, hub in hubs(model).items():
        own = {name: hub.adapters[name] for name in names if name in hub.adapters}
        if stuck := [name for name, adapter in own.items() if not adapter.mergeable]:
            raise TunesmithError(f"adapter {stuck[0]!r} ({state.records[stuck[0]].config.method}) cannot be merged: at {path!r} {own[stuck[0]].why_not}")
        if own:
            todo.append((hub, {adapter: state.active[name] for name, adapter in own.items()}))
    tied: dict[int, nn.Parameter] = {}  # base parameter -> its new value
    with torch.no_grad():
        new = [None if _scattered(hub, own, uses) else _folded(hub, own) for hub, own in todo]  # all before any is put in place
    for (hub, own), values in zip(todo, new, strict=True):
        if values is None:
            for adapter, weight in own.items():
                _scatter(hub, adapter, weight)
            continue
        for name, value in values.items():
            twin = tied.setdefault(id(hub.site.values[name]), value)
            _swap(hub, name, twin if torch.equal(twin, value) else value)
    state.merged |= {name: state.active[name] for name in names}
    guard_fast_path(model)
    if unload:
        for hub in hubs(model).values():
            hub.swaps = []
        state.merged = {}
        detach(model)
        _keep_untied(unwrap(model))
    return model


def _scattered(hub: Hub, own: dict[Adapter, float], uses: Counter) -> bool:
    """Whether adapters can be merged by changing some entries of the weight in place."""
    W = hub.site.values.get(hub.site.weight)
    return W is not None and uses[id(W)] == 1 and not is_traceable_wrapper_subclass(W) and all(adapter.scattered for adapter in own)


def _scatter(hub: Hub, adapter: Adapter, weight: float) -> None:
    W = hub.site.matrix(hub.site.values)[0].detach()
    before, after = adapter.change(W)
    if weight != 1:
        after.values = torch.lerp(before.values.to(after.values.dtype), after.values, weight)
    after.put(W)
    hub.swaps.append(Swap(hub.site, hub.site.weight, before))


def _folded(hub: Hub, own: dict[Adapter, float]) -> dict[str, nn.Parameter]:
    """The site's parameters that adapters change, changed."""
    before = values = hub.site.values
    for adapter, weight in own.items():
        values = fold(adapter, hub.site, values, weight)
    return {n: nn.Parameter(v.detach().to(before[n].dtype).clone(), requires_grad=False) for n, v in values.items() if v is not before[n]}


def _swap(hub: Hub, name: str, other) -> None:
    hub.swaps.append(Swap(hub.site, name, other))
    hub.swaps[-1]()


def _keep_untied(model: nn.Module) -> None:
    """Where a merge gave a Hugging Face model's embedding and head different weights, its config must not tie them again."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """The base's weights as they were before `merge`, bit for bit."""
    state = state_of(model)
    for hub in hubs(model).values():
        for swap in reversed(hub.swaps if not state.aside else []):
            swap.undo()
        hub.swaps = []
    state.merged = {}
    guard_fast_path(model)
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take off one adapter, or all: then the model is what it was before the first `adapt`, bit for bit."""
    root, state = unwrap(model), state_of(model)
    gone = list(state.records) if name is None else [name]
    for each in gone:
        record_of(model, each)
    if state.merged.keys() & set(gone):
        unmerge(model)
    for hub in hubs(model).values():
        for each in gone:
            if each in hub.adapters:
                del hub.adapters[each]
        if not hub.adapters and not hub.swaps:
            _remove(hub)
    for each in gone:
        del state.records[each]
        state.active.pop(each, None)
    guard_fast_path(model)
    if not state.records:
        for path, p in root.named_parameters(remove_duplicate=False):
            p.requires_grad_(state.flags.get(path, p.requires_grad))
        unlean(root)
        del root.__dict__["_tunesmith"]
    return model


def _remove(hub: Hub) -> None:
    site = hub.site
    del site.holder._modules["tunesmith"]
    inside = (site.owner, site.owner.out_proj) if isinstance(site.owner, nn.MultiheadAttention) else (site.owner,)
    if not any("tunesmith" in m._modules for m in inside):
        site.owner.__class__ = type(site.owner)._tunesmith_base


def check_gradients(model: nn.Module) -> list[str]:
    """Sites whose active adapters got no gradient at all from the last backward (empty when all did)."""
    state = state_of(model)
    lost = []
    for path, hub in hubs(model).items():
        for name in state.active:
            if name in hub.adapters:
                trained = [p for p in hub.adapters[name].parameters() if p.requires_grad]
                if trained and all(p.grad is None for p in trained):
                    lost.append(path)
    return lost
