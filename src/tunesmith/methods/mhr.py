"""Poly and MHR: an inventory of LoRA skills, mixed for each task by learned logits; and new tasks from a trained inventory."""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter, apart
from ..engine.fused import grouped_change, grouped_lowrank_linear
from ..engine.model import Record, attach, detach, hubs, record_of, unwrap
from ..engine.sites import Site
from ..errors import TunesmithError, nearest
from .lora import LoRA, LoRALayer
from .method import Method, Rank, empty


class PolyLayer(LoRALayer):
    """LoRA whose factors are those of a task t: block q of A_t is Σ_s w_tqs A_qs, of B_t Σ_s w_tqs B_qs, w_tq ∝ σ(Z_tq).

    A (Q, S, in/Q, r), B (Q, S, r, out/Q), Z (tasks, Q·S) with the skill fastest.
    """

    dropout, bias = 0.0, None

    def __init__(self, config: "Poly", site: Site):
        WeightAdapter.__init__(self)
        Q, S, r, (out, size) = config.n_splits, config.n_skills, config.rank, site.shape
        if out % Q or size % Q:
            raise TunesmithError(f"{config.method}: n_splits={Q} cannot cut {site.path!r} ({size} inputs, {out} outputs) into equal blocks; choose a divisor of both, or leave the layer out of the targets")
        self.site, self.scale, self.relaxed = site, config.alpha / r, config.relaxed_bernoulli
        for name, shape in (("A", (Q, S, size // Q, r)), ("B", (Q, S, r, out // Q))):
            skills = empty(*shape, like=site.parameter)
            setattr(self, name, skills) if config.variant == "full" else self.register_buffer(name, skills.data)
        self.Z = empty(config.n_tasks, Q * S, like=site.parameter)
        nn.init.uniform_(self.A, -((3 * size) ** -0.5), (3 * size) ** -0.5)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.Z, -1e-3, 1e-3)

    def tasks(self) -> list[int]:
        """The task of each equal part of the batch."""
        ids, known = self.site.holder.tunesmith.state.tasks, len(self.Z)
        if ids is None and known > 1:
            raise TunesmithError(f"{self.site.path!r} routes by task and knows {known}: run the model inside `with tunesmith.tasks(model, ids):`, an id from 0 to {known - 1} for each row of the batch")
        ids = [0] if ids is None else ids.tolist()
        if ids and not 0 <= min(ids) <= max(ids) < known:
            raise TunesmithError(f"{self.site.path!r} knows the tasks 0 to {known - 1}, and a row of the batch is of task {max(ids) if max(ids) >= known else min(ids)}")
        return ids

    def weights(self, tasks: list[int], noise: Tensor | float = 0.0) -> Tensor:
        """(n, Q, S) of n tasks, summing to 1 over the skills; `noise` (n, Q, S) is added to their logits."""
        chances = torch.sigmoid(self.Z[torch.tensor(tasks, device=self.Z.device)].view(-1, *self.A.shape[:2]) + noise)
        return chances / (chances.sum(-1, keepdim=True) + 1e-12)

    def blend(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(A (n, r, in), B (n, out, r)) of weights (n, Q, S)."""
        return torch.einsum("nqs,qsdr->nrqd", w, self.A).flatten(2), torch.einsum("nqs,qsrd->nqdr", w, self.B).flatten(1, 2)

    def factors(self):
        tasks = set(self.tasks())
        if len(tasks) > 1:
            raise TunesmithError(f"{self.site.path!r} takes one matrix, and each task has its own: name one task with `with tunesmith.tasks(model, [task]):`")
        A, B = self.blend(self.weights(list(tasks)))
        return A[0], B[0]

    def forward(self, base, x, *args, **kwargs):
        tasks, site = self.tasks(), base.site
        noisy = self.relaxed and self.training and site.kind == "linear"
        if len(set(tasks)) == 1 and not noisy:
            return super().forward(base, x, *args, **kwargs)
        self.site.holder.tunesmith.state.tasks_of(len(x))  # raises where the rows do not fit
        if site.kind != "linear":
            return self._by_task(base, x, tasks)
        if noisy:
            tasks = tasks if x.dim() == 2 else [task for task in tasks for _ in range(len(x) // len(tasks))]
            A, B = self.blend(self.weights(tasks, logistic(self.Z.new_empty(len(tasks), *self.A.shape[:2]))))
        else:
            distinct = sorted(set(tasks))
            index = torch.tensor([distinct.index(task) for task in tasks], device=x.device)
            A, B = (factor[index] for factor in self.blend(self.weights(distinct)))
        if base.plain:
            return grouped_lowrank_linear(x, base.W, base.b, A, B, self.scale)
        return base(x, *args, **kwargs) + grouped_change(x, A, B, self.scale)

    def _by_task(self, base, x, tasks):
        """The rows of each task apart, put together again."""
        state = self.site.holder.tunesmith.state
        before = state.tasks

        def run(task, _, x):
            state.tasks = torch.tensor([task])
            return super(PolyLayer, self).forward(base, x)

        try:
            return apart(tasks, run, (x,), {})
        finally:
            state.tasks = before


def logistic(like: Tensor) -> Tensor:
    """log u − log(1 − u), u ~ U(0, 1): with it, σ(logits + noise) is a relaxed Bernoulli of temperature 1."""
    u = torch.rand_like(like)
    return u.log() - (-u).log1p()


class Poly(Method):
    """Polytropon (Ponti et al. 2022, arXiv 2202.13914): each task's LoRA is a mixture of `n_skills` shared ones.

    W' = W + (α/r)·(A_t B_t)ᵀ, A_t and B_t being averaged apart, by weights σ(Z_t) normalised over the skills. With
    `n_tasks` > 1 run the model inside `tunesmith.tasks(model, ids)`; `merge` there merges the one task that is named.
    Z trains with `router_lr_ratio` times the learning rate and no weight decay, as in the authors' code.
    Scaled by α/r = 1 and averaged, skills move slower than a LoRA's factors at the same rate.
    `relaxed_bernoulli` adds noise to each row's logits while training, on linear layers (off in the authors' T0 runs).
    `variant="z"` trains Z alone, on skills that are there: see `few_shot`.
    """

    method, family, title, paper = "poly", "routed", "Polytropon: modular skills mixed by task", "arXiv:2202.13914"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 1e-2

    rank: Rank = 1
    alpha: PositiveFloat = 1
    n_tasks: PositiveInt = 1
    n_skills: PositiveInt = 8
    n_splits: PositiveInt = Field(1, description="blocks of inputs and outputs that are mixed apart")
    relaxed_bernoulli: bool = False
    router_lr_ratio: PositiveFloat = Field(100, description="learning rate of the routing over that of the skills")
    variant: Literal["full", "z"] = Field("full", description='"z": only the routing trains')

    def select(self, model):
        if self.variant == "z":
            raise TunesmithError(f"{self.method}: variant='z' routes skills that are trained already: train with variant='full', then few_shot(model, variant='z')")
        return super().select(model)

    def for_tasks(self, count):
        if count and "n_tasks" not in self.model_fields_set:
            return self.model_copy(update={"n_tasks": count})
        if self.n_tasks > 1 and not count:
            raise TunesmithError(f"{self.method}: n_tasks={self.n_tasks} and the data name no tasks; say which column does, columns: {{task: …}}")
        if self.n_tasks < count:
            raise TunesmithError(f"{self.method}: n_tasks={self.n_tasks} is fewer than the {count} tasks of the data; leave it out")
        return self

    def layer(self, site):
        return PolyLayer(self, site)

    def count(self, site):
        skills = self.n_skills * self.rank * (site.in_features + site.out_features) if self.variant == "full" else 0
        return skills + self.n_tasks * self.n_splits * self.n_skills

    def param_groups(self, adapters, lr):
        (group,) = super().param_groups(adapters, lr)
        routing = {id(a.Z): a.Z for a in adapters.values() if isinstance(a, PolyLayer) and a.Z.requires_grad}
        skills = group | {"params": [p for p in group["params"] if id(p) not in routing]}
        return [skills, {"params": list(routing.values()), "lr": lr * self.router_lr_ratio, "weight_decay": 0.0}]


class MHR(Poly):
    """Multi-head routing (Caccia et al. 2023, arXiv 2211.03831): Poly with inputs and outputs cut into `n_splits` blocks,
    each mixed by weights of its own; the same weights mix block q of A and block q of B."""

    method, title, paper = "mhr", "Multi-head adapter routing", "arXiv:2211.03831"
    n_splits: PositiveInt = Field(8, description="blocks of inputs and outputs that are mixed apart")


def few_shot(model: nn.Module, name: str = "default", variant: Literal["z", "mu", "full"] = "z", n_tasks: int = 1) -> nn.Module:
    """Let a trained poly or mhr adapter start on `n_tasks` new tasks, in place; it becomes the active one. Returns the model.

    `full` trains skills and new routing; `z` (MHR-z) trains the new routing alone. The trained tasks' routing is dropped:
    save the adapter first to keep serving them. `mu` (MHR-μ) averages the skills into one LoRA adapter without routing,
    which trains n_skills times fewer numbers than keeping the skills at fixed equal weights, as the authors' code does;
    with Adam it moves about as fast, with SGD n_skills times faster. All three start from the same average.
    Raises `TunesmithError` for a name or variant that is not there, and for an adapter without skills.
    """
    if variant not in ("z", "mu", "full"):
        raise TunesmithError(f"few_shot knows no variant {variant!r}{nearest(str(variant), ('z', 'mu', 'full'))}; there are 'z', 'mu' and 'full'")
    root, record = unwrap(model), record_of(model, name)
    places = {path: hub for path, hub in hubs(root).items() if name in hub.adapters}
    if not any(isinstance(hub.adapters[name], PolyLayer) for hub in places.values()):
        raise TunesmithError(f"adapter {name!r} ({record.config.method}) has no skills to start from; few_shot is for poly and mhr")

    def new(config: Method) -> Method:
        if not isinstance(config, Poly):
            return config
        common = config.model_dump(include={"targets", "modules_to_save", "rank", "alpha"})
        return LoRA(**common) if variant == "mu" else type(config)(**config.model_dump() | {"variant": variant, "n_tasks": n_tasks})

    configs = {path: new(config) for path, config in record.sites.items()}
    built = {}
    for path, hub in places.items():
        old = hub.adapters[name]
        built[path] = hub.site, old
        if isinstance(old, PolyLayer):
            adapter = configs[path].layer(hub.site)
            A, B = (old.A, old.B) if variant != "mu" else (old.A.mean(1).flatten(0, 1).T, old.B.mean(1).movedim(1, 2).flatten(0, 1))
            with torch.no_grad():
                adapter.A.copy_(A), adapter.B.copy_(B)
            built[path] = hub.site, adapter
    detach(root, name)
    attach(root, name, Record(new(record.config), configs, record.lineage), built)
    return model
