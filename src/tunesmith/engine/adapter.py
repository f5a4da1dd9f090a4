"""What a method attaches to a site, and how an adapted module computes.

An adapted module stays the object it was: its class becomes a subclass of the same name whose `forward` runs the
active adapters around the original one, and the adapters live in `module.tunesmith`. Detaching gives the class back.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import TunesmithError
from .fused import merged_linear
from .sites import Site, swapped


class Adapter(nn.Module):
    """A method at one site. Subclass it, create parameters in `__init__`, and override `forward`."""

    mergeable = False
    why_not = "it is not a change of the weights; keep it attached"  # what `merge` says where `mergeable` is False
    grows = False  # whether its tensors may start empty
    outermost = False  # whether it is to be above all others of a site
    replaces = False  # whether it stands for the whole weight, whatever an adapter below makes of it
    limits: ClassVar[dict[str, int]] = {}  # of the positions in its integer tensors, which a file must not exceed
    dims: ClassVar[dict[str, tuple[str, ...]]] = {}  # its tensors' dimensions, each "rank", "in", "out" or "": what Light-PEFT can cut

    def forward(self, base: "Base", *args, **kwargs):
        """`base(*args)` is the module as it is below this adapter; `base.W`, `base.b` are its matrix and bias."""
        return base(*args, **kwargs)

    def fold(self, site: Site, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The site's raw parameters with this adapter merged into them."""
        raise TunesmithError(f"{type(self).__name__} at {site.path!r} cannot be merged into the weights")

    scattered = False  # whether it changes some entries of the matrix and nothing else

    def change(self, W: Tensor) -> tuple["Change", "Change"]:
        """What W (out, in) has where a `scattered` adapter changes it, and what it is to have."""
        raise TypeError(f"{type(self).__name__} defines no change")

    @classmethod
    def mixed(cls, base: "Base", rows: list["Adapter | None"], *args, **kwargs):
        """One adapter per row of the batch. Rows of the same adapter run together; override where rows interact."""
        state = base.site.holder.tunesmith.state
        names, tasks = state.rows, state.tasks

        def run(adapter, chosen, *args, **kwargs):
            state.rows = [names[i] for i in chosen]  # for the modules inside
            state.tasks = None if tasks is None else tasks[chosen]
            return base.under(adapter, *args, **kwargs) if adapter else base(*args, **kwargs)

        try:
            return apart(rows, run, args, kwargs)
        finally:
            state.rows, state.tasks = names, tasks


class WeightAdapter(Adapter):
    """A function of the matrix: override `merged`, and `forward` where there is a cheaper way than forming it.

    On a linear layer the formed matrix is not kept for backward but made anew, so `merged` must not draw random numbers.
    """

    mergeable = True

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W (out, in), b (out,)) → the effective ones, in W's dtype or wider."""
        return W, b

    def fold(self, site, values):
        return site.raw(*self.merged(*site.matrix(values)))

    def forward(self, base, *args, **kwargs):
        if base.site.kind == "linear" and base.plain:
            return merged_linear(*args, base.W, base.b, self.merged, list(self.parameters()))
        return base.with_values(self.fold(base.site, base.values))(*args, **kwargs)


class ValueAdapter(Adapter):
    """Trained values in place of some of a module's own parameters (all of one's own shape)."""

    mergeable = True

    def __init__(self, values: dict[str, nn.Parameter]):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, value)

    def fold(self, site, values):
        return values | {name: p.to(values[name].dtype) for name, p in self._parameters.items()}

    def forward(self, base, *args, **kwargs):
        return base.with_values(self.fold(base.site, base.values))(*args, **kwargs)


@dataclass
class Change:
    """`values` for the entries `index` of a matrix: rows (dim 0), columns (dim 1), or flat positions (dim None)."""

    dim: int | None
    index: Tensor
    values: Tensor

    def of(self, W: Tensor) -> Tensor:
        """What W (out, in) has there."""
        index = self.index.to(W.device)
        if self.dim is not None:
            return W.index_select(self.dim, index)
        return W.view(-1).index_select(0, index) if W.is_contiguous() else W.take(index.long())

    def put(self, W: Tensor) -> None:
        """The values into W, in place."""
        index, values = self.index.to(W.device, torch.long), self.values.to(W)
        W.put_(index, values) if self.dim is None else W.index_copy_(self.dim, index, values)


class Base:
    """A module without its adapters, callable; with `with_values`, the same with other parameters."""

    __slots__ = ("_values", "forward", "site")

    @property
    def plain(self) -> bool:
        """Whether nothing is stacked below, so that base.W is the weight itself, and a linear layer computes x Wᵀ + b and nothing else."""
        return self.site.standard or self.site.kind != "linear"

    def __init__(self, site: Site, forward, values=None):
        self.site, self.forward, self._values = site, forward, values

    def __call__(self, *args, **kwargs):
        if self._values is None:
            return self.forward(self.site.owner, *args, **kwargs)
        return self.site.call(self.forward, self._values, args, kwargs)

    @property
    def values(self) -> dict[str, Tensor]:
        return self.site.values if self._values is None else self._values

    @property
    def W(self) -> Tensor:
        return self.site.matrix(self.values)[0]

    @property
    def b(self) -> Tensor | None:
        return self.values.get(self.site.bias)

    def with_values(self, values: dict[str, Tensor]) -> "Base":
        return Base(self.site, self.forward, values)

    def under(self, adapter: Adapter, *args, **kwargs):
        """What the module computes with the adapter; a linear layer that does more than x Wᵀ + b, with the weights that merging would give it."""
        if self.site.kind == "linear" and not self.site.standard and adapter.mergeable:
            return self.with_values(adapter.fold(self.site, self.values))(*args, **kwargs)
        return adapter(self, *args, **kwargs)


class Stacked(Base):
    """An adapter over what is below it, with a weight w: below + w·(adapted − below)."""

    __slots__ = ("adapter", "below", "weight")
    plain = False

    def __init__(self, adapter: Adapter, below: Base, weight: float):
        super().__init__(below.site, below.forward)
        self.adapter, self.below, self.weight = adapter, below, weight

    def __call__(self, *args, **kwargs):
        y = self.below.under(self.adapter, *args, **kwargs)
        if self.weight == 1:
            return y
        return _lerp(self.below(*args, **kwargs), y, self.weight)

    @property
    def values(self):
        return fold(self.adapter, self.site, self.below.values, self.weight) if self.adapter.mergeable else self.below.values

    def with_values(self, values):
        below = self.below.with_values(values)
        return below if self.adapter.mergeable else Stacked(self.adapter, below, self.weight)


def fold(adapter: Adapter, site: Site, values: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Raw values with an adapter merged at the given weight."""
    new = adapter.fold(site, values)
    return new if weight == 1 else values | _lerp({n: values[n] for n in new}, new, weight)


def _lerp(a, b, w):
    return pytree.tree_map(lambda p, q: p + w * (q - p) if isinstance(p, Tensor) and p.is_floating_point() else q, a, b)


@dataclass
class State:
    """What the adapted modules of one model have in common."""

    active: dict[str, float] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)
    aside: bool = False  # what is merged is taken out for the time being
    rows: list[str | None] | None = None
    tasks: Tensor | None = None  # task of each row of the batch
    enabled: bool = True
    encoders: bool = False  # whether the model has an nn.TransformerEncoderLayer
    records: dict = field(default_factory=dict)  # name -> what was attached
    flags: dict = field(default_factory=dict)  # parameter path -> requires_grad before the first adapt

    def tasks_of(self, rows: int) -> Tensor | None:
        """The task of each of `rows` rows of a tensor, (rows,), where the caller has said; raises where the numbers do not fit."""
        if self.tasks is None:
            return None
        if rows % len(self.tasks):
            raise TunesmithError(f"{len(self.tasks)} task ids met a batch of {rows} rows; name one task for each row of the batch")
        return self.tasks.repeat_interleave(rows // len(self.tasks))


class Swap:
    """What a merge put in place of a site's parameter, or of some of its entries; a call exchanges the two, and back."""

    def __init__(self, site: Site, name: str, other: nn.Parameter | Change):
        self.site, self.name, self.other = site, name, other

    def undo(self):
        """As a call, for the last time, and without gradients."""
        if isinstance(self.other, Change):
            self.other.put(self.site.matrix(self.site.holder._parameters)[0].detach())
        else:
            self()

    @torch.no_grad()
    def __call__(self):
        parameters = self.site.holder._parameters
        now = parameters[self.name]
        if isinstance(self.other, Change):
            W, there = self.site.matrix(parameters)[0].detach(), self.other
            self.other = Change(there.dim, there.index, there.of(W))
            there.put(W)
        else:
            if self.other.device != now.device:  # the model has moved since
                moved = self.other.detach().to(now.device)
                if is_traceable_wrapper_subclass(moved):  # whose parts .data leaves behind
                    self.other = nn.Parameter(moved, requires_grad=False)
                else:
                    self.other.data = moved  # tied weights stay one
            parameters[self.name], self.other = self.other, now


class Hub(nn.Module):
    """The adapters of one site, by name, as `holder.tunesmith`."""

    def __init__(self, site: Site, state: State):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.site, self.state = site, state
        self.swaps: list[Swap] = []  # what merging did, in this order
        self.gate = 1.0  # on the adapters' effect here, beside the weights that the model's state gives them

    # Plain references: registering the site's modules here would make a cycle in the module tree.
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name in ("site", "state", "swaps", "gate") else super().__setattr__(name, value)

    def stack(self, base: Base) -> Base:
        """`base` with the active adapters over it, first activated first applied."""
        state = self.state
        if state.enabled:
            for name, weight in state.active.items():
                if name in self.adapters and name not in state.merged:
                    base = Stacked(self.adapters[name], base, weight * self.gate)
        return base

    def run(self, forward, *args, **kwargs):
        """The owner's forward with the adapters that the state says are in use."""
        state, base = self.state, Base(self.site, forward)
        if state.rows is None or not state.enabled:
            return self.stack(base)(*args, **kwargs)
        rows = [self.adapters[name] if name in self.adapters else None for name in state.rows]
        classes = {type(row): row for row in rows if row is not None}
        if not classes:
            return base(*args, **kwargs)
        splitters = {cls.mixed.__func__ for cls in classes}
        if len(splitters) > 1:
            raise TunesmithError(f"adapters of different kinds meet at {self.site.path!r} in one mixed batch; put them in separate batches")
        return next(iter(classes)).mixed(base, rows, *args, **kwargs)


def _forward(module: nn.Module, forward, args, kwargs):
    hub = module._modules.get("tunesmith")
    if not isinstance(module, nn.MultiheadAttention):
        return hub.run(forward, *args, **kwargs)
    hubs = [h for h in (hub, module.out_proj._modules.get("tunesmith")) if h is not None]
    state = hubs[0].state
    if state.rows is not None and state.enabled:
        return _mixed_attention(module, hubs, forward, args, kwargs)
    return _attention(module, [h.stack(Base(h.site, None)).values for h in hubs], hubs, forward, args, kwargs)


def _attention(module, values, hubs, forward, args, kwargs):
    """nn.MultiheadAttention reads its projections' parameters directly, so each call gets the adapted ones."""
    if not hubs:
        return forward(module, *args, **kwargs)
    with swapped(hubs[0].site.holder, values[0]):
        return _attention(module, values[1:], hubs[1:], forward, args, kwargs)


def _mixed_attention(module, hubs, forward, args, kwargs):
    if not module.batch_first:
        raise TunesmithError("a mixed batch through nn.MultiheadAttention needs batch_first=True")

    def run(name, _, *args, **kwargs):
        values = [fold(h.adapters[name], h.site, h.site.values, 1) if name in h.adapters else h.site.values for h in hubs]
        return _attention(module, values, hubs, forward, args, kwargs)

    return apart(hubs[0].state.rows, run, args, kwargs)


def apart(keys: list, run: Callable, args: tuple, kwargs: dict):
    """`run(key, its rows, *args, **kwargs)` for each distinct key on its rows of the batch; the outputs in the batch's order."""
    outputs, indices = [], []
    for key in dict.fromkeys(keys):
        chosen = [i for i, other in enumerate(keys) if other == key]
        part_args, part_kwargs, index = _take((args, kwargs), chosen, len(keys))
        outputs.append(run(key, chosen, *part_args, **part_kwargs))
        indices.append(index)
    return _put(outputs, torch.cat(indices))


def _take(tree, rows: list[int], n: int):
    """Rows of every batched tensor in (args, kwargs); the leading dimension is n, or n times beams or tokens."""
    size = next((t.size(0) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dim()), n)
    if size == 1:  # broadcast over the batch, as position ids are
        size = n
    if size % n:
        raise TunesmithError(f"a mixed batch of {n} rows met an input of {size}; name one adapter for each row of the batch")
    each = size // n
    index = torch.tensor([row * each + i for row in rows for i in range(each)])

    def take(t):
        if not isinstance(t, Tensor) or not t.dim():
            return t
        if t.size(0) == 1 and size > 1:
            return t.expand(len(index), *t.shape[1:])
        return t[index.to(t.device)] if t.size(0) == size else t

    args, kwargs = pytree.tree_map(take, tree)
    return args, kwargs, index


def _put(outputs: list, index: Tensor):
    """The parts' outputs in the batch's order."""
    order = torch.argsort(index)

    def put(*parts):
        return torch.cat(parts)[order.to(parts[0].device)] if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]

    return pytree.tree_map(put, *outputs)


@functools.cache
def adapted_class(cls: type) -> type:
    """The subclass of `cls`, of the same name, whose forward runs the adapters."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return _forward(self, cls.forward, args, kwargs)

    def __reduce_ex__(self, protocol):
        return _rebuild, (cls,), self.__getstate__()

    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_tunesmith_base": cls, "__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _rebuild(cls: type) -> nn.Module:
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)
