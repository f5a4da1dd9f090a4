"""What changes while training: the stages that methods ask for, as one object that a loop steps and a checkpoint holds."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..engine.model import by_method, state_of
from .ist import IST
from .light_peft import LightPEFT


class Stages:
    """The stages of a model's active adapters. `before_step(optimizer)` comes after a step's last backward (and, on several
    processes, after its gradients are summed), `step()` after the optimiser's step, before the gradients are cleared."""

    def __init__(self, parts: dict[str, object]):
        self.parts = parts

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part in self.parts.values():
            if hasattr(part, "before_step"):
                part.before_step(optimizer)

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def finish(self, folder: Path) -> None:
        """After the last step: what a part has found goes into files of its own in the run folder."""
        for part in self.parts.values():
            if hasattr(part, "finish"):
                part.finish(folder)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def stages(model: nn.Module, total_steps: int, selection: IST | LightPEFT | None = None, probe: Callable[[int], float] | None = None, seed: int = 0) -> Stages:
    """What the active adapters' methods change over `total_steps` optimiser steps; does nothing where they change nothing.

    `selection`: IST chooses which layers train at each step, with `probe(i)`, the loss of the i-th of some batches of training data
    without gradients; to be called once the optimiser has all parameters, since from then on only those of some layers need
    gradients. LightPEFT scores what could be cut out, after its `prepare(model)`.
    """
    parts = {f"{name} {config.method}": config.stage(own, total_steps) for name in state_of(model).active for config, own in by_method(model, name)}
    if selection:
        parts["selection"] = selection.begin(model, total_steps, probe, seed)
    return Stages({name: part for name, part in parts.items() if part is not None})
