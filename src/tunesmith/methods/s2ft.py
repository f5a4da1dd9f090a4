"""S²FT: whole attention heads and feed-forward channels are trained, as dense blocks of coupled weights."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor, nn

from ..engine.adapter import Adapter
from ..engine.model import adapters as adapters_of
from ..engine.model import record_of, state_of, unmerge, unwrap
from ..engine.sites import Site, Targets, sites
from ..errors import TunesmithError
from .entries import ChosenLayer, drawn, generator, top
from .method import Method, Seed
from .select import coupled

Share = Annotated[float, Field(ge=0, le=1)]
Role = tuple[str, bool, Tensor]  # the field of S2FT with the share, whether rows train, and the columns or rows of each unit (units, n)


def roles(model: nn.Module) -> dict[str, Role]:
    """What S²FT trains at each end of the coupled layers of a model, by path."""
    found = {}
    for c in coupled(model):
        found[c.outer.path] = (c.kind, False, c.columns())
        if c.inner:
            found[c.inner[-1].path] = ("value_heads" if c.kind == "heads" else "up_channels", True, c.values())
    return found


class S2FT(Method):
    """S²FT (Yang et al. 2024, arXiv 2412.06289): W + Δ in the columns that read some heads or channels, or the rows that make them.

    By default the attention's output projections train at `heads` of the heads, a key-value head with its query heads being one,
    and the feed-forward blocks' last layers at `channels` of the channels; nothing is kept of their other inputs. `choice`:
    `random` draws over all layers at once, as the authors' code does, so that layers differ in how many they get; the others
    take the same share of each layer, one unit at least, by the norm of its weights, the mean magnitude of its `activation` on
    calibration data, their `product`, or the norm of its `gradient`: the smallest, by activation the best in the paper, or the
    `largest`. Explicit targets that are no such layer, or one whose own share is 0, train single columns, at `channels`.
    LLaMA3-8B has 56,369,152 trained parameters with heads=0, channels=0.03. The authors' code moves what trains to the front
    of each weight; here the base stays as it is (see `co_permuted`).
    """

    method, family, title, paper = "s2ft", "selective", "Structured sparse fine-tuning", "arXiv:2412.06289"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-3

    targets: Targets = "default"
    heads: Share = Field(0.05, description="share of the heads whose columns train at attention outputs")
    channels: Share = Field(0.02, description="share of the feed-forward channels whose columns train at the block's last layer")
    value_heads: Share = Field(0.0, description="share of the heads whose rows train in the value projection")
    up_channels: Share = Field(0.0, description="share of the channels whose rows train in the up projection")
    choice: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    largest: bool = Field(False, description="train the units that score highest instead of lowest")
    seed: Seed = Field(0, description="of the random choice")
    kept: PositiveInt | None = Field(None, description="trained columns or rows of a layer; filled in")
    rows: bool = Field(False, description="whether a layer's rows train instead of columns; filled in")
    _chosen: Tensor | None = PrivateAttr(None)  # their positions; a file has its own
    _moved: bool = PrivateAttr(False)

    @property
    def calibrated(self):
        return {"activation": ("inputs",), "product": ("inputs",), "gradient": ("gradient",)}.get(self.choice, ())

    def default(self, model):
        found = roles(model)
        return [s for s in sites(model) if s.path in found and getattr(self, found[s.path][0])]

    def allot(self, model, configs, by_path):
        found, groups, own = roles(model), {}, {}
        for path, config in configs.items():
            role = found.get(path)
            if not role or not getattr(config, role[0]):
                role = "inputs", False, torch.arange(by_path[path].in_features)[:, None]
            share = getattr(config, role[0], config.channels)
            if not share:
                raise TunesmithError(f"s2ft has nothing to train at {path!r}: its share is 0; raise heads or channels, or leave the layer out of the targets")
            groups.setdefault((role[0], share, config.choice, config.largest, config.seed), {})[path] = role
        for (_, share, *_), members in groups.items():
            chosen = configs[next(iter(members))].units({path: (by_path[path], *role[1:]) for path, role in members.items()}, share)
            for path, units in chosen.items():
                S = members[path][2][units].flatten()
                if len(S):
                    own[path] = configs[path].model_copy(update={"kept": len(S), "rows": members[path][1]})
                    own[path]._chosen = S
        return own

    def units(self, members: dict[str, tuple[Site, bool, Tensor]], share: float) -> dict[str, Tensor]:
        """The units that train of layers of one role, by path, ascending."""
        if self.choice != "random":
            return {path: top(self.score(*member), max(1, int(share * len(member[2])))).cpu() for path, member in members.items()}
        sizes = [len(places) for *_, places in members.values()]
        order = torch.randperm(sum(sizes), generator=generator(next(iter(members.values()))[0], self.seed))
        chosen = torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, order[: max(1, int(share * sum(sizes)))], True)
        return {path: part.nonzero()[:, 0] for path, part in zip(members, chosen.split(sizes), strict=True)}

    def score(self, site: Site, rows: bool, places: Tensor) -> Tensor:
        """How soon each unit is chosen, (units,)."""
        if site.parameter.is_meta:
            return torch.rand(len(places), generator=generator(site, self.seed))
        if "inputs" in self.calibrated and (rows or site.inputs is None):
            raise TunesmithError(f"s2ft: choice={self.choice!r} needs the inputs of a linear layer, and {site.path!r} {'trains rows' if rows else 'has none'}; choose by 'random', 'weight' or 'gradient' there")
        W = site.gradient if self.choice == "gradient" else site.matrix(site.values)[0].detach()
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(W.float(), dim=int(rows))[places], dim=1)
        mean = site.inputs[places].mean(1) if "inputs" in self.calibrated else 1
        score = mean if self.choice == "activation" else norm * mean
        return score if self.largest else -score

    def layer(self, site):
        out, size = site.shape
        n = out if self.rows else size
        S = drawn(site, self.seed, n, self.kept or ceil(self.channels * n)) if self._chosen is None else self._chosen
        return ChosenLayer(site, S, 0 if self.rows else 1)

    def count(self, site):
        out, size = site.shape
        return (self.kept or ceil(self.channels * (out if self.rows else size))) * (size if self.rows else out)

    def dump(self):
        if self._moved:
            raise TunesmithError("s2ft: the base is co-permuted, and the adapter's positions are those in it; save the adapter after the block of co_permuted")
        return super().dump()


@contextmanager
def co_permuted(model: nn.Module, name: str = "default") -> Iterator[nn.Module]:
    """Within the block, the units that an S²FT adapter trains lie side by side in the base's own weights and biases.

    Their order: those whose rows train, those of which both do, those whose columns train, the rest ascending. The model
    computes what it did, but for the order of its sums; the adapter's positions follow and its values stay where they are, so
    that an optimiser goes on. At the end the base is as it was, bit for bit, the adapter has its positions in it again, and if
    it was merged inside, it no longer is. Inside, it cannot be saved, and saved adapters do not fit the base.

    Training never needs this: layers gather the few inputs or outputs of their block, which is dense wherever its units lie.
    It is for code that reads the block as a slice of the weight.

    Raises `TunesmithError` where another adapter is attached, something is merged, or what trains is not made of units that
    are free to move: single columns, heads with position biases of their own, weights that other layers share.
    """
    root, state, record = unwrap(model), state_of(model), record_of(model, name)
    if others := [n for n in state.records if n != name]:
        raise TunesmithError(f"co_permuted moves the base's weights, which adapter {others[0]!r} would not follow: attach one s2ft adapter alone")
    if state.merged:
        raise TunesmithError(f"co_permuted moves the base's own weights; unmerge {', '.join(state.merged)} first")
    configs = [config for config in (record.config, *record.sites.values()) if isinstance(config, S2FT)]
    if any(config._moved for config in configs):
        raise TunesmithError("co_permuted moves the base's own weights, and has done so: leave its block first")
    moves, moved = _moves(root, record.sites, adapters_of(model, name))
    before = {adapter: adapter.index.clone() for adapter in moved}
    _move(moves, moved)
    for config in configs:
        config._moved = True
    try:
        yield model
    finally:
        now = root.__dict__.get("_tunesmith")  # all may be detached
        if now and now.merged:
            unmerge(root)
        _move([(site, dim, order.argsort()) for site, dim, order in moves], before)
        for config in configs:
            config._moved = False
    if now and (strange := [other for other, r in now.records.items() if r is not record]):
        raise TunesmithError(f"adapter {strange[0]!r} was attached inside the block of co_permuted, to weights in another order than now; detach it and attach it outside")


def _moves(model: nn.Module, configs: dict[str, Method], own: dict[str, Adapter]) -> tuple[list[tuple[Site, int, Tensor]], dict[ChosenLayer, Tensor]]:
    """([(site, dimension, its new order)] of the base, the new positions of each adapter)."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    moves, moved, known, done = [], {}, set(), set()
    for c in coupled(model):
        known |= {s.path for s in (c.outer, *c.inner)}
        ends = [(c.outer.path, False, c.columns())] + ([(c.inner[-1].path, True, c.values())] if c.inner else [])
        trained = {path: _units(own[path].index.cpu().long(), places) for path, rows, places in ends if isinstance(config := configs.get(path), S2FT) and config.rows == rows}
        trained = {path: units for path, units in trained.items() if units}
        if not trained:
            continue
        if not c.free or any(uses[id(p)] > 1 for s in (c.outer, *c.inner) for p in s.values.values()):
            raise TunesmithError(f"co_permuted cannot move the {c.kind} that {c.outer.path!r} reads: something beside them tells them apart (position biases, a norm) or shares their weights; train with {c.kind}=0 to move others")
        done |= trained.keys()
        first, second = trained.get(c.inner[-1].path, []), trained.get(c.outer.path, [])
        units = torch.tensor(list(dict.fromkeys([*sorted(first, key=set(second).__contains__), *second, *range(c.units)])))
        for site, dim, places in (*((s, 0, c.rows(s)) for s in c.inner), (c.outer, 1, c.columns())):
            order = torch.empty(places.numel(), dtype=torch.long).index_copy_(0, places.flatten(), places[units].flatten())
            moves.append((site, dim, order))
            if site.path in trained:
                moved[own[site.path]] = order.argsort()[own[site.path].index.cpu().long()]
    if left := [path for path in own if path not in done and (path in configs or path in known)]:
        raise TunesmithError(f"co_permuted cannot move what trains at {left[0]!r}: it is not made of whole heads or channels that the layers around it share")
    return moves, moved


def _units(S: Tensor, places: Tensor) -> list[int]:
    """The units whose places (units, n) are S, in its order; [] where it is anything else."""
    owner = torch.full((int(places.max()) + 1,), -1)
    owner[places] = torch.arange(len(places))[:, None]
    units = owner[S][:: places.shape[1]]
    return units.tolist() if torch.equal(places[units].flatten(), S) else []


@torch.no_grad()
def _move(moves: list[tuple[Site, int, Tensor]], moved: dict[ChosenLayer, Tensor]) -> None:
    """Put the base's numbers in another order, in place, and change the adapters' positions."""
    for site, dim, order in moves:
        W, b = site.matrix(site.values)
        order = order.to(W.device)
        W.copy_(W.index_select(dim, order))
        if b is not None and dim == 0:
            b.copy_(b[order])
    for adapter, index in moved.items():
        adapter.index.copy_(index)
