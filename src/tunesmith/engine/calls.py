"""What a forward is told beside its inputs (which row runs what), and the losses that adapters add to the model's own."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import TunesmithError
from .model import by_method, guard_fast_path, record_of, set_trained, state_of
from .sites import Site


@contextmanager
def mixed(model: nn.Module, rows: list[str | None]):
    """Within the block, row i of every batch runs under the adapter `rows[i]` (None: the base). Also trains.

    Inputs may have k·len(rows) rows (beams, flattened tokens); row i then stands for k of them in a row.
    """
    state = state_of(model)
    for name in {name for name in rows if name is not None}:
        record_of(model, name)
    if state.merged:
        raise TunesmithError(f"a mixed batch needs the base's own weights; unmerge {', '.join(state.merged)} first")
    set_trained(model, set(rows) - {None}, only=False)
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
    before, state.tasks = state.tasks, torch.as_tensor(ids, dtype=torch.long, device="cpu")  # layers read them
    try:
        yield model
    finally:
        state.tasks = before


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The sum of what the active adapters add to the loss after a forward (sparsity, balance of experts), or None."""
    state = state_of(model)
    names = state.active if state.rows is None else dict.fromkeys(name for name in state.rows if name is not None)
    terms = [config.auxiliary_loss(own) for name in names for config, own in by_method(model, name)]
    known = [term for term in terms if term is not None]
    return torch.stack([term.to(known[0].device) for term in known]).sum() if known else None


def score(model: nn.Module, sites: dict[str, Site], backward: Callable[[nn.Module], None]) -> None:
    """Give each site the gradient of its matrix, (out, in), which `backward(model)` leaves: forward and backward on some batches.

    The model's own flags and gradients are as before afterwards.
    """
    parameters = {id(site.parameter): site.parameter for site in sites.values()}
    others = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in others:
            p.requires_grad_(id(p) in parameters)
            p.grad = None
        with torch.enable_grad():
            backward(model)
        for path, site in sites.items():
            if site.parameter.grad is None:
                raise TunesmithError(f"the calibration left no gradient at {path!r}; it must run forward and backward through the model")
            site.gradient = site.matrix({site.weight: site.parameter.grad})[0]
    finally:
        for p, flag, grad in others:
            p.requires_grad_(flag)
            p.grad = grad
