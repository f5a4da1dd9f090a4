"""ID³: the scalars that train are chosen while training, a few more at every step; and the masks that are chosen once."""

from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, PositiveInt, PrivateAttr
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.fused import sparse_change, sparse_linear
from ..engine.sites import Site
from ..errors import TunesmithError
from .entries import top
from .method import Method, empty, parse


class ID3Layer(WeightAdapter):
    """Every parameter θ of a site is θ + v at chosen flat positions, which may become more. A weight is counted as W (out, in)."""

    grows = True

    def __init__(self, config: "ID3", site: Site):
        super().__init__()
        self.config, self.matrix, self.bias = config, site.weight, site.bias
        self.v = nn.ParameterDict()
        self.limits, self.wanted, self.best = {}, 0, {}
        for name, p in site.values.items():
            size, kept = p.numel(), config.kept.get(name, 0)
            index = config._chosen.get(name, torch.arange(kept))
            self.v[name] = nn.init.zeros_(empty(kept, like=p))
            self.register_buffer(f"index_{name}", index.to(p.device, torch.int32 if size < 2**31 else torch.int64))
            self.limits[f"index_{name}"] = size

    def index(self, name: str) -> Tensor:
        return getattr(self, f"index_{name}")

    def moved(self, name: str, theta: Tensor) -> Tensor:
        """A parameter with its chosen entries changed."""
        v = self.v[name]
        out = theta.to(torch.promote_types(theta.dtype, v.dtype)).flatten().scatter_add(0, self.index(name).long(), v).view(theta.shape)
        if self.wanted and out.requires_grad:
            out.register_hook(partial(self.watch, name, theta))
        return out

    def merged(self, W, b):
        return self.moved(self.matrix, W), b if b is None else self.moved(self.bias, b)

    def fold(self, site, values):
        if self.matrix:
            return super().fold(site, values)
        return values | {name: self.moved(name, values[name]).to(values[name].dtype) for name in self.v}

    def forward(self, base, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, *args, **kwargs)
        v, index = self.v[self.matrix], self.index(self.matrix)
        if not base.plain:
            y = base(*args) + sparse_change(*args, v, index, None, base.site.out_features)
            return y if self.bias is None else y + (self.moved(self.bias, base.b) - base.b).to(y.dtype)
        watch = partial(self.watch, self.matrix, base.W) if self.wanted else None
        return sparse_linear(*args, base.W, base.b if self.bias is None else self.moved(self.bias, base.b), v, index, None, watch=watch)

    @torch.no_grad()
    def watch(self, name: str, theta: Tensor, g: Tensor) -> None:
        """Keep the gradient of what scores highest and does not train yet."""
        score = score_of(theta, g, self.config.exp, self.config.eps).index_fill_(0, self.index(name).long(), -1)
        positions = top(score, min(self.wanted, len(score)))
        positions = positions[score[positions] >= 0]
        self.best[name] = positions, score[positions], g.flatten()[positions]

    def resize(self, name: str, values: Tensor) -> None:
        v = self.v[name]
        v.grad = None
        v.data = values.to(torch.float16)  # at a change of dtype autograd forgets the old shape
        v.data = values

    @torch.no_grad()
    def grow(self, name: str, positions: Tensor, grads: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """More positions, at zero and with their gradients; the optimiser's state of them is zero too."""
        v, old = self.v[name], self.index(name)
        order = torch.cat([old, positions.to(old)]).argsort()

        def wider(t: Tensor, more: Tensor) -> Tensor:
            return torch.cat([t, more.to(t)])[order]

        nothing, shape = torch.zeros(len(positions), device=v.device), v.shape
        grad = torch.zeros_like(v) if v.grad is None else v.grad
        old.data = wider(old.data, positions)
        self.resize(name, wider(v.data, nothing))
        v.grad = wider(grad, grads)
        for key, held in (optimizer.state.get(v, {}) if optimizer else {}).items():
            if isinstance(held, Tensor) and held.shape == shape and key != "step":
                optimizer.state[v][key] = wider(held, nothing)


def score_of(theta: Tensor, g: Tensor, exp: float, eps: float) -> Tensor:
    """D³, the score of ID³: |∂θ|/(|θ| + ε)^exp, flat and in float32 at least; −1, never chosen, where it is not finite."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    score = g.flatten().to(dtype).abs() / (theta.flatten().to(dtype).abs() + eps) ** exp
    return score.nan_to_num_(nan=-1, posinf=-1)


class Schedule:
    """Which scalars train is decided before every optimiser step: u_t more of them, the budget's equal share (rest first)."""

    def __init__(self, budget: int, total_steps: int):
        self.budget, self.total, self.done, self.ready = budget, total_steps, 0, False

    def quota(self) -> int:
        """u_t of the step to come; steps beyond the planned ones add nothing."""
        share, rest = divmod(self.budget, self.total)
        return (share + (self.done < rest)) * (self.done < self.total)

    def step(self) -> None:
        if not self.ready:
            raise TunesmithError("id3 chooses what trains between backward and the optimiser's step: call stages.before_step(optimizer) there")
        self.done, self.ready = self.done + 1, False


class Growth(Schedule):
    """Of the base's own parameters: the scores are those of the step's last backward, of which each site keeps its best."""

    def __init__(self, layers: list[ID3Layer], total_steps: int):
        super().__init__(layers[0].config.budget, total_steps)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise TunesmithError("id3 chooses by the gradients of one process, and several would choose differently; run it on one, or over another method")
        self.layers = layers
        for layer in layers:
            layer.wanted = self.quota()

    def before_step(self, optimizer):
        self.ready = True
        places = [(layer, name) for layer in self.layers for name in layer.best]
        if (quota := self.quota()) and places:
            where = places[0][0].best[places[0][1]][0].device
            owner = torch.cat([torch.full((len(layer.best[name][0]),), i, device=where) for i, (layer, name) in enumerate(places)])
            positions, scores, grads = (torch.cat([layer.best[name][part].to(where) for layer, name in places]) for part in range(3))
            chosen = top(scores, min(quota, len(scores)))
            for i in owner[chosen].unique().tolist():
                layer, name = places[i]
                mine = chosen[owner[chosen] == i]
                layer.grow(name, positions[mine], grads[mine], optimizer)
                layer.config.kept[name] = len(layer.v[name])
        for layer in self.layers:
            layer.best = {}

    def step(self):
        super().step()
        for layer in self.layers:
            layer.wanted = self.quota()

    def state_dict(self):
        return {"done": self.done, "index": [{name: layer.index(name) for name in layer.v} for layer in self.layers]}

    def load_state_dict(self, state):
        self.done = state["done"]
        for layer, saved in zip(self.layers, state["index"], strict=True):
            layer.wanted = self.quota()
            for name, index in saved.items():
                layer.index(name).data = index.to(layer.index(name).device, copy=True)
                layer.resize(name, layer.v[name].data.new_zeros(len(index)))
                layer.config.kept[name] = len(index)


class Masks(Schedule):
    """Of another method's trained parameters, which are small: their gradients are masked."""

    def __init__(self, config: "ID3", parameters: list[nn.Parameter], total_steps: int):
        super().__init__(config.budget, total_steps)
        self.config, self.parameters = config, parameters
        self.masks = [torch.zeros(p.numel(), dtype=torch.bool, device=p.device) for p in parameters]

    @torch.no_grad()
    def before_step(self, optimizer):
        self.ready = True
        known = [(p, mask) for p, mask in zip(self.parameters, self.masks, strict=True) if p.grad is not None]
        if (quota := self.quota()) and known:
            scores = [score_of(p, p.grad, self.config.exp, self.config.eps).masked_fill_(mask, -1).to(known[0][0].device) for p, mask in known]
            chosen = top(flat := torch.cat(scores), min(quota, len(flat)))
            new = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, chosen[flat[chosen] >= 0], True)
            for (_, mask), part in zip(known, new.split([len(s) for s in scores]), strict=True):
                mask |= part.to(mask.device)
        for p, mask in known:
            p.grad.mul_(mask.view_as(p))

    def state_dict(self):
        return {"done": self.done, "masks": self.masks}

    def load_state_dict(self, state):
        self.done = state["done"]
        self.masks = [mask.to(p.device, copy=True) for mask, p in zip(state["masks"], self.parameters, strict=True)]


class ID3(Method):
    """ID³ (Agarwal et al. 2025, arXiv 2408.14470): single scalars train, at the end `budget` of them, chosen over all layers.

    `mask="id3"`: at each of T steps the budget/T scalars of highest |∂θ|/(|θ| + ε)^exp that do not train yet are added, so
    that a run updates half as many scalars as with a mask chosen at once. The other masks are: `pafi`, the smallest |θ| of
    the base (Liao et al. 2023); `fisher`, the largest sums of squared gradients over the calibration's backwards (FISH,
    Sung et al. 2021: one row a backward for per-example squares); `gradient`, the largest |Σ∂θ|; `magnitude`, the largest |θ|.
    Ties go to the lower position, where the authors' code may train too few or too many. Values and moments exist for
    chosen scalars alone; each layer's whole gradient, which the scores need, lives only inside its backward. Where a step
    has several backwards, scores and the new scalars' first gradient are those of the last. The choice is made by
    `ts.stages`, without which nothing trains with `mask="id3"`. `over`: another method among whose trained parameters is
    chosen, instead of the base's.
    """

    method, family, title, paper = "id3", "selective", "Incremental dynamic unmasking", "arXiv:2408.14470"
    works_on = ("linear", "embedding", "conv", "attention", "norm", "other")
    default_lr = 2e-3

    budget: PositiveInt | None = Field(None, description="scalars that train at the end; None: half a per cent of those there are")
    mask: Literal["id3", "pafi", "fisher", "gradient", "magnitude"] = "id3"
    exp: float = Field(1.0, ge=-10, le=100, description="exponent of |θ| in the score")
    eps: NonNegativeFloat = Field(0.1, description="ε of the score")
    over: dict | str | None = Field(None, description="a method among whose trained parameters is chosen, such as lora")
    kept: dict[str, int] = Field({}, description="how many scalars of each parameter train; filled in")
    _chosen: dict = PrivateAttr(default_factory=dict)

    @property
    def inner(self) -> Method | None:
        return self.over and parse(self.over)

    @property
    def calibrated(self):
        return self.inner.calibrated if self.over else {"fisher": ("squares",), "gradient": ("gradient",)}.get(self.mask, ())

    def select(self, model):
        if not self.over:
            return super().select(model)
        if self.mask != "id3" or not self.budget:
            raise TunesmithError("id3 over another method needs a budget, and knows mask='id3' alone")
        inner = self.inner.model_copy(update=self.model_dump(include=self.model_fields_set & {"targets"}))
        return {path: (site, {}) for path, (site, _) in inner.select(model).items()}

    def allot(self, model, configs, by_path):
        if self.over:
            return configs
        places = [(path, name, p) for path in configs for name, p in by_path[path].values.items()]
        budget = self.budget or max(1, sum(p.numel() for *_, p in places) // 200)
        own = {path: config.model_copy(update={"budget": budget, "kept": dict.fromkeys(by_path[path].names, 0)}) for path, config in configs.items()}
        if self.mask == "id3":
            return own
        best = []
        for i, (path, name, _) in enumerate(places):
            scores = self._score(by_path[path], name)
            positions = top(scores, min(budget, len(scores)))
            best.append((torch.full_like(positions, i), positions, scores[positions]))
        owner, positions, scores = (torch.cat([each[part].to(best[0][0].device) for each in best]) for part in range(3))
        chosen = top(scores, min(budget, len(scores)))
        for i in owner[chosen].unique().tolist():
            path, name, _ = places[i]
            own[path]._chosen = own[path]._chosen | {name: positions[chosen[owner[chosen] == i]]}
            own[path].kept[name] = len(own[path]._chosen[name])
        return {path: config for path, config in own.items() if any(config.kept.values())}

    def _score(self, site: Site, name: str) -> Tensor:
        """What a fixed mask takes the largest of, flat."""
        values = site.seen[self.calibrated[0]] if self.calibrated else site.values
        found = (site.matrix(values)[0] if name == site.weight else values[name]).detach().flatten()
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return -found.abs() if self.mask == "pafi" else found.abs()

    def build(self, model, configs, by_path):
        if not self.over:
            return super().build(model, configs, by_path)
        return self.inner.build(model, dict.fromkeys(configs, self.inner), by_path)

    def layer(self, site):
        return ID3Layer(self, site)

    def count(self, site):
        if self.over:
            return self.inner.count(site)
        return sum(self.kept.values()) if self.kept else max(1, sum(p.numel() for p in site.values.values()) // 200)

    def param_groups(self, adapters, lr):
        return self.inner.param_groups(adapters, lr) if self.over else super().param_groups(adapters, lr)

    def auxiliary_loss(self, adapters):
        return self.inner.auxiliary_loss(adapters) if self.over else None

    def stage(self, adapters, total_steps):
        if self.over:
            return Masks(self, list({id(p): p for a in adapters.values() for p in a.parameters()}.values()), total_steps)
        return Growth(list(adapters.values()), total_steps) if self.mask == "id3" else None
