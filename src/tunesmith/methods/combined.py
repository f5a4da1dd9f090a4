"""Several methods as one: their adapters stacked where they meet, trained, saved and switched together."""

from typing import Any

from pydantic import Field, field_validator
from torch import nn

from ..engine.adapter import Adapter, Stacked
from ..engine.tokens import TokenAdapter
from ..errors import TunesmithError
from .method import Method, in_layers, override, parse, selected

ALL = ("linear", "embedding", "conv", "attention", "norm", "other", "tokens")


class CombinedLayer(Adapter):
    """The adapters of a site, the first below the others, but for what has to be outermost."""

    def __init__(self, adapters: dict[str, Adapter]):
        super().__init__()
        adapters = dict(sorted(adapters.items(), key=lambda item: item[1].outermost))
        self.parts = nn.ModuleDict(adapters)  # by the number of the part
        if hidden := [adapter for adapter in list(adapters.values())[1:] if adapter.replaces]:
            raise TunesmithError(f"{type(hidden[0]).__name__} stands for the whole weight, and parts before it would have no effect; put it first")
        stuck = [adapter for adapter in adapters.values() if not adapter.mergeable]
        self.mergeable, self.grows = not stuck, any(adapter.grows for adapter in adapters.values())
        self.why_not = stuck[0].why_not if stuck else ""
        self.limits = {f"parts.{i}.{name}": limit for i, adapter in adapters.items() for name, limit in adapter.limits.items()}

    def forward(self, base, *args, **kwargs):
        for adapter in self.parts.values():
            base = Stacked(adapter, base, 1.0)
        return base(*args, **kwargs)

    @classmethod
    def mixed(cls, base, rows, *args, **kwargs):
        tokens = any(isinstance(adapter, TokenAdapter) for row in rows if row for adapter in row.parts.values())
        return (TokenAdapter if tokens else Adapter).mixed.__func__(cls, base, rows, *args, **kwargs)

    def fold(self, site, values):
        for adapter in self.parts.values():
            values = adapter.fold(site, values)
        return values


class Combined(Method):
    """Parts that train together, such as a parallel adapter and prefix tuning (MAM: He et al. 2022, arXiv 2110.04366) or UniPELT's.

    `parts` are names or mappings as anywhere; `layers` holds for all of them, beside their own. Where parts meet, the first is
    nearest to the weight, and what it computes is the base of the next (a prompt stands before a prefix in any order). The rate 1e-3 gives each part its own default rate,
    another one as many times more or less. `targets` are those of the parts that have none and can act there.
    """

    method, family, title, paper = "combined", "composite", "Several methods at once", "arXiv:2110.04366"
    works_on = ALL

    parts: list[str | dict[str, Any]] = Field(["lora", "ln-tuning"], min_length=1)
    numbers: list[int] = Field([], description="at a site: which of the whole's parts these are; all, where it is the method of that site alone")

    @field_validator("parts")
    @classmethod
    def known(cls, parts):
        for part in parts:
            config = parse(part)
            if config.method == cls.method or config.modules_to_save:
                raise TunesmithError("a part of combined is one method, and modules_to_save stand beside the parts, not in one")
            if type(config).stage is not Method.stage or type(config).allot is not Method.allot:
                raise TunesmithError(f"{config.method} changes while it trains, or shares a budget over layers, and cannot be a part of combined")
        return parts

    @property
    def configs(self) -> list[Method]:
        """The parts' configs."""
        return [parse(part) for part in self.parts]

    own_layers = True

    def select(self, model):
        found, errors = {}, []
        for i, config in enumerate(self.configs):
            whole = self.model_dump(include=(self.model_fields_set & {"targets"}) - config.model_fields_set) | {"modules_to_save": self.modules_to_save}
            if config.own_layers and self.layers is not None:
                if config.layers is not None:
                    raise TunesmithError(f"layers stand in combined and in its part {config.method}, which can have them once; leave one out")
                config = config.model_copy(update={"layers": self.layers})
            try:
                chosen = selected(type(config)(**config.model_dump(exclude_unset=True) | whole), model)
                if self.layers is not None and not config.own_layers:
                    chosen = in_layers(self, model, chosen)
            except TunesmithError as error:
                if "targets" not in whole:
                    raise
                errors.append(error)
                continue
            for path, (site, overrides) in chosen.items():
                at = found.setdefault(path, (site, {"parts": [], "numbers": []}))[1]
                at["parts"].append(override(config, overrides).dump())
                at["numbers"].append(i)
        if not found:
            raise errors[0]
        return found

    def build(self, model, configs, by_path):
        built: dict[str, dict[str, Adapter]] = {path: {} for path in configs}
        numbers = {path: each.numbers or list(range(len(each.parts))) for path, each in configs.items()}
        for i in sorted({i for each in numbers.values() for i in each}):
            own = {path: each.configs[numbers[path].index(i)] for path, each in configs.items() if i in numbers[path]}
            for path, (_, adapter) in next(iter(own.values())).build(model, own, by_path).items():
                built[path][str(i)] = adapter
        return {path: (by_path[path], CombinedLayer(adapters)) for path, adapters in built.items()}

    def count(self, site):
        return sum(config.count(site) for config in self.configs)

    def _each(self, adapters):
        """(config, its adapters by path) of each part."""
        for i, config in enumerate(self.configs):
            if own := {path: layer.parts[str(i)] for path, layer in adapters.items() if str(i) in layer.parts}:
                yield config, own

    @property
    def calibrated(self):
        return tuple({name for config in self.configs for name in config.calibrated})

    @property
    def front(self):
        return sum(config.front for config in self.configs)

    @property
    def longest(self):
        return min((config.longest for config in self.configs if config.longest), default=None)

    @property
    def calibration_optional(self):
        return all(config.calibration_optional for config in self.configs if config.calibrated)

    @property
    def from_original(self):
        return any(config.from_original for config in self.configs)

    def rounding(self, W, format, keep=False):
        own = next((config for config in self.configs if type(config).rounding is not Method.rounding), None)
        return own.rounding(W, format, keep) if own else super().rounding(W, format, keep)

    def for_tasks(self, count):
        return self.model_copy(update={"parts": [config.for_tasks(count).dump() for config in map(parse, self.parts)]})

    def param_groups(self, adapters, lr):
        return [group for config, own in self._each(adapters) for group in config.param_groups(own, lr * config.default_lr / Method.default_lr)]

    def auxiliary_loss(self, adapters):
        terms = [term for config, own in self._each(adapters) if (term := config.auxiliary_loss(own)) is not None]
        return sum(terms[1:], terms[0]) if terms else None
