"""SPT: what trains, single weights or a module on a whole matrix, is chosen by sensitivity under one budget."""

from math import ceil
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.fused import changed, lowrank_linear, sparse_change, sparse_linear
from ..engine.sites import Site, find, head_paths, sites, within
from ..errors import TunesmithError
from .entries import top
from .method import Method, Rank, empty

SWEEP = [0.02 * k for k in range(1, 80)]  # numbers of sensitive weights that are tried, as shares of the budget


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
        return value.to(torch.promote_types(value.dtype, v.dtype)).index_add(0, getattr(self, f"index_{name}"), v)

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
        return y + F.linear(F.gelu(F.linear(y, self.D.to(y.dtype), self.d.to(y.dtype))), self.U.to(y.dtype), self.u.to(y.dtype)) if self.module == "adapter" else y

    def _before(self, base, *args, **kwargs):
        if base.site.kind != "linear" or not base.plain:
            return base.with_values(self.fold(base.site, base.values))(*args, **kwargs)
        (x,), b = args, base.b if base.b is None else self.moved(self.bias, base.b)
        if self.module == "lora":
            y = lowrank_linear(x, base.W, b, self.D, self.U, 1.0)
            return y + sparse_change(x, self.v, self.index, None, base.site.out_features) if hasattr(self, "v") else y
        return sparse_linear(x, base.W, b, self.v, self.index, None) if hasattr(self, "v") else F.linear(x, base.W.to(x.dtype), b if b is None else b.to(x.dtype))


def selection(scores: list[Tensor], taus: list[int]) -> list[list[int]]:
    """How many of the τ largest scores (flat, over all tensors) each tensor has, for every τ."""
    owner = torch.cat([torch.full((min(len(s), taus[-1]),), i) for i, s in enumerate(scores)])
    best = torch.cat([s[top(s, min(len(s), taus[-1]))].cpu() for s in scores])
    order = owner[best.sort(descending=True, stable=True).indices]
    return [torch.bincount(order[:tau], minlength=len(scores)).tolist() for tau in taus]


class SPT(Method):
    """Sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566); subclasses say what trains a whole matrix.

    A scalar's sensitivity is the sum of its squared gradients over the calibration's backwards. Of the τ most sensitive ones, those in
    a matrix train one by one, unless `ease` times their number reaches what a module on the matrix has: then that. A vector
    trains whole if `vector_ease` times their number reaches its length. τ is the one of 79, or
    of more where these stay below, whose total is nearest to the budget. Embeddings and the head are no candidates. Unlike in the authors' code, entries of norms train where they
    are chosen (there they count, but do not), modules start from zero (there a later initialisation overwrites that), fused
    queries, keys and values are one matrix, and an adapter follows the layer everywhere (there not after the attention's output).
    """

    family, paper = "selective", "arXiv:2303.08566"
    works_on = ("linear", "embedding", "conv", "attention", "norm")
    default_lr = 1e-3
    module: ClassVar[str]

    budget: PositiveInt | None = Field(None, description="trained parameters aimed at; None: half a per cent of the base's")
    rank: Rank = Field(8, description="width of a module")
    ease: PositiveFloat = Field(10.0, description="how much sooner a matrix gets a module than when it has as many sensitive entries; 10 in the authors' code, 1 in the paper")
    vector_ease: PositiveFloat = Field(5.0, description="the same of training a vector whole")
    structured: bool = Field(False, description="whether the matrix has a module; filled in")
    entries: int = Field(0, ge=0, description="single entries of the matrix that train; filled in")
    vectors: dict[str, int] = Field({}, description="trained entries of each vector; filled in")
    _chosen: dict = PrivateAttr(default_factory=dict)

    @property
    def calibrated(self):
        return ("squares",)

    def select(self, model):
        if self.targets != "all-linear":
            return super().select(model)
        matrices = find(model, "all-linear", tuple(kind for kind in self.works_on if kind != "norm"), self.method, self.saved_paths(model))
        norms = {s.path: (s, {}) for s in sites(model) if s.kind == "norm" and s.path not in head_paths(model)}
        return {s.path: (s, {}) for s in sites(model) if s.path in matrices | norms and not within(s.path, self.saved_paths(model))}

    def cost(self, site: Site) -> int:
        """Parameters of a module on a matrix."""
        out, size = site.shape
        return self.rank * (out + size) if self.module == "lora" else self.rank * 2 * out + self.rank + out

    def plan(self, places: list[tuple[Site, str]], hits: list[int]) -> tuple[int, list[int | str]]:
        """(total, for each parameter the number of its entries that train, "module" or "whole") with so many sensitive entries in each."""
        chosen, total = [], 0
        for (site, name), count in zip(places, hits, strict=True):
            size = self.cost(site) if name == site.weight else site.values[name].numel()
            whole = count and count * (self.ease if name == site.weight else self.vector_ease) >= size
            chosen.append(("module" if name == site.weight else "whole") if whole else count)
            total += size if whole else count
        return total, chosen

    def choose(self, places: list[tuple[Site, str]], scores: list[Tensor], taus: list[int], budget: int) -> tuple[int, list[int], list[int | str]]:
        """(total, sensitive entries of each parameter, what is done with them) at the τ whose total is nearest to the budget, the larger of two."""
        taus = sorted({min(tau, sum(len(s) for s in scores)) for tau in taus})
        hits = selection(scores, taus)
        plans = [self.plan(places, each) for each in hits]
        nearest = min(range(len(taus)), key=lambda i: (abs(plans[i][0] - budget), -taus[i]))
        return plans[nearest][0], hits[nearest], plans[nearest][1]

    def allot(self, model, configs, by_path):
        places = [(by_path[path], name) for path in configs for name in by_path[path].names]
        scores = [(s.squares if name == s.weight else s.seen["squares"].get(name, torch.zeros_like(s.values[name]))).flatten() for s, name in places]
        if not any(s.any() for s in scores):
            raise TunesmithError(f"{self.method}: every gradient on the calibration data is zero, so that nothing is more sensitive than the rest; start the head at random")
        budget = self.budget or max(1, sum(p.numel() for p in model.parameters()) // 200)
        taus, most = [ceil(share * budget) for share in SWEEP], sum(len(s) for s in scores)
        while (chosen := self.choose(places, scores, taus, budget))[0] < 0.95 * budget and taus[-1] < most:
            taus += [ceil(taus[-1] * 1.1**k) for k in range(1, 9)]
        _, hits, plans = chosen
        own = {}
        for (site, name), score, count, plan in zip(places, scores, hits, plans, strict=True):
            if not count:
                continue
            config = own.setdefault(site.path, configs[site.path].model_copy(update={"vectors": {}}))
            if plan == "module":
                config.structured = True
                continue
            number = len(score) if plan == "whole" else count
            config._chosen = config._chosen | {name: top(score, number)}
            if name == site.weight:
                config.entries = number
            else:
                config.vectors[name] = number
        return own

    def layer(self, site):
        return SPTLayer(self, site)

    def count(self, site):
        return self.structured * self.cost(site) + self.entries + sum(self.vectors.values()) if site.weight else sum(self.vectors.values())


class SPTLoRA(SPT):
    """SPT-LoRA (He et al. 2023, arXiv 2303.08566): a matrix with many sensitive entries gets LoRA, U D x beside W x, without a scale; see `SPT`."""

    method, title, module = "spt-lora", "Sensitivity-aware tuning with LoRA", "lora"


class SPTAdapter(SPT):
    """SPT-Adapter (He et al. 2023, arXiv 2303.08566): a matrix with many sensitive entries gets an adapter behind it, y + U GELU(D y + d) + u; see `SPT`."""

    method, title, module = "spt-adapter", "Sensitivity-aware tuning with adapters", "adapter"
    mergeable = False
    works_on = ("linear", "norm")
