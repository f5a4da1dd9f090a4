"""AdaLoRA: low-rank changes in the form of a singular value decomposition, whose ranks are given out while training."""

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..engine.adapter import Adapter, WeightAdapter
from ..engine.model import adapters as adapters_of
from ..engine.sites import Site, sites
from ..errors import TunesmithError
from .lora import LoRALayer, refuse_peft_options
from .method import Dropout, Method, Rank, empty
from .peft_targets import check_paths, exactly

Beta = Annotated[float, Field(gt=0, lt=1)]


class TripletLayer(LoRALayer):
    """y = base(x) + s·B diag(E) A drop(x), E (r,) starting at 0; a subclass adds A (r, in) and B (out, r)."""

    def __init__(self, config: Method, site: Site, rank: int):
        WeightAdapter.__init__(self)
        self.scale, self.dropout, self.bias = config.scale, config.dropout, None
        self.E = empty(rank, like=site.parameter)
        nn.init.zeros_(self.E)

    def factors(self):
        return self.A, self.B * self.E


class AdaLoRALayer(TripletLayer):
    """A triplet of its own at each site."""

    def __init__(self, config: "AdaLoRA", site: Site):
        rank = config.rank if config.kept is None else config.kept
        super().__init__(config, site, rank)
        self.budget = min(config.final_rank, rank)
        self.A, self.B = empty(rank, site.in_features, like=site.parameter), empty(site.out_features, rank, like=site.parameter)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)


def ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """The number of non-zero coefficients E at each site of an adapter that has them (adalora, s2-lora), by site path."""
    return {path: int(a.E.count_nonzero()) for path, a in adapters_of(model, name).items() if isinstance(a, TripletLayer)}


def orthogonality(factors: list[Tensor]) -> Tensor:
    """The mean of ‖F Fᵀ − I‖, Frobenius norm, over the factors F (r, d), in their own precision."""
    groups: dict[tuple, list[Tensor]] = {}
    for F in factors:
        groups.setdefault((F.shape, F.dtype, F.device), []).append(F)
    norms = []
    with torch.autocast(factors[0].device.type, enabled=False):
        for (shape, dtype, device), same in groups.items():
            F = torch.stack(same)
            norms.append(torch.linalg.vector_norm(F @ F.mT - torch.eye(shape[0], dtype=dtype, device=device), dim=(1, 2)).to(factors[0].device))
    return torch.cat(norms).mean()


class RankAllocator:
    """The schedule of AdaLoRA's Algorithm 1: scores every triplet, and zeroes the E of those beyond the budget.

    Steps count from 0. Until `first` the budget is all ranks; then it falls as a cubic to its last value at step `last`;
    from there on the mask is fixed and E is masked after every step.
    """

    def __init__(self, config: "AdaLoRA", layers: list[AdaLoRALayer], total_steps: int):
        self.layers, self.betas, self.interval, self.done = layers, (config.beta1, config.beta2), config.deltaT, 0
        self.first = total_steps // 10 if config.tinit is None else config.tinit
        self.last = total_steps - (total_steps // 2 if config.tfinal is None else config.tfinal)
        if self.first >= self.last:
            raise TunesmithError(
                f"adalora has no steps left to give out ranks in: {total_steps} steps, the first {self.first} (tinit) and the last "
                f"{total_steps - self.last} (tfinal) without; lower tinit or tfinal, or train longer"
            )
        self.start, self.target = sum(len(layer.E) for layer in layers), sum(layer.budget for layer in layers)
        self.mean = [torch.zeros_like(p) for p in self._parameters()]
        self.spread = [torch.zeros_like(p) for p in self._parameters()]
        self.kept: list[Tensor] = []  # per layer (r,), the coefficients that the latest mask left

    def _parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in (layer.E, layer.A, layer.B)]

    def budget(self, step: int) -> int:
        """How many ranks all sites together may have at a step."""
        if step <= self.first:
            return self.start
        left = max(1 - (step - self.first) / (self.last - self.first), 0)
        return int((self.start - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self) -> None:
        step, self.done = self.done, self.done + 1
        if step < self.last:
            self._weigh()
        if step == self.last or (self.first < step < self.last and step % self.interval == 0):
            self.kept = self._best(self.budget(step))
        elif step < self.last:
            return  # E is free until the next mask, as in the authors' code
        if step == self.last:
            self.mean, self.spread = [], []
        for layer, kept in zip(self.layers, self.kept, strict=True):
            layer.E.masked_fill_(~kept, 0)

    def _weigh(self) -> None:
        """Eq. 8 to 10: sensitivity |θ·∂θ|, its running mean, and the running mean of its distance from that."""
        parameters = self._parameters()
        now = torch._foreach_mul(parameters, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.mean, now, 1 - self.betas[0])
        torch._foreach_sub_(now, self.mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.spread, now, 1 - self.betas[1])

    def _best(self, budget: int) -> list[Tensor]:
        """Masks of the triplets that score above the (all − budget)-th lowest, over all sites (eq. 7)."""
        E, A, B = ([m * s for m, s in zip(self.mean[i::3], self.spread[i::3], strict=True)] for i in range(3))
        scores = [e + a.mean(1) + b.mean(0) for e, a, b in zip(E, A, B, strict=True)]
        if budget >= self.start:
            return [torch.ones_like(s, dtype=torch.bool) for s in scores]
        threshold = torch.cat([s.to(scores[0].device) for s in scores]).kthvalue(self.start - budget).values
        return [s > threshold.to(s.device) for s in scores]

    def state_dict(self) -> dict:
        return {"done": self.done, "mean": self.mean, "spread": self.spread, "kept": self.kept}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
        self.mean, self.spread = ([t.to(p.device, copy=True) for t, p in zip(state[k], self._parameters(), strict=False)] for k in ("mean", "spread"))
        self.kept = [t.to(layer.E.device, copy=True) for t, layer in zip(state["kept"], self.layers, strict=False)]


class AdaLoRA(Method):
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, eq. 3): W + α/(r + 10⁻⁵)·B diag(E) A, r being the rank at the start.

    The ranks left to each site are decided while training (`stage`), by the importance of each triplet over all sites,
    down to `target_rank` on average; A and B are held near orthonormal by `auxiliary_loss` (eq. 4). By default the first
    tenth of the steps keeps all ranks and the second half fine-tunes with the ranks that are left: about what the paper's
    own runs have. As in the authors' code and peft, with `deltaT` > 1 a zeroed E may grow again until the next mask, up
    to the last one. Pruned triplets stay in the tensors with E = 0; `ranks(model)` counts the others.
    """

    method, family, title, paper = "adalora", "low-rank", "Adaptive budget allocation for low-rank adaptation", "arXiv:2303.10512"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-3

    rank: Rank = Field(12, description="rank of every site at the start (init_r)")
    target_rank: Rank | None = Field(None, description="mean rank of the sites at the end (default: two thirds of rank)")
    alpha: PositiveFloat = 16
    dropout: Dropout = 0.0
    tinit: NonNegativeInt | None = Field(None, description="steps before ranks are taken away (default: a tenth of all)")
    tfinal: NonNegativeInt | None = Field(None, description="steps at the end with the ranks that are left (default: half of all)")
    deltaT: PositiveInt = Field(1, description="steps between two allocations")
    beta1: Beta = 0.85
    beta2: Beta = 0.85
    orth_reg_weight: NonNegativeFloat = 0.5
    kept: NonNegativeInt | None = Field(None, description="triplets that a site holds where a peft file left some out; the scale is that of rank")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    @property
    def final_rank(self) -> int:
        return max(1, round(self.rank * 2 / 3)) if self.target_rank is None else self.target_rank

    def layer(self, site):
        if self.final_rank > self.rank:
            raise TunesmithError(f"adalora at {site.path!r}: target_rank={self.final_rank} is more than the rank={self.rank} it starts from; raise rank")
        return WeightAdapter() if self.kept == 0 else AdaLoRALayer(self, site)

    def count(self, site):
        return (self.rank if self.kept is None else self.kept) * (site.in_features + site.out_features + 1)

    def auxiliary_loss(self, adapters):
        layers = _layers(adapters)
        if layers and self.orth_reg_weight:
            return self.orth_reg_weight * orthogonality([F for a in layers for F in (a.A, a.B.T)])

    def stage(self, adapters, total_steps):
        layers = _layers(adapters)
        return RankAllocator(self, layers, total_steps) if layers else None

    peft_type = "ADALORA"

    def to_peft(self, configs, model):
        if len({(c.rank, c.alpha) for c in configs.values()}) > 1:
            raise TunesmithError("the peft format has one init_r and one lora_alpha for all layers of AdaLoRA; save this adapter with format='tunesmith'")
        common = next(iter(configs.values()))
        tinit, tfinal = common.tinit or 0, common.tfinal or 0
        kept = {p: common.rank if c.kept is None else c.kept for p, c in configs.items()}
        return {
            "target_modules": exactly(configs, model), "init_r": common.rank, "target_r": common.final_rank, "lora_alpha": common.alpha,
            "lora_dropout": common.dropout, "tinit": tinit, "tfinal": tfinal, "total_step": tinit + tfinal + 1, "deltaT": common.deltaT,
            "beta1": common.beta1, "beta2": common.beta2, "orth_reg_weight": common.orth_reg_weight,
            "rank_pattern": {f"{p}.lora_E": [i < k for i in range(common.rank)] for p, k in kept.items()} if set(kept.values()) != {common.rank} else None,
            "fan_in_fan_out": any(s.transposed for s in sites(model) if s.path in configs and s.kind == "linear"),
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        refuse_peft_options(fields)
        if fields.get("bias", "none") != "none":
            raise TunesmithError(f"the peft adapter trains biases beside AdaLoRA (bias={fields['bias']!r}), which tunesmith does not read")
        A = {key.removesuffix(".lora_A"): t for key, t in found.items() if key.endswith(".lora_A")}
        check_paths(fields, model, ("linear", "conv"), set(A))
        rank = fields.get("init_r", 12)
        config = cls(
            rank=rank, target_rank=min(fields.get("target_r", 8), rank), alpha=fields.get("lora_alpha", 8), dropout=fields.get("lora_dropout", 0.0),
            tinit=fields.get("tinit", 0), tfinal=fields.get("tfinal", 0), deltaT=fields.get("deltaT", 1), beta1=fields.get("beta1", 0.85),
            beta2=fields.get("beta2", 0.85), orth_reg_weight=fields.get("orth_reg_weight", 0.5), targets=sorted(A),
        )  # fmt: skip
        return config, {p: {} if len(t) == rank else {"kept": len(t)} for p, t in A.items()}

    def peft_tensors(self, site, own):
        if site.kind != "linear" and not (isinstance(site.holder, nn.Conv2d) and site.holder.groups == 1):
            raise TunesmithError(f"peft's AdaLoRA acts on linear and plain 2-d convolution layers, not on {site.path!r}; save this adapter with format='tunesmith'")
        shape = site.out_features, site.in_features
        own = own or {"A": torch.empty(0, shape[1]), "B": torch.empty(shape[0], 0), "E": torch.empty(0)}
        return {"lora_A": own["A"], "lora_B": own["B"], "lora_E": own["E"][:, None]}

    def own_tensors(self, site, theirs):
        return {key.removeprefix("lora_"): t.flatten() if key == "lora_E" else t for key, t in theirs.items() if t.numel()}


def _layers(adapters: dict[str, Adapter]) -> list[AdaLoRALayer]:
    return [a for a in adapters.values() if isinstance(a, AdaLoRALayer)]
