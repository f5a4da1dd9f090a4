"""Golden vectors: `GOLDEN_DIR` (default: `data` beside this file) holds one folder per source, one JSON per case."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "data")


@dataclass(frozen=True)
class Case:
    name: str
    card: dict
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict:
        return self.card["config"]

    @property
    def tolerance(self) -> float:
        floats = [t for t in self.tensors.values() if t.is_floating_point()]
        default = 1e-9 if all(t.element_size() == 8 for t in floats) else 1e-5
        return float(self.card.get("tolerance", default))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose key begins with `prefix.`, without it."""
        return {k.removeprefix(prefix + "."): t for k, t in self.tensors.items() if k.startswith(prefix + ".")}


def names(folder: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / folder).glob("*.json") if p.with_suffix(".safetensors").exists())


def read(folder: str, name: str) -> Case:
    path = ROOT / folder / name
    return Case(name, json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))


def linear(frozen: dict[str, Tensor]) -> nn.Linear:
    """The layer of a weight and perhaps a bias."""
    frozen = {key: t for key, t in frozen.items() if key in ("weight", "bias")}
    layer = nn.Linear(*reversed(frozen["weight"].shape), bias="bias" in frozen, dtype=frozen["weight"].dtype)
    layer.load_state_dict(frozen)
    return layer


def check(case: Case, model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Output, mean squared error and gradients, those of the parameters under their names in the case."""
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = ((y - case.tensors["in.target"]) ** 2).mean()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    for key, p in trained.items():
        torch.testing.assert_close(p.grad.view_as(case.tensors[f"grad.{key}"]), case.tensors[f"grad.{key}"], **close)
