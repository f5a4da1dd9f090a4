"""What every method is: a validated config that builds its adapters and states its facts."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..engine.adapter import Adapter, ValueAdapter
from ..engine.calls import parts, score
from ..engine.model import Record, attach, check_name, unwrap
from ..engine.sites import Site, Targets, check_kind, find, float_dtype, matches, sites, within
from ..errors import TunesmithError, invalid, nearest
from ..quantize import Format, PackedWeight
from .peft_targets import exactly
from .select import layers

registry: dict[str, type["Method"]] = {}

Rank = Annotated[int, Field(ge=1, le=65536)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch's generators take


class Method(BaseModel):
    """A method's config. A subclass sets the facts below, adds its fields, and defines `layer` and `count`.

    `method` is the registry name, `works_on` the layer kinds (linear, embedding, conv, attention, norm, other),
    `identity` says whether the model's output is unchanged at initialisation.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    method: ClassVar[str] = ""
    family: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    works_on: ClassVar[tuple[str, ...]] = ("linear",)
    mergeable: ClassVar[bool] = True
    quantized_base_ok: ClassVar[bool] = True
    identity: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3

    targets: Targets = Field("all-linear", description='"all-linear", a suffix or regex, a list of them, or a mapping pattern → overrides')
    layers: list[int] | None = Field(None, description="numbers of the transformer layers to act in, from 0, or from -1 at the end; default: all")
    modules_to_save: list[str] = Field([], description="modules trained in full beside the adapter and saved with it, such as a new head; with them what is tied to them")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs):
        super().__pydantic_init_subclass__(**kwargs)
        if name := cls.__dict__.get("method"):
            registry[name] = cls

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise TunesmithError(invalid(f"method {self.method!r}", error, type(self).model_fields)) from None

    def layer(self, site: Site) -> Adapter:
        """The adapter of one site, newly initialised."""
        raise TypeError(f"{type(self).__name__} defines no layer")

    def count(self, site: Site) -> int:
        """Trained parameters at one site, in closed form."""
        raise TypeError(f"{type(self).__name__} defines no count")

    def default(self, model: nn.Module) -> list[Site]:
        """The sites of `targets="default"`, for methods whose paper has its own choice."""
        return []

    def select(self, model: nn.Module) -> dict[str, tuple[Site, dict]]:
        """The sites acted on, as path → (site, overrides of this config's fields)."""
        skip = self.saved_paths(model)
        if self.targets != "default":
            return find(model, self.targets, self.works_on, self.method, skip)
        chosen = [s for s in self.default(model) if not within(s.path, skip)]
        return {s.path: (s, {}) for s in chosen} or find(model, "all-linear", self.works_on, self.method, skip)

    def build(self, model: nn.Module, configs: dict[str, "Method"], by_path: dict[str, Site]) -> dict[str, tuple[Site, Adapter]]:
        """The adapters of all sites; override where sites share parameters."""
        return {path: (by_path[path], config.layer(by_path[path])) for path, config in configs.items()}

    def saved_paths(self, model: nn.Module) -> list[str]:
        """The modules that `modules_to_save` names. Raises `TunesmithError` for a name that matches none."""
        found = []
        paths = [p for p, _ in model.named_modules() if p and ".tunesmith" not in f".{p}"]
        for pattern in self.modules_to_save:
            hits = [p for p in paths if matches(pattern, p)]
            if not hits:
                raise TunesmithError(f"modules_to_save names {pattern!r}, which {type(model).__name__} does not have{nearest(pattern, {p.split('.')[-1] for p in paths})}")
            found += hits
        return found

    def param_groups(self, adapters: dict[str, Adapter], lr: float) -> list[dict]:
        """Optimiser groups for this method's adapters (one, unless the method has its own rule)."""
        return [{"params": list({id(p): p for a in adapters.values() for p in a.parameters() if p.requires_grad}.values()), "lr": lr}]

    @property
    def calibrated(self) -> tuple[str, ...]:
        """What the adapters are built from beside the weights: `gradient`, `squares` or `inputs`, at each site as `site.gradient` and so on."""
        return ()

    def digest(self, site: Site) -> None:
        """What can be made of a site's `moments` at once, so that those of a large model need not be there together."""

    own_layers: ClassVar[bool] = False  # whether `select` itself keeps to `layers`
    longest: ClassVar[int | None] = None  # tokens of the longest text it takes
    front: ClassVar[int] = 0  # positions that it takes before the text's
    calibration_optional: ClassVar[bool] = False  # whether adapters can be built without what `calibrated` names
    from_original: ClassVar[bool] = False  # whether adapters start from what a quantised base's weights were before they were rounded

    def rounding(self, W: torch.Tensor, format: Format, keep: bool = False) -> PackedWeight:
        """How a base's weight is to be rounded for this method."""
        return PackedWeight.of(W, format, keep)

    @property
    def starts_from_original(self) -> bool:
        """`from_original`, of this config or of a method that its targets name."""
        named = self.targets.values() if isinstance(self.targets, dict) else []
        return self.from_original or any(parse(fields).from_original for fields in named if "method" in fields)

    def allot(self, model: nn.Module, configs: dict[str, "Method"], by_path: dict[str, Site]) -> dict[str, "Method"]:
        """The config of each site where what one site gets depends on the others, as under a common budget; sites that get nothing are left out."""
        return configs

    def for_tasks(self, count: int) -> "Method":
        """The config for data whose rows are of `count` tasks, 0 where they name none; methods that route by task take it over."""
        return self

    def auxiliary_loss(self, adapters: dict[str, Adapter]) -> torch.Tensor | None:
        """What is added to the loss of the step whose forward has just run."""
        return None

    def stage(self, adapters: dict[str, Adapter], total_steps: int):
        """What changes while training: an object with `step()`, to be called after each optimiser step while the gradients
        are still there, `state_dict()` and `load_state_dict(state)`, and perhaps `before_step(optimizer)`, to be called
        between backward and that step; or None."""
        return None

    def resized(self, rank: int) -> "Method":
        """The config of a layer of which so many ranks are left, with the scale that they had; for methods whose adapters name their `dims`."""
        raise TypeError(f"{type(self).__name__} has no ranks")

    peft_type: ClassVar[str | None] = None  # what Hugging Face peft calls this method; None where it has no word for it
    peft_by_site: ClassVar[bool] = True  # its tensors' keys begin with a module's path

    @classmethod
    def reads_peft(cls, fields: dict) -> bool:
        """Whether a peft config is this method's."""
        return cls.peft_type is not None and fields.get("peft_type") == cls.peft_type

    def to_peft(self, configs: dict[str, "Method"], model: nn.Module) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        return {"target_modules": exactly(configs, model)}

    @classmethod
    def from_peft(cls, fields: dict, model: nn.Module, found: dict[str, torch.Tensor]) -> tuple["Method", dict[str, dict]]:
        """(config, overrides by site path) of a peft config and its tensors by `module path.tensor`.

        Tensors of no module, which keep their whole key, are to be taken out of `found`.
        """
        raise TypeError(f"{cls.__name__} reads no peft files")

    def peft_tensors(self, site: Site, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """peft's names and shapes for an adapter's tensors."""
        return own

    def peft_shared(self, adapters: dict[str, Adapter]) -> dict[str, torch.Tensor]:
        """What peft holds once for all sites, by its whole key in the file."""
        return {}

    def own_tensors(self, site: Site, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `peft_tensors`."""
        return theirs

    def dump(self) -> dict[str, Any]:
        """JSON that `parse` reads back."""
        return {"method": self.method, **self.model_dump(mode="json")}


def parse(method: "Method | str | dict") -> Method:
    """A method's config from its name, a mapping with the key `method`, or itself.

    Raises `TunesmithError` for an unknown name, field or value, with the nearest right one.
    """
    if isinstance(method, Method):
        return method
    fields = {"method": method} if isinstance(method, str) else dict(method) if isinstance(method, dict) else None
    if not fields or not isinstance(name := fields.pop("method", None), str):
        raise TunesmithError(f"a method is a name, a mapping with the key 'method' or a config such as LoRA(rank=8), not {method!r:.80}")
    if name not in registry:
        raise TunesmithError(f"unknown method {name!r}{nearest(name, registry) or '; there are ' + ', '.join(registry)}")
    return registry[name](**fields)


def override(config: Method, fields: dict) -> Method:
    """`config` with some fields changed, or another method's config when `fields` names one."""
    if not fields:
        return config
    if "method" in fields:
        return parse(fields)
    kept = config.model_dump(exclude={"targets", "layers", "modules_to_save"}, exclude_unset=True)
    return type(config)(**{**kept, **fields})


def adapt(
    model: nn.Module,
    method: "Method | str | dict",
    name: str = "default",
    targets: Targets | None = None,
    calibrate: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Attach a method to a model, in place; the new adapter is the active one. Returns the model.

    `method`: a config (`LoRA(rank=8)`), a name (`"lora"`) or a mapping. `targets` overrides the config's.
    `calibrate(model)` runs forward and backward on some batches, for methods that start from the base's gradients; where they
    start from the inputs' products and the model is large, it is called several times.
    Raises `TunesmithError` for an unknown method, a target that matches nothing or cannot be adapted.
    """
    config = parse(method)
    if targets is not None:
        config = type(config)(**config.model_dump(exclude_unset=True) | {"targets": targets})
    model = unwrap(model)
    check_name(model, name)
    config = _with_tied(config, model)
    chosen = selected(config, model)
    configs = {path: override(config, overrides) for path, (_, overrides) in chosen.items()}
    for path, (site, overrides) in chosen.items():
        if "method" in overrides:
            check_kind(site, configs[path].works_on, configs[path].method, sites(model))
            if not configs[path].count(site):
                raise TunesmithError(f"{configs[path].method} has nothing to train at {path!r}")
    by_path = {path: site for path, (site, _) in chosen.items()}
    scored = {path: by_path[path] for path, each in configs.items() if each.calibrated and not _needless(each, by_path[path])}
    if scored:
        if calibrate is None and not all(configs[path].calibration_optional for path in scored):
            raise TunesmithError(f"{config.method} starts from the model's gradients here: pass adapt(..., calibrate=function), which runs forward and backward on some batches")
    try:
        if scored and calibrate:
            wanted = {name for path in scored for name in configs[path].calibrated}
            for part in parts(scored) if wanted == {"moments"} else [scored]:
                score(model, part, calibrate, wanted)
                for path, site in part.items():
                    configs[path].digest(site)
        alloted = {path: each for own in _groups(configs).values() for path, each in next(iter(own.values())).allot(model, own, by_path).items()}
        configs = {path: alloted[path] for path in configs if path in alloted}
        attach(model, name, Record(config, configs), build(config, model, configs, by_path))
    finally:
        for site in by_path.values():
            site.seen = {}
    return model


def _needless(config: Method, site: Site) -> bool:
    """Whether a site's calibration would serve nothing: it tells how to start from an original that is not there."""
    return config.calibration_optional and config.from_original and getattr(site.parameter, "original", None) is None


def selected(config: Method, model: nn.Module) -> dict[str, tuple[Site, dict]]:
    """What `config.select(model)` finds in the config's `layers`.

    Raises `TunesmithError` for a layer that the model does not have, and for a method that acts on the whole model at once.
    """
    found = config.select(model)
    return found if config.layers is None or config.own_layers else in_layers(config, model, found)


def in_layers(config: Method, model: nn.Module, found: dict[str, tuple[Site, dict]]) -> dict[str, tuple[Site, dict]]:
    """Those of `found` that are in the config's `layers`, as `selected` says."""
    places = layers(model)
    if outside := [path for path in found if path not in places]:
        raise TunesmithError(f"{config.method} acts on the whole of {outside[0] or type(model).__name__!r} and cannot be kept to some layers; leave layers out")
    depth = max((depth for path, (_, _, depth) in places.items() if path in found), default=0)
    kept = {path: each for path, each in found.items() if {places[path][1], places[path][1] - places[path][2]} & set(config.layers)}
    check_layers(config, model, depth, kept)
    return kept


def check_layers(config: Method, model: nn.Module, depth: int, kept) -> None:
    """Raises `TunesmithError` where a config's `layers` are not of a model with so many, or `kept`, what is in them, is nothing."""
    if unknown := [number for number in config.layers if not -depth <= number < depth]:
        raise TunesmithError(f"layers={config.layers}: {type(model).__name__} has {depth} layers, 0 to {depth - 1}, and no layer {unknown[0]}")
    if not kept:
        raise TunesmithError(f"layers={config.layers} leave {config.method} nothing to act on; name one layer at least")


def _groups(configs: dict[str, Method]) -> dict[type, dict[str, Method]]:
    """The configs of each method by path."""
    groups: dict[type, dict[str, Method]] = {}
    for path, each in configs.items():
        groups.setdefault(type(each), {})[path] = each
    return groups


def _with_tied(config: Method, model: nn.Module) -> Method:
    """The config whose `modules_to_save` also names what shares a weight with them, as a language model's head does."""
    saved = saved_sites(config, model)
    paths, weights = {s.path for s in saved}, {id(p) for s in saved for p in s.values.values()}
    more = [s.path for s in sites(model) if s.path not in paths and any(id(p) in weights for p in s.values.values())]
    return config.model_copy(update={"modules_to_save": config.modules_to_save + more}) if more else config


def build(config: Method, model: nn.Module, configs: dict[str, Method], by_path: dict[str, Site], tied: bool = True) -> dict[str, tuple[Site, Adapter]]:
    """Adapters of every site and full copies of `modules_to_save`, not yet attached; `tied` weights stay one weight."""
    built = {}
    for members in _groups(configs).values():
        built |= next(iter(members.values())).build(model, members, by_path)
    shared = {}
    return built | {s.path: (s, values_of(s, shared=shared if tied else None)) for s in saved_sites(config, model)}


def saved_sites(config: Method, model: nn.Module) -> list[Site]:
    """The places with parameters in and below `modules_to_save`."""
    saved = config.saved_paths(model)
    return [s for s in sites(model) if within(s.path, saved)]


def values_of(site: Site, names: tuple[str, ...] | None = None, shared: dict | None = None) -> ValueAdapter:
    """Trainable copies of a site's parameters; parameters that are one object in the model stay one in `shared`."""
    shared = {} if shared is None else shared
    names = site.names if names is None else names
    for name in names:
        p = site.holder._parameters[name]
        if id(p) not in shared:
            shared[id(p)] = nn.Parameter(torch.empty_like(p, dtype=float_dtype(p)).copy_(p.detach()))
    return ValueAdapter({name: shared[id(site.holder._parameters[name])] for name in names})


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(d for d in range(most, 0, -1) if n % d == 0)


def empty(*shape: int, like: torch.Tensor) -> nn.Parameter:
    """An adapter's parameter, not yet filled, on the base weight's device and in an adapter's dtype."""
    return nn.Parameter(torch.empty(shape, dtype=float_dtype(like), device=like.device))
