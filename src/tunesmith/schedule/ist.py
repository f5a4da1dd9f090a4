"""IST: at each step only some layers of a model train, those whose adapters seem to matter."""

from collections.abc import Callable
from itertools import islice
from math import comb
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ..engine.model import hubs, state_of
from ..errors import TunesmithError, invalid, nearest
from ..methods.select import layers

Share = Annotated[float, Field(gt=0, lt=1)]


class IST(BaseModel):
    """Importance-aware sparse tuning (Yao et al. 2024, arXiv 2410.11772), around any method with adapters in several layers.

    Before each step `update`·L layers are drawn to train, with the weights σ(−I); every `interval` steps `probes` sets of
    `suppress`·L layers are drawn with the weights σ(I), their adapters' effect on their layer is multiplied by `factor`, and I
    of those under which the loss stays low rises. `interval=None` leaves I at 0: random sparse tuning. The authors multiply
    LoRA's scale, which for LoRA is the same; here y = base + factor·(adapted − base) whatever the method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    update: Share = 0.25
    suppress: Share = 0.5
    factor: Annotated[float, Field(ge=0, le=1)] = 0.25
    interval: Annotated[int, Field(ge=1)] | None = 10
    probes: Annotated[int, Field(ge=1)] = 3
    rate: Annotated[float, Field(gt=0)] = 10.0

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise TunesmithError(invalid("selection ist", error, IST.model_fields)) from None

    def begin(self, model: nn.Module, total_steps: int, probe: Callable[[int], float] | None, seed: int) -> "ISTStage":
        return ISTStage(self, model, probe, seed)


def parse(value: Any) -> IST:
    """The selection that a recipe names: ist, rst (random layers), or a mapping with the key `selection` and its fields."""
    fields = {"selection": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = fields.pop("selection", None)
    if name not in ("ist", "rst"):
        raise TunesmithError(f"unknown selection {name!r}{nearest(str(name), ['ist', 'rst']) or '; there are ist and rst'}")
    return IST(**fields | ({"interval": None} if name == "rst" else {}))


def credit(I: Tensor, sets: list[list[int]], losses: list[float], rate: float) -> Tensor:
    """I (L,) after probes of which each suppressed a set of layers: I_i + η·p_i(1 − p_i)·Σ a_k over the sets with i, a = R − mean R, R = exp(−loss)."""
    rewards = torch.tensor(losses, dtype=torch.float64).neg().exp()
    advantages, p = rewards - rewards.mean(), I.double().sigmoid()
    total = torch.zeros_like(p)
    for chosen, advantage in zip(sets, advantages, strict=True):
        total[chosen] += advantage
    return (I.double() + rate * p * (1 - p) * total).to(I.dtype)


class ISTStage:
    """Chooses what trains; the parameters of other layers need no gradient, so that the optimiser leaves them as they are.

    `probe(i)` is the loss of the i-th probe batch, without gradients; it may be called several times for one i.
    """

    def __init__(self, config: IST, model: nn.Module, probe: Callable[[int], float] | None = None, seed: int = 0):
        names, depth = [name for name in state_of(model).active], layers(model)
        stacks: dict[tuple[str, int], list] = {}
        for path, hub in hubs(model).items():
            if path in depth and any(name in hub.adapters and path in state_of(model).records[name].sites for name in names):
                stack, number, _ = depth[path]
                stacks.setdefault((stack, number), []).append(hub)
        self.config, self.probe = config, probe
        self.hubs = [stacks[key] for key in sorted(stacks)]
        self.parameters = [[p for hub in own for name in names if name in hub.adapters for p in hub.adapters[name].parameters() if p.is_floating_point()] for own in self.hubs]
        count = len(self.hubs)
        if count < 2:
            raise TunesmithError(f"selection ist chooses among layers with adapters, of which this model has {count}; it takes two at least")
        self.updated, self.suppressed = max(1, int(config.update * count)), min(max(1, int(config.suppress * count)), count - 1)
        self.I, self.done, self.updates = torch.zeros(count), 0, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.choose()

    def draw(self, weights: Tensor, count: int) -> list[int]:
        return torch.multinomial(weights, count, generator=self.generator).tolist()

    def choose(self) -> None:
        """The layers of the next step."""
        self.active = sorted(self.draw(self.I.neg().sigmoid(), self.updated))
        self.apply()

    def apply(self) -> None:
        chosen = {id(p) for i in self.active for p in self.parameters[i]}
        for p in (p for own in self.parameters for p in own):
            p.requires_grad_(id(p) in chosen)

    def step(self) -> None:
        self.done += 1
        if self.config.interval and self.probe and self.done % self.config.interval == 0:
            self.learn()
        self.choose()

    def learn(self) -> None:
        """Probe, and credit the layers that could be suppressed."""
        wanted = min(self.config.probes, comb(len(self.I), self.suppressed))
        draws = (tuple(sorted(self.draw(self.I.sigmoid(), self.suppressed))) for _ in iter(int, 1))
        seen: dict[tuple[int, ...], None] = {}
        for chosen in islice(draws, 1000 * wanted):
            seen.setdefault(chosen)
            if len(seen) == wanted:
                break
        sets = [list(chosen) for chosen in seen]
        self.I = credit(self.I, sets, [self.loss_without(chosen) for chosen in sets], self.config.rate)
        self.updates += 1

    def loss_without(self, chosen: list[int]) -> float:
        """The loss of the present probe batch with these layers' adapters suppressed."""
        suppressed = [hub for i in chosen for hub in self.hubs[i]]
        for hub in suppressed:
            hub.gate = self.config.factor
        try:
            return self.probe(self.updates)
        finally:
            for hub in suppressed:
                hub.gate = 1.0

    def state_dict(self) -> dict:
        return {"I": self.I, "done": self.done, "updates": self.updates, "active": self.active, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.I, self.done, self.updates, self.active = state["I"], state["done"], state["updates"], list(state["active"])
        self.generator.set_state(state["generator"])
        self.apply()
