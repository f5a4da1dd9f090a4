"""Light-PEFT: a short first stage of training shows which heads, channels, adapters and ranks a task can do without."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..engine import store
from ..engine.adapter import Adapter
from ..engine.model import activate, adapters, record_of, state_of, unwrap
from ..engine.sites import backbone
from ..errors import TunesmithError, invalid, nearest
from ..methods import Method
from ..methods.mask_tuning import MaskTuning
from ..methods.method import adapt
from ..methods.select import Coupled
from ..pruning import prunable, whole

Share = Annotated[float, Field(ge=0, lt=1)]
MASKS = "masks"  # the name of the adapter that holds them
CARD, WEIGHTS = "pruning.json", "start.safetensors"


class LightPEFT(BaseModel):
    """Light-PEFT (Gu et al. 2024, arXiv 2406.03792), around LoRA, rsLoRA, PiSSA or series adapters.

    In the first `steps` steps masks of heads and channels train beside the adapters, with `l1` times the sum of their magnitudes
    in the loss. Then the `heads` (of each layer) and `channels` (of all layers) with the lowest masks are cut out of the model,
    and the `modules` that add least to their layers' outputs and the `ranks` (of those left) whose gradients promise least out
    of the adapter; training begins anew from there. Shares are of the units there are, rounded down (`official`: what exceeds
    the interpolated quantile is kept, as in the authors' code); every block keeps a unit. Of other methods' adapters the base
    alone loses units, and the adapters start again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: Share = 1 / 3
    channels: Share = 1 / 3
    modules: Share = 0.75
    ranks: Share = 0.5
    steps: Annotated[int, Field(ge=2)] = 200
    l1: Annotated[float, Field(ge=0)] = 1e-4
    official: bool = False
    stage: Literal["both", "estimate"] = "both"

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise TunesmithError(invalid("prune light-peft", error, LightPEFT.model_fields)) from None

    def prepare(self, model: nn.Module) -> None:
        """Put masks over what the model's active adapters give to the layers that read heads and channels."""
        blocks = prunable(model)
        if not blocks:
            raise TunesmithError(f"prune light-peft found no heads or channels in {type(unwrap(model)).__name__} that can be cut")
        names = list(state_of(model).active)
        adapt(model, MaskTuning(targets={path: {"units": c.units} for path, c in blocks.items()}, l1=self.l1), name=MASKS)
        activate(model, [*names, MASKS])

    def begin(self, model: nn.Module, total_steps: int, probe: Any, seed: int) -> "Estimate":
        return Estimate(self, model, total_steps)


def parse_prune(value: Any) -> LightPEFT:
    """What a recipe's `prune` says: light-peft, or a mapping with the key `prune` and its fields."""
    fields = {"prune": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = fields.pop("prune", None)
    if name != "light-peft":
        raise TunesmithError(f"unknown prune {name!r}{nearest(str(name), ['light-peft']) or '; there is light-peft'}")
    return LightPEFT(**fields)


class Plan(NamedTuple):
    """What is kept: units by the path of the layer that reads them, and ranks by the path of the adapter; others go."""

    units: dict[str, list[int]]
    ranks: dict[str, list[int]]


def kept(scores: Tensor, share: float, official: bool = False) -> Tensor:
    """Which of scores (n,) stay when `share` of them go, the lowest first, of equal ones the first first; (n,) of bool, one at least true."""
    scores = scores.double()
    if official:
        return with_best(scores > torch.quantile(scores, share), scores)
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(stable=True)[: int(share * len(scores) + 1e-9)]] = False
    return keep


def with_best(keep: Tensor, scores: Tensor) -> Tensor:
    """`keep`, or where nothing is kept the highest score."""
    return keep if keep.any() else keep.index_fill(0, scores.argmax(), True)


def plan(config: LightPEFT, masks: dict[str, Tensor], heads: set[str], ratio: dict[str, Tensor], ranks: dict[str, Tensor]) -> Plan:
    """What stays, by masks (units,) and which of them are of heads, each adapter's ratio () and its ranks' scores (r,)."""
    units = {path: kept(m, config.heads, config.official) for path, m in masks.items() if path in heads}
    channels = [path for path in masks if path not in heads]
    if channels:
        together = kept(torch.cat([masks[path] for path in channels]), config.channels, config.official)
        parts = together.split([len(masks[path]) for path in channels])
        units |= {path: with_best(keep, masks[path]) for path, keep in zip(channels, parts, strict=True)}
    left = {}
    if ratio:
        chosen = kept(torch.stack(list(ratio.values())), config.modules, config.official)
        modules = [path for path, keep in zip(ratio, chosen, strict=True) if keep]
        together = kept(torch.cat([ranks[path] for path in modules]), config.ranks, config.official)
        left = dict(zip(modules, together.split([len(ranks[path]) for path in modules]), strict=True))
    numbers = lambda found: {path: keep.nonzero()[:, 0].tolist() for path, keep in found.items() if keep.any()}  # noqa: E731
    return Plan(numbers(units), numbers(left))


class Estimate:
    """Scores the active adapters while they train, over the second half of the steps; the masks score the base themselves.

    An adapter's ratio is the mean over tokens of ‖what it adds‖ / ‖what is below it‖, a rank's score |mean A_k·∂A_k| + |mean B_k·∂B_k|.
    """

    def __init__(self, config: LightPEFT, model: nn.Module, total_steps: int):
        self.config, self.model, self.total, self.done = config, unwrap(model), total_steps, 0
        self.name = next(name for name in state_of(model).active if name != MASKS)
        self.record = record_of(model, self.name)
        ranked = {path for path, config in self.record.sites.items() if type(config).resized is not Method.resized}  # a layer can have fewer ranks
        self.own = {path: a for path, a in adapters(model, self.name).items() if path in ranked and a.dims}
        self.sums, self.counts = {path: torch.zeros(()) for path in self.own}, dict.fromkeys(self.own, 0)
        self.scores: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        backbone(self.model).register_forward_pre_hook(self._note_mask, with_kwargs=True)
        for path, adapter in self.own.items():
            adapter.register_forward_hook(lambda _, args, kwargs, y, path=path: self._measure(path, args, kwargs, y), with_kwargs=True)

    def _note_mask(self, model, args, kwargs):
        self.mask = kwargs.get("attention_mask")

    @torch.no_grad()
    def _measure(self, path: str, args: tuple, kwargs: dict, y: Tensor) -> None:
        if not self.model.training or self.done < self.total // 2:
            return
        below, *args = args
        h = below(*args, **kwargs)
        ratio = (y - h).float().norm(dim=-1) / h.float().norm(dim=-1)
        ratio = ratio[self.mask.bool()] if self.mask is not None and self.mask.shape == ratio.shape else ratio
        self.sums[path] = self.sums[path].to(ratio.device) + ratio.mean().nan_to_num(0, 0, 0)
        self.counts[path] += 1

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.done >= self.total // 2:
            for path, adapter in self.own.items():
                found = rank_scores(adapter).nan_to_num(0, 0, 0)
                self.scores[path] = self.scores[path].to(found.device) + found if path in self.scores else found

    def step(self) -> None:
        self.done += 1

    def plan(self, ratio: dict[str, Tensor]) -> Plan:
        blocks = prunable(self.model)
        masks = {path: a.m.detach().cpu() for path, a in adapters(self.model, MASKS).items()}
        heads = {path for path, c in blocks.items() if c.kind == "heads"}
        return plan(self.config, masks, heads, ratio, {path: t.cpu() for path, t in self.scores.items()})

    def ratio(self) -> dict[str, Tensor]:
        """Of each scored adapter, over the batches of all processes."""
        device = next(self.model.parameters()).device
        found = {path: torch.stack([self.sums[path].to(device), torch.tensor(float(self.counts[path]), device=device)]) for path in self.own}
        if dist.is_available() and dist.is_initialized():
            for pair in found.values():
                dist.all_reduce(pair)
        return {path: (total / count.clamp(min=1)).cpu() for path, (total, count) in found.items()}

    def finish(self, folder: Path) -> None:
        """Write what is kept, and what the adapters that are left begin with, into `folder`/pruned."""
        ratio, blocks = self.ratio(), prunable(self.model)
        chosen = self.plan(ratio)
        tensors, configs = {}, {}
        for path, adapter in adapters(self.model, self.name).items():
            if path in self.record.sites and path not in chosen.ranks:  # cut out, or without ranks: it starts again
                continue
            if path in self.own:
                configs[path] = self.record.sites[path].resized(len(chosen.ranks[path])).dump()
            parts = cut(adapter, path, chosen, blocks) if path in self.own else store.tensors(adapter)
            tensors |= {f"{path}.{key}": t for key, t in parts.items()}
        if configs:
            configs |= {path: config.dump() for path, config in self.record.sites.items() if path not in self.own}
        about = {"format": 1, "units": whole(self.model, chosen.units), "ranks": chosen.ranks, "sites": configs}
        about["ratio"] = {path: float(value) for path, value in ratio.items()}
        data = save_tensors({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata={"format": "pt"})
        store.write(folder / "pruned", {WEIGHTS: data, CARD: json.dumps(about) + "\n"})

    def state_dict(self) -> dict:
        return {"done": self.done, "sums": self.sums, "counts": self.counts, "scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.done, self.sums, self.counts, self.scores = state["done"], state["sums"], state["counts"], state["scores"]


def rank_scores(adapter: Adapter) -> Tensor:
    """(r,): for each rank the sum over the trained factors of |mean of value × gradient|."""
    factors = [(p, adapter.dims[key].index("rank")) for key, p in adapter.named_parameters() if p.dim() == 2 and "rank" in adapter.dims.get(key, ())]
    return torch.stack([(p * (0 if p.grad is None else p.grad)).mean(1 - dim).abs() for p, dim in factors]).sum(0)


@torch.no_grad()
def cut(adapter: Adapter, path: str, plan: Plan, blocks: dict[str, Coupled]) -> dict[str, Tensor]:
    """An adapter's tensors with the ranks, inputs and outputs that are kept."""
    index = {"rank": torch.tensor(plan.ranks[path])}
    for outer, units in plan.units.items():
        if path == outer:
            index["in"] = blocks[outer].columns()[units].flatten()
        for site in blocks[outer].inner:
            if path == site.path:
                index["out"] = blocks[outer].rows(site)[units].flatten().sort().values
    found = store.tensors(adapter)
    for key, t in found.items():
        for dim, name in enumerate(adapter.dims.get(key, ())):
            if name in index:
                t = t.index_select(dim, index[name].to(t.device))
        found[key] = t
    return found


class Start(NamedTuple):
    """What a second stage begins with."""

    units: dict[str, list[int]]
    sites: dict[str, dict]
    tensors: dict[str, Tensor]

    def method(self, config: Method) -> Method:
        """The method on the layers that keep an adapter, each with its ranks."""
        return config.model_copy(update={"targets": self.sites, "layers": None}) if self.sites else config

    def fill(self, model: nn.Module, name: str = "default") -> None:
        """Give a newly attached adapter the values of the first stage wherever it has the shape they have."""
        for path, adapter in adapters(model, name).items():
            for key, t in store.tensors(adapter).items():
                value = self.tensors.get(f"{path}.{key}")
                if value is not None and value.shape == t.shape:
                    t.data.copy_(value)


def read(folder: str | Path) -> Start:
    """What a finished first stage left in its run folder."""
    card = store.read_json(Path(folder) / "pruned" / CARD)
    sites = {path: {"method": config["method"]} | {key: value for key, value in config.items() if key != "targets"} for path, config in card["sites"].items()}
    return Start(card["units"], sites, store.read_tensors(Path(folder) / "pruned" / WEIGHTS))
