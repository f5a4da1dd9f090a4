"""metrics.jsonl and TensorBoard events of one run."""

import json
import os
from pathlib import Path

from .checkpoint import Progress


class Metrics:
    """Appends lines; a resumed run first forgets what was measured after its checkpoint."""

    def __init__(self, folder: Path, state: Progress):
        from torch.utils.tensorboard import SummaryWriter

        self.file = (folder / "metrics.jsonl").open("ab")
        self.file.truncate(state.metrics_bytes)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=state.step + 1 if state.step else None)

    def write(self, line: dict) -> None:
        self.file.write(json.dumps({key: _short(value) for key, value in line.items()}).encode() + b"\n")
        self.file.flush()
        numbers = {f"eval/{k}": v for k, v in line["eval"].items()} if "eval" in line else {f"train/{k}": v for k, v in line.items()}
        for name, value in numbers.items():
            if name not in ("train/step", "train/epoch"):
                self.board.add_scalar(name, value, line["step"])

    def sync(self) -> int:
        """Length of metrics.jsonl once it is on the disk."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self.board.close()
        self.file.close()


def _short(value):
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value
