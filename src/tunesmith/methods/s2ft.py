"""S²FT: whole attention heads and feed-forward channels are trained, as dense blocks of coupled weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor, nn

from ..engine.model import adapters as adapters_of
from ..engine.model import state_of, unwrap
from ..engine.sites import Site, Targets
from ..errors import TunesmithError
from .entries import ChosenLayer, top
from .method import Method, Seed
from .select import Coupled, coupled, parts

Share = Annotated[float, Field(ge=0, le=1)]


class S2FT(Method):
    """S²FT (Yang et al. 2024, arXiv 2412.06289): of each attention output and down projection the columns of chosen units train.

    A unit is a head (with grouped queries all the query heads of a key-value head) or a feed-forward channel. `value_heads`
    and `up_channels` train the rows that make such units besides, in the value and up projections. `choice`: units drawn
    at random over all layers at once, as in the authors' code, so that layers differ in how many they get; or in each layer the
    share with the smallest (`largest`: largest) norm of the weights, mean magnitude of the `activation`, their `product`, or
    norm of the `gradient` on calibration data. Layers named in `targets` that are no part of such a block train single columns.

    The paper permutes the units so that the chosen ones are one block; that changes nothing but the place of the numbers,
    and gathering the block's inputs costs as little, so here the weights stay where they are (`co_permuted` moves them).
    """

    method, family, title, paper = "s2ft", "selective", "Structured sparse fine-tuning", "arXiv:2412.06289"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-3

    targets: Targets = "default"
    heads: Share = Field(0.05, description="share of the heads whose columns train in the attention's output projection")
    channels: Share = Field(0.02, description="share of the channels whose columns train in the down projection")
    value_heads: Share = Field(0.0, description="share of the heads whose rows train in the value projection")
    up_channels: Share = Field(0.0, description="share of the channels whose rows train in the up projection")
    choice: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    largest: bool = Field(False, description="whether a choice by score takes the largest")
    seed: Seed = Field(0, description="of a random choice")
    kept: PositiveInt | None = Field(None, description="trained columns or rows of the layer; filled in")
    rows: bool = Field(False, description="whether rows train instead of columns; filled in")
    _chosen: Tensor | None = PrivateAttr(None)

    @property
    def calibrated(self):
        return {"activation": ("inputs",), "product": ("inputs",), "gradient": ("gradient",)}.get(self.choice, ())

    def default(self, model):
        return [role.site for role in self._roles(model).values()]

    def _roles(self, model: nn.Module) -> dict[str, "_Role"]:
        """What each layer of the coupled blocks trains, by path."""
        found = {}
        for block in coupled(model):
            columns, rows = (self.heads, self.value_heads) if block.kind == "heads" else (self.channels, self.up_channels)
            if columns:
                found[block.outer.path] = _Role(block.kind, block.outer, columns, block.units, False, 0, block.outer.in_features)
            if rows:
                site, first = block.values
                found[site.path] = _Role(f"rows of {block.kind}", site, rows, block.units, True, first, site.out_features - first)
        return found

    def allot(self, model, configs, by_path):
        known, groups = self._roles(model), {}
        for path in configs:
            site = by_path[path]
            role = known.get(path) or _Role("other", site, self.channels, site.in_features, False, 0, site.in_features)
            role.site = site  # which knows what calibration found
            groups.setdefault(role.kind, {})[path] = role
        own = {}
        for roles in groups.values():
            for path, units in (self._drawn(roles) if self.choice == "random" else self._best(roles)).items():
                if not len(units):
                    continue
                role, config = roles[path], configs[path].model_copy()
                size = role.size // role.units
                config._chosen = (role.first + units[:, None] * size + torch.arange(size)).flatten().to(role.site.parameter.device)
                config.kept, config.rows = len(config._chosen), role.rows
                own[path] = config
        return own

    def _drawn(self, roles: dict[str, "_Role"]) -> dict[str, Tensor]:
        """Units of each layer, ascending, drawn among those of all layers of a kind."""
        counts, share = [role.units for role in roles.values()], next(iter(roles.values())).share
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed))
        chosen = torch.zeros(sum(counts), dtype=torch.bool).index_fill_(0, order[: max(int(share * sum(counts)), 1)], True)
        return {path: mask.nonzero()[:, 0] for path, mask in zip(roles, chosen.split(counts), strict=True)}

    def _best(self, roles: dict[str, "_Role"]) -> dict[str, Tensor]:
        found = {}
        for path, role in roles.items():
            scores = role.score(self.choice) * (1 if self.largest else -1)
            found[path] = top(scores, max(round(role.share * role.units), 1)).cpu()
        return found

    def layer(self, site):
        chosen = torch.arange(self.kept, device=site.parameter.device) if self._chosen is None else self._chosen
        return ChosenLayer(site, chosen, 0 if self.rows else 1)

    def count(self, site):
        out, size = site.shape
        return (self.kept or ceil(self.channels * size)) * (size if self.rows else out)


@dataclass
class _Role:
    """What a layer trains: a share of its units, which are the `size` columns or rows from `first` on in equal parts."""

    kind: str
    site: Site
    share: float
    units: int
    rows: bool
    first: int
    size: int

    def score(self, choice: str) -> Tensor:
        """A number for each unit."""
        site, dim = self.site, 1 if self.rows else 0

        def pooled(each: Tensor) -> Tensor:
            return each[self.first : self.first + self.size].view(self.units, -1)

        if choice == "gradient":
            return torch.linalg.vector_norm(pooled(torch.linalg.vector_norm(site.gradient.float(), dim=dim)), dim=1)
        weight = torch.linalg.vector_norm(pooled(torch.linalg.vector_norm(site.matrix(site.values)[0].detach().float(), dim=dim)), dim=1)
        if choice == "weight":
            return weight
        if self.rows or site.inputs is None:
            raise TunesmithError(f"s2ft: choice={choice!r} needs the inputs of a linear layer, which {site.path!r} does not choose by; use choice='weight', 'gradient' or 'random' there")
        return pooled(site.inputs).mean(1) * (weight if choice == "product" else 1)


@contextmanager
def co_permuted(model: nn.Module, name: str = "default") -> Iterator[nn.Module]:
    """Within the block, the units that the s2ft adapter `name` trains are side by side in every coupled weight.

    In each block the order is: units that only the first layers (value, up) train, units that both train, those that only the
    output or down projection trains, the rest ascending. The model computes the same, but for the order of its sums, and the
    adapter's columns and rows are contiguous. Afterwards the base is as it was, bit for bit, and the adapter keeps what it learned.
    Raises `TunesmithError` where other adapters are attached, this one is merged, or heads differ by more than their weights.
    """
    state, own = state_of(model), adapters_of(model, name)
    if list(state.records) != [name] or state.merged or any(getattr(a, "dim", None) is None for a in own.values()):
        raise TunesmithError("co_permuted moves the base's weights, which no other adapter would follow: attach one s2ft adapter alone, not merged")
    orders = []
    for block in coupled(unwrap(model)):
        first = _units(own.get(block.values[0].path), block, *block.values)
        second = _units(own.get(block.outer.path), block, block.outer, 0)
        order = [u for u in first if u not in second] + [u for u in first if u in second] + [u for u in second if u not in first]
        if order:
            if block.kind == "heads" and (why := _bound(unwrap(model), block)):
                raise TunesmithError(f"the heads that {block.outer.path!r} reads cannot change places: {why}")
            orders.append((block, torch.tensor(order + [u for u in range(block.units) if u not in set(order)])))
    for block, order in orders:
        _move(block, order, own)
    try:
        yield model
    finally:
        for block, order in orders:
            _move(block, order.argsort(), own)


def _bound(model: nn.Module, block: Coupled) -> str | None:
    """Why an attention's heads cannot be permuted, if so."""
    if any("relative_attention_bias" in path for path, _ in model.named_modules()):
        return "the model adds position biases that differ from head to head"
    fused = [s.path for s in block.inner if parts(block, s) > 1 and s.path.split(".")[-1] not in ("c_attn", "in_proj")]
    return f"the order of queries, keys and values in {fused[0]!r} is not known" if fused else None


def _units(adapter, block: Coupled, site: Site, first: int) -> list[int]:
    """The units that an adapter trains, ascending."""
    if adapter is None:
        return []
    size = (site.in_features if adapter.dim else site.out_features - first) // block.units
    return sorted(set(((adapter.index - first) // size).tolist()))


@torch.no_grad()
def _move(block: Coupled, order: Tensor, own: dict) -> None:
    """Unit order[i] of a block becomes its i-th, in weights, biases and the adapters' indices."""
    for site in (*block.inner, block.outer):
        outer = site is block.outer
        groups = 1 if outer else parts(block, site)
        size = (site.in_features if outer else site.out_features) // groups // block.units
        place = (torch.arange(groups)[:, None, None] * block.units + order[:, None]) * size + torch.arange(size)
        place = place.flatten().to(site.parameter.device)
        W, b = site.matrix(site.values)
        W.copy_(W[:, place] if outer else W[place])
        if b is not None and not outer:
            b.copy_(b[place])
        if site.path in own:
            adapter = own[site.path]
            where, by = place.argsort()[adapter.index.long()].sort()
            adapter.index.copy_(where)
            adapter.v.copy_(adapter.v[:, by] if outer else adapter.v[by])
