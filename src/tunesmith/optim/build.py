"""An optimiser with the parameter groups that the methods ask for."""

import torch
from torch import nn

from ..engine.model import adapters, by_method, state_of
from ..errors import TunesmithError, nearest

OPTIMIZERS = {"adamw": torch.optim.AdamW}


def build(model: nn.Module, name: str = "adamw", lr: float = 1e-3, weight_decay: float = 0.0, head_lr: float | None = None, **options) -> torch.optim.Optimizer:
    """An optimiser of everything `trainable(model)` lists; each method groups its own parameters (LoRA+ does).

    `head_lr` is the rate of `modules_to_save`, which start from nothing where the rest starts from a pretrained model.
    Vectors (norms, biases, magnitudes) get no weight decay. Raises `TunesmithError` for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise TunesmithError(f"unknown optimizer {name!r}{nearest(name, OPTIMIZERS) or '; there are ' + ', '.join(OPTIMIZERS)}")
    groups, seen = [], set()
    for adapter, record in state_of(model).records.items():
        heads = [p for path, module in adapters(model, adapter).items() if path not in record.sites for p in module.parameters() if p.requires_grad]
        grouped = [group for config, own in by_method(model, adapter) for group in config.param_groups(own, lr)]
        for group in [*grouped, {"params": heads, "lr": head_lr or lr}]:
            new = [p for p in group["params"] if id(p) not in seen]
            seen |= {id(p) for p in new}
            for params, decay in (([p for p in new if p.dim() > 1], weight_decay), ([p for p in new if p.dim() < 2], 0.0)):
                if params:
                    groups.append({"weight_decay": decay} | group | {"params": params})
    kinds = {p.device.type for group in groups for p in group["params"]}
    if kinds <= {"cpu", "cuda"} and "fused" not in options:
        options["fused"] = True  # one pass over each tensor instead of seven
    return OPTIMIZERS[name](groups, lr=lr, weight_decay=weight_decay, **options)
