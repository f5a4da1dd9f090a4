"""An optimiser with the parameter groups that the methods ask for."""

import inspect
from typing import Any

import torch
from torch import nn

from ..engine.model import adapters, by_method, hubs, state_of
from ..errors import TunesmithError, nearest
from .galore import GaLore, NaturalGaLore

OPTIMIZERS = {"adamw": torch.optim.AdamW, "galore": GaLore, "natural-galore": NaturalGaLore}
RANK = 128  # of GaLore, where none is said
ELSEWHERE = ("params", "lr", "betas", "weight_decay")  # said beside the optimiser, not among its options


def build(
    model: nn.Module, name: str | dict[str, Any] = "adamw", lr: float = 1e-3, weight_decay: float = 0.0, head_lr: float | None = None, **options
) -> torch.optim.Optimizer:
    """An optimiser of everything `trainable(model)` lists; each method groups its own parameters (LoRA+ does).

    `name`: adamw, galore or natural-galore, or a mapping with the key `optimizer` and options of its own, such as {optimizer:
    galore, rank: 64}. GaLore projects matrices of which both sides exceed `rank` (128), but for embeddings, and has moments of
    vectors in 32 bits whatever its `bits`; what it does not project gets AdamW.
    `head_lr` is the rate of `modules_to_save`, which start from nothing where the rest starts from a pretrained model.
    Vectors (norms, biases, magnitudes) get no weight decay. Raises `TunesmithError` for an unknown name or option, or one out of
    its range, and where GaLore finds nothing to project.
    """
    kind, own = parse(name)
    options |= own
    galore, rank = issubclass(kind, GaLore), options.pop("rank", RANK)
    if not isinstance(rank, int) or rank < 1:
        raise TunesmithError(f"optimizer: rank={rank!r} is not valid; it is a whole number of at least 1")
    embeddings = {id(p) for hub in hubs(model).values() if hub.site.kind == "embedding" for p in hub.parameters()}

    def projected(p: nn.Parameter) -> bool:
        return galore and p.dim() == 2 and min(p.shape) > rank and id(p) not in embeddings

    kinds_of = [
        (projected, {"weight_decay": weight_decay, "rank": rank}),
        (lambda p: p.dim() > 1 and not projected(p), {"weight_decay": weight_decay}),
        (lambda p: p.dim() < 2, {"weight_decay": 0.0} | ({"bits": 32} if galore else {})),
    ]
    groups, seen = [], set()
    for adapter, record in state_of(model).records.items():
        heads = [p for path, module in adapters(model, adapter).items() if path not in record.sites for p in module.parameters() if p.requires_grad]
        grouped = [group for config, own in by_method(model, adapter) for group in config.param_groups(own, lr)]
        for group in [*grouped, {"params": heads, "lr": head_lr or lr}]:
            new = [p for p in group["params"] if id(p) not in seen]
            seen |= {id(p) for p in new}
            for chosen, settings in kinds_of:
                if params := [p for p in new if chosen(p)]:
                    groups.append(settings | group | {"params": params})
    if galore and not any("rank" in group for group in groups):
        raise TunesmithError(f"optimizer: nothing that trains is a matrix with both sides above rank={rank}, which GaLore projects; give a smaller rank, or use adamw")
    kinds = {p.device.type for group in groups for p in group["params"]}
    if not galore and kinds <= {"cpu", "cuda"} and not options.keys() & {"fused", "foreach", "differentiable"}:
        options["fused"] = True  # one pass over each tensor instead of seven
    try:
        return kind(groups, lr=lr, weight_decay=weight_decay, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TunesmithError(f"optimizer {kind.__name__} refuses its options: {error}") from None


def parse(name: str | dict[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and the options of an optimiser that a recipe names."""
    own = {"optimizer": name} if isinstance(name, str) else dict(name)
    name = own.pop("optimizer", None)
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise TunesmithError(f"unknown optimizer {name!r}{nearest(str(name), OPTIMIZERS) or '; there are ' + ', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    known = [key for key in getattr(kind, "options", inspect.signature(kind).parameters) if key not in ELSEWHERE]
    for key in own:
        if key not in known:
            raise TunesmithError(f"optimizer {name} has no option {key!r}{nearest(key, known) or '; it has ' + ', '.join(known)}")
    return kind, own
