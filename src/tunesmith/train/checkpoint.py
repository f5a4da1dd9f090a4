"""What a run needs to go on after a kill as if nothing had happened.

Batches, learning rate and random numbers are functions of (seed, step), so that the state is the step, the trained
parameters, the optimiser, the stages and what has been measured so far.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.model import adapters, state_of
from ..engine.store import tensors
from ..errors import TunesmithError
from ..schedule import Stages


@dataclass
class Progress:
    """The part of a run's state that is plain numbers."""

    step: int = 0  # optimiser steps taken
    best: dict = field(default_factory=dict)  # {"step", "epoch", "value", "metrics"} of the kept adapter
    stale: int = 0  # evaluations since the best
    last: dict = field(default_factory=dict)  # metrics of the latest evaluation
    baseline: dict = field(default_factory=dict)  # {"eval" or "test": metrics of the untouched model}
    metrics_bytes: int = 0  # length of metrics.jsonl
    loss_sum: float = 0.0  # since the last line of metrics.jsonl
    loss_count: int = 0
    tokens: int = 0
    lap_s: float = 0.0
    time_s: float = 0.0  # of the whole run, evaluation included
    train_s: float = 0.0  # of the optimiser steps alone
    peak_mb: float = 0.0
    stopped: bool = False  # by early stopping


def fixed(model: nn.Module) -> dict[str, Tensor]:
    """What the active adapters hold beside their parameters (positions, starts): found on data or by chance, so not to be found anew."""
    own = ((f"{name} {path}.{key}", t) for name in state_of(model).active for path, a in adapters(model, name).items() for key, t in tensors(a).items())
    return {key: t for key, t in own if not isinstance(t, nn.Parameter)}


def write(file: Path, progress: Progress, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, stages: Stages) -> None:
    """Replace `file` by this state in one rename. Raises `TunesmithError` when the disk refuses; the old state then stays."""
    state = {"progress": asdict(progress), "parameters": {n: p.detach() for n, p in parameters.items()}, "optimizer": optimizer.state_dict(), "stages": stages.state_dict()}
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(exist_ok=True)
        # Streamed, not built in memory: a checkpoint must not be what decides a run's peak memory.
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns an OSError into a RuntimeError of its own
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise TunesmithError(f"cannot write the checkpoint {file}: {cause.strerror}; the one before it is still there") from error


def read(file: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, stages: Stages) -> Progress:
    """Put the state in `file` into parameters and optimiser. Raises `TunesmithError` when it is not of this model and method."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip fails in many ways
        raise TunesmithError(f"the checkpoint {file} cannot be read; start the run anew (--overwrite)") from error
    saved = state["parameters"]
    if same := state["stages"].keys() == stages.parts.keys():
        stages.load_state_dict(state["stages"])  # first: parameters may have grown
    if not same or {n: p.shape for n, p in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise TunesmithError(f"the checkpoint {file} was written for another model or method; start the run anew (--overwrite)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])
