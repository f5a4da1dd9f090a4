"""The parts of an optimiser step, on one process or several."""

import math
import os
import random
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts

from .folder import pick_device


def processes(device: str) -> tuple[torch.device, int, int]:
    """(device, rank, number of processes), joining the others where a launcher started several."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    here = pick_device(device)
    if world > 1:
        if here.type == "cuda":
            here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(here)
        if not dist.is_initialized():
            # The others wait while the first evaluates, which may take long.
            dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return here, rank, world


def seed(*what) -> None:
    """Seed every generator from (seed, step, …), so that a resumed run draws the numbers it would have drawn."""
    number = zlib.crc32(repr(what).encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def schedule(step: int, total: int, warmup: float, shape: str) -> float:
    """Learning rate of step 0 … total-1 as a share of the peak: a linear rise, then a cosine or linear fall to 0."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    if shape == "constant":
        return 1.0
    done = (step - rise) / max(total - rise, 1)
    return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: nn.Module, batch: dict[str, Tensor], task, count: int) -> Tensor:
    """Summed loss of a batch over `count`: of its rows (labels (b,)), or of its predicted tokens (labels (b, t)).

    A batch with `task_ids` is for `in_tasks`, which the backward needs too where it computes activations anew.
    """
    batch = {name: tensor for name, tensor in batch.items() if name != "task_ids"}
    labels = batch.pop("labels")
    if task.name == "classification":
        return F.cross_entropy(model(**batch).logits.float(), labels, reduction="sum") / count
    if "position_ids" in batch:  # packed: positions start anew in each example
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") / count
    return ts.causal_lm_loss(model, **batch, labels=labels, count=count)


def predicted(labels: Tensor) -> int:
    """How many losses a batch has: its rows (labels (b,)), or its tokens with a label, but for the first (labels (b, t))."""
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != -100).sum())


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def reduced(value: float, device: torch.device, world: int) -> float:
    """The sum over processes."""
    if world == 1:
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def sum_gradients(parameters, world: int) -> None:
    """Sum gradients over processes in one message; a process whose share of the step was empty adds zeros. What stands still (IST) gets none."""
    if world == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
