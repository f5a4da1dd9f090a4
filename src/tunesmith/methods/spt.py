"""SPT: what trains, single weights or a module on a whole matrix, is chosen by sensitivity under one budget."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.fused import changed, lowrank_linear, sparse_change, sparse_linear
from ..engine.sites import Site, Targets, find, head_paths, sites
from ..errors import TunesmithError
from .entries import top
from .method import Method, Rank, empty


class SPTLayer(WeightAdapter):
    """y = x (W + E + U D)ᵀ + b + e, or with U f(D y + d) + u added to such a y: E and e have few entries, one of the two modules or none.

    E is v at the flat positions `index` of W (out, in); e, and what is added to a norm's vectors, is `vectors` at its own positions.
    """

    why_not = "an adapter with an activation follows the layer; keep it attached"

    def __init__(self, config: "SPT", site: Site):
        super().__init__()
        self.bias, self.module, self.limits = site.bias, config.module if config.structured else None, {}
        chosen, where = config._chosen, site.parameter.device
        self.mergeable = self.module != "adapter"
        if config.entries:
            self._positions("index", chosen.get(site.weight), config.entries, site.out_features * site.in_features, where)
            self.v = nn.init.zeros_(empty(config.entries, like=site.parameter))
        self.vectors = nn.ParameterDict()
        for name, count in config.vectors.items():
            self._positions(f"index_{name}", chosen.get(name), count, site.values[name].numel(), where)
            self.vectors[name] = nn.init.zeros_(empty(count, like=site.parameter))
        if self.module:
            size = site.in_features if self.module == "lora" else site.out_features
            self.D, self.U = empty(config.rank, size, like=site.parameter), empty(site.out_features, config.rank, like=site.parameter)
            nn.init.kaiming_uniform_(self.D, a=5**0.5)
            nn.init.zeros_(self.U)
        if self.module == "adapter":
            self.d, self.u = nn.init.zeros_(empty(config.rank, like=site.parameter)), nn.init.zeros_(empty(site.out_features, like=site.parameter))

    def _positions(self, name: str, chosen: Tensor | None, count: int, size: int, where: torch.device) -> None:
        index = torch.arange(count) if chosen is None else chosen
        self.register_buffer(name, index.to(where, torch.int32 if size < 2**31 else torch.int64))
        self.limits[name] = size

    def moved(self, name: str, value: Tensor) -> Tensor:
        """A vector with its chosen entries changed."""
        if name not in self.vectors:
            return value
        v = self.vectors[name]
        return value.to(torch.promote_types(value.dtype, v.dtype)).flatten().index_add(0, getattr(self, f"index_{name}"), v).view(value.shape)

    def merged(self, W, b):
        if self.module == "lora":
            W = W + self.U @ self.D
        if hasattr(self, "v"):
            W = changed(W, self.v, self.index, None)
        return W, b if b is None else self.moved(self.bias, b)

    def fold(self, site, values):
        if site.weight:
            return super().fold(site, values)
        return values | {name: self.moved(name, values[name]).to(values[name].dtype) for name in self.vectors}

    def forward(self, base, *args, **kwargs):
        y = self._before(base, *args, **kwargs)
        if self.module != "adapter":
            return y
        h = F.gelu(F.linear(y, self.D.to(y.dtype), self.d.to(y.dtype)))
        return y + F.linear(h, self.U.to(y.dtype), self.u.to(y.dtype))

    def _before(self, base, *args, **kwargs):
        if base.site.kind != "linear" or not base.plain:
            return base.with_values(self.fold(base.site, base.values))(*args, **kwargs)
        (x,), b = args, base.b if base.b is None else self.moved(self.bias, base.b)
        if self.module == "lora":
            y = lowrank_linear(x, base.W, b, self.D, self.U, 1.0)
            return y + sparse_change(x, self.v, self.index, None, base.site.out_features) if hasattr(self, "v") else y
        if hasattr(self, "v"):
            return sparse_linear(x, base.W, b, self.v, self.index, None)
        return F.linear(x, base.W.to(x.dtype), b if b is None else b.to(x.dtype))


@dataclass
class Candidate:
    """A parameter that may train: `scores`, flat, are the sensitivities of its entries."""

    config: "SPT"
    site: Site
    name: str
    scores: Tensor

    @property
    def matrix(self) -> bool:
        return self.name == self.site.weight

    def plan(self, hits: int) -> tuple[int, bool]:
        """(trained parameters, whether they are a module on the matrix or the whole vector) with so many sensitive entries."""
        size, ease = (self.config.cost(self.site), self.config.ease) if self.matrix else (len(self.scores), self.config.vector_ease)
        structured = hits > 0 and hits * ease >= size
        return size if structured else hits, structured


def ranked(scores: list[Tensor], most: int) -> Tensor:
    """Which of the tensors (flat) has the largest score, which the next, for the `most` largest of all; ties go to the earlier one."""
    best, owner, cut = torch.zeros(0, dtype=scores[0].dtype), torch.zeros(0, dtype=torch.int32), -torch.inf
    for i, each in enumerate(scores):
        rivals = each[each > cut].cpu()
        best, owner = torch.cat([best, rivals]), torch.cat([owner, torch.full((len(rivals),), i, dtype=torch.int32)])
        if len(best) > 2 * most:
            kept = top(best, most)
            best, owner = best[kept], owner[kept]
            cut = best.min().item()
    return owner[best.sort(descending=True, stable=True).indices[:most]]


def choose(candidates: list[Candidate], taus: list[int], budget: int) -> tuple[int, list[tuple[int, bool]]]:
    """(trained parameters, the plan of each candidate) for the τ largest scores, at the τ whose total is nearest to the budget, the larger of two."""
    order, found = ranked([c.scores for c in candidates], max(taus)), []
    for tau in taus:
        hits = torch.bincount(order[:tau], minlength=len(candidates)).tolist()
        plans = [candidate.plan(count) for candidate, count in zip(candidates, hits, strict=True)]
        total = sum(count for count, _ in plans)
        found.append((abs(total - budget), -tau, total, plans))
    return min(found)[2:]


class SPT(Method):
    """Sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566); subclasses say what trains a whole matrix.

    A scalar's sensitivity is the sum of its squared gradients over the calibration's backwards. Of the τ most sensitive ones,
    those in a matrix train one by one, unless `ease` times their number reaches what a module on the matrix has: then that.
    A vector trains whole if `vector_ease` times their number reaches its length. τ is the one of 79, or of more where these
    stay below, whose total is nearest to the budget. Embeddings and the head are candidates only if `targets` names them.
    Unlike in the authors' code, entries of norms train where they are chosen (there they count, but do not), modules start
    from zero (there a later initialisation overwrites that), fused queries, keys and values are one matrix, and an adapter
    follows the layer everywhere (there not after the attention's output).
    """

    family, paper = "selective", "arXiv:2303.08566"
    works_on = ("linear", "embedding", "conv", "attention", "norm")
    default_lr = 1e-3
    module: ClassVar[str]

    targets: Targets = "default"
    budget: PositiveInt | None = Field(None, description="trained parameters aimed at; None: half a per cent of the base's")
    rank: Rank = Field(8, description="width of a module")
    ease: PositiveFloat = Field(10.0, description="how much sooner a matrix gets a module than when it has as many sensitive entries; 10 in the authors' code, 1 in the paper")
    vector_ease: PositiveFloat = Field(5.0, description="the same of training a vector whole")
    structured: bool = Field(False, description="whether the matrix has a module; filled in")
    entries: NonNegativeInt = Field(0, description="single entries of the matrix that train; filled in")
    vectors: dict[str, PositiveInt] = Field({}, description="trained entries of each vector; filled in")
    _chosen: dict = PrivateAttr(default_factory=dict)

    @property
    def calibrated(self):
        return ("squares",)

    def default(self, model):
        matrices = find(model, "all-linear", tuple(kind for kind in self.works_on if kind != "norm"), self.method)
        heads = head_paths(model)
        return [s for s in sites(model) if s.path in matrices or (s.kind == "norm" and s.path not in heads)]

    def cost(self, site: Site) -> int:
        """Parameters of a module on a matrix, or of a norm."""
        if not site.weight:
            return sum(p.numel() for p in site.values.values())
        out, size = site.shape
        return self.rank * (out + size) if self.module == "lora" else self.rank * 2 * out + self.rank + out

    def allot(self, model, configs, by_path):
        candidates = [
            Candidate(config, site, name, (site.squares if name == site.weight else squares).flatten())
            for path, config in configs.items()
            for site in [by_path[path]]
            for name, squares in site.seen["squares"].items()
            if not site.weight or name in (site.weight, site.bias)
        ]
        if not any(c.scores.any() for c in candidates):
            raise TunesmithError(f"{self.method}: every gradient on the calibration data is zero, so that nothing is more sensitive than the rest; start the head at random")
        budget = self.budget or max(1, sum(p.numel() for path, p in model.named_parameters() if ".tunesmith." not in f".{path}") // 200)
        taus, every = [-(-k * budget // 50) for k in range(1, 80)], sum(len(c.scores) for c in candidates)
        while (found := choose(candidates, taus, budget))[0] < 0.95 * budget and taus[-1] < every:
            taus += [ceil(taus[-1] * 1.1**k) for k in range(1, 9)]
        own = {}
        for candidate, (count, structured) in zip(candidates, found[1], strict=True):
            if not count:
                continue
            config = own.setdefault(candidate.site.path, candidate.config.model_copy(update={"structured": False, "entries": 0, "vectors": {}}))
            if structured and candidate.matrix:
                config.structured = True
                continue
            config._chosen = config._chosen | {candidate.name: top(candidate.scores, count)}
            if candidate.matrix:
                config.entries = count
            else:
                config.vectors[candidate.name] = count
        return own

    def layer(self, site):
        layer = SPTLayer(self, site)
        self._chosen = {}
        return layer

    def count(self, site):
        single = self.entries + sum(self.vectors.values())
        return single + self.cost(site) if self.structured or not single else single


class SPTLoRA(SPT):
    """SPT-LoRA (He et al. 2023, arXiv 2303.08566): a matrix with many sensitive entries gets LoRA, U D x beside W x, without a scale; see `SPT`."""

    method, title, module = "spt-lora", "Sensitivity-aware tuning with LoRA", "lora"


class SPTAdapter(SPT):
    """SPT-Adapter (He et al. 2023, arXiv 2303.08566): a matrix with many sensitive entries gets an adapter behind it, y + U GELU(D y + d) + u; see `SPT`."""

    method, title, module = "spt-adapter", "Sensitivity-aware tuning with adapters", "adapter"
    mergeable = False
    works_on = ("linear", "norm")
