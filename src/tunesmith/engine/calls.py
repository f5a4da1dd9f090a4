"""What a forward is told beside its inputs (which row runs what), and the losses that adapters add to the model's own."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import TunesmithError
from .model import by_method, guard_fast_path, hubs, record_of, set_trained, state_of
from .sites import Site, backbone

AT_ONCE = 2**30  # numbers in the moments that are gathered in one pass over the calibration data


@contextmanager
def mixed(model: nn.Module, rows: list[str | None]):
    """Within the block, row i of every batch runs under the adapter `rows[i]` (None: the base). Also trains.

    Inputs may have k·len(rows) rows (beams, flattened tokens); row i then stands for k of them in a row.
    """
    state = state_of(model)
    for name in {name for name in rows if name is not None}:
        record_of(model, name)
    _check_batch_first(model)
    if state.merged:
        raise TunesmithError(f"a mixed batch needs the base's own weights; unmerge {', '.join(state.merged)} first")
    set_trained(hubs(model).values(), set(rows) - {None}, only=False)
    before, state.rows = state.rows, list(rows)
    guard_fast_path(model)
    try:
        yield model
    finally:
        state.rows = before
        guard_fast_path(model)


@contextmanager
def tasks(model: nn.Module, ids: Sequence[int] | Tensor):
    """Within the block, row i of every batch is of the task `ids[i]`, for methods that route by task.

    As with `mixed`, inputs may have k·len(ids) rows.
    """
    state = state_of(model)
    _check_batch_first(model)
    before, state.tasks = state.tasks, torch.as_tensor(ids, dtype=torch.long, device="cpu")  # layers read them
    try:
        yield model
    finally:
        state.tasks = before


def _check_batch_first(model: nn.Module) -> None:
    """Rows are told apart by the first dimension, which another may not be by accident."""
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise TunesmithError("the layers of XLNet have the batch second, and rows of it cannot run different adapters; use one adapter for all rows")


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The sum of what the active adapters add to the loss after a forward (sparsity, balance of experts), or None."""
    state = state_of(model)
    names = state.active if state.rows is None else dict.fromkeys(name for name in state.rows if name is not None)
    terms = [config.auxiliary_loss(own) for name in names for config, own in by_method(model, name)]
    known = [term for term in terms if term is not None]
    return torch.stack([term.to(known[0].device) for term in known]).sum() if known else None


def parts(sites: dict[str, Site], passes: int = 1) -> list[dict[str, Site]]:
    """The sites in the model's order, in so many parts or as many as their moments need."""
    found, size, most = [{}], 0, min(AT_ONCE, sum(site.in_features**2 for site in sites.values()) / passes)
    for path, site in sites.items():
        size += site.in_features**2
        if found[-1] and size > most:
            found.append({})
            size = site.in_features**2
        found[-1][path] = site
    return found


def score(model: nn.Module, sites: dict[str, Site], backward: Callable[[nn.Module], None], statistics: Sequence[str] = ("gradient",)) -> None:
    """Fill each site's `seen` with `statistics` of what `backward(model)` runs: forward and backward on some batches.

    `gradient`: of each parameter, summed over the backwards; `squares`: of those gradients, summed alike; `inputs`: the
    mean magnitude of each of a linear layer's inputs; `moments`: their products, the mean of x xᵀ. The last two need no
    backward, and leave out what the model's `attention_mask` (rows, tokens) does. The model's own flags and gradients are as before afterwards.
    Raises `TunesmithError` where a layer got no gradient, or one that is not finite.
    """
    parameters = {id(p): p for site in sites.values() for p in site.values.values()}
    others = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    sums: dict[str, dict[int | str, Tensor]] = {name: {} for name in (*statistics, "rows")}
    hooks = []

    def add(name: str, key: int, value: Tensor) -> None:
        sums[name][key] = sums[name][key].add_(value) if key in sums[name] else value

    def after(p: Tensor) -> None:
        g, p.grad = p.grad.to(torch.promote_types(p.dtype, torch.float32)), None
        if "squares" in sums:
            add("squares", id(p), g.square())
        if "gradient" in sums:
            add("gradient", id(p), g)

    seen: list[Tensor | None] = [None]

    def look(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        seen[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def before(path: str):
        def hook(module, args, kwargs):
            (x,) = args or kwargs.values()
            padded = seen[0] is not None and x.dim() > 2 and x.shape[:2] == seen[0].shape
            x = x.detach()[seen[0].to(x.device)] if padded else x.detach().reshape(-1, x.shape[-1])
            add("rows", path, x.new_tensor(len(x), dtype=torch.float64))
            if "inputs" in sums:
                add("inputs", path, x.abs().sum(0, dtype=torch.float64))
            if "moments" in sums:
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                add("moments", path, (x.T @ x).double())

        return hook

    try:
        for p, _, _ in others:
            p.requires_grad_(id(p) in parameters)
            p.grad = None
        hooks += [p.register_post_accumulate_grad_hook(after) for p in parameters.values()]
        if {"inputs", "moments"} & set(statistics):
            if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                hooks.append(backbone(model).register_forward_pre_hook(look, with_kwargs=True))
            hooks += [site.owner.register_forward_pre_hook(before(path), with_kwargs=True) for path, site in sites.items() if site.kind == "linear"]
        with torch.enable_grad():
            backward(model)
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag, grad in others:
            p.requires_grad_(flag)
            p.grad = grad
    for path, site in sites.items():
        for name in {"gradient", "squares"} & sums.keys():
            found = {key: sums[name][id(p)] for key, p in site.values.items() if id(p) in sums[name]}
            if (site.weight or site.names[0]) not in found:
                raise TunesmithError(f"the calibration left no gradient at {path!r}; it must run forward and backward through the model")
            if not all(torch.isfinite(t).all() for t in found.values()):
                raise TunesmithError(f"the calibration's gradient at {path!r} is not finite; calibrate in float32, or on other data")
            site.seen[name] = found
        for name in {"inputs", "moments"} & set(statistics):
            if path in sums["rows"]:
                site.seen[name] = {"x": (sums[name][path] / sums["rows"][path]).float()}
            elif site.kind == "linear":
                raise TunesmithError(f"the calibration never reached {path!r}; it must run the model on some batches")
