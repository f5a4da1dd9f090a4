"""The run folder: everything one needs to understand, resume and use a run."""

import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TunesmithError
from ..files import atomic_write
from . import recipe as recipes
from .recipe import Recipe


def default(model: str, method: str, task: str) -> str:
    """runs/<model>-<method>-<task>, where a hub id or a folder gives its last name."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
    return f"runs/{name}-{method}-{task}"


def check(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Raises `TunesmithError` when a run may not go to `folder`, or is not the one that is to be resumed. Writes nothing."""
    if resume and overwrite:
        raise TunesmithError("resume goes on with a run and overwrite throws it away; choose one")
    if folder.exists() and not folder.is_dir():
        raise TunesmithError(f"the output {folder} is a file; name a folder with output=...")
    parent = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise TunesmithError(f"the output {folder} cannot be written: no right to write in {parent}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    is_run = (folder / "recipe.yaml").exists()
    if overwrite and not is_run:
        raise TunesmithError(f"{folder} is not a run folder, so --overwrite leaves it alone; choose another with output=...")
    if not resume and not overwrite:
        go_on = "--resume goes on with it, --overwrite starts anew, " if is_run else ""
        raise TunesmithError(f"the output folder {folder} exists and is not empty; {go_on}output=NAME chooses another")
    if resume and is_run:
        before, now = recipes.check(recipes.read_yaml(folder / "recipe.yaml")[0]).model_dump(), recipe.model_dump()
        changed = [f"{key} was {before[key]!r} and is {now[key]!r}" for key in now if before[key] != now[key] and key not in ("output", "device")]
        if changed:
            raise TunesmithError(f"the run in {folder} cannot go on with another recipe: {'; '.join(changed)}; use --overwrite or output=NAME")


def start(folder: Path, recipe: Recipe, data: dict[str, Any], overwrite: bool) -> None:
    """Write what is known before the first step. Raises `TunesmithError` when a resumed run's data have changed."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    check_data(folder, data["source"], data["fingerprint"])
    tidy(folder)
    atomic_write(folder / "recipe.yaml", recipes.dump(recipe))
    write_json(folder / "versions.json", versions())
    write_json(folder / "data.json", data)


def check_data(folder: Path, source: str, fingerprint: Any) -> None:
    """Raises `TunesmithError` where a run began with other data."""
    if (folder / "data.json").exists() and json.loads((folder / "data.json").read_text())["fingerprint"] != fingerprint:
        raise TunesmithError(f"the run in {folder} cannot go on: the data in {source} have changed since it began; use --overwrite or output=NAME")


def tidy(folder: Path) -> None:
    """Remove what a kill in the middle of a write left behind."""
    for left in folder.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def versions() -> dict[str, Any]:
    """What the numbers of a run depend on besides its recipe and data."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version()} | {
        package: of(package) for package in ("tunesmith", "torch", "transformers", "tokenizers", "datasets", "safetensors")
    } | {"platform": platform.platform(), "gpu": gpu, "threads": torch.get_num_threads()}  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON Lines."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    """What `write_rows` wrote; a last line cut short by a killed run is left out."""
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise TunesmithError(f"{path}, line {i + 1} is not JSON ({error})") from error
    return rows


def write_predictions(folder: Path, data: str, rows: list[dict]) -> None:
    """predictions.jsonl (of the evaluation data) or test_predictions.jsonl, beside the untouched model's answers where known."""
    before = folder / f"{data}_base.jsonl"
    if before.exists():
        rows = [row | {"base_predicted": old["predicted"]} for row, old in zip(rows, read_rows(before), strict=True)]
    write_rows(folder / ("predictions.jsonl" if data == "eval" else f"{data}_predictions.jsonl"), rows)


@dataclass
class Run:
    """A finished (or evaluated at least once) run, ready for use; `model` is in evaluation mode."""

    folder: Path
    recipe: Recipe
    task: Any
    columns: dict[str, str]
    labels: list[str] | None
    model: Any
    tokenizer: Any
    task_names: list[str] | None = None  # where the training data said which task a row is of


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "recipe.yaml").is_file()


def open_run(folder: str | Path, adapter: bool = True, device: str | None = None) -> Run:
    """Model, tokenizer and adapter of a run folder. Without `adapter` the base model as the run began with it.

    Raises `TunesmithError` when the folder is not a run, or holds no adapter yet.
    """
    import tunesmith as ts

    from ..engine import store
    from ..methods import parse
    from ..quantize import forget
    from . import base
    from .prepare import room
    from .taskdata import task_of

    folder = Path(folder)
    if not is_run(folder):
        there = [p.parent.name for p in folder.parent.glob("*/recipe.yaml")] if folder.parent.is_dir() else []
        from ..errors import nearest

        raise TunesmithError(f"{folder} is not a run folder: it has no recipe.yaml{nearest(folder.name, there)}")
    recipe = recipes.check(recipes.read_yaml(folder / "recipe.yaml")[0])
    try:
        about = json.loads((folder / "data.json").read_text())
        task, columns, labels = task_of(about["task"], recipe.task_options), about["columns"], about["labels"]
        task_names = about.get("tasks")
    except (OSError, ValueError, KeyError) as error:
        raise TunesmithError(f"{folder}/data.json is missing or damaged; train the run anew (--overwrite)") from error
    if adapter and not (folder / "adapter").is_dir():
        raise TunesmithError(f"{folder} holds no adapter yet; finish it with `tunesmith train {folder} --resume`")
    units = store.read_json(folder / "adapter" / store.CARD).get("pruned") if adapter else None
    model, tokenizer = base.load(recipe.model, task.name, labels, recipe.dtype, recipe.seed, recipe.quantize, parse(recipe.method), units, keep=False)
    recipe = recipe.model_copy(update={"max_length": room(model, parse(recipe.method), recipe.max_length)})
    if adapter:
        ts.load(model, folder / "adapter")
    forget(model)
    model.to(pick_device(device or recipe.device)).eval()
    return Run(folder, recipe, task, columns, labels, model, tokenizer, task_names)


def pick_device(name: str):
    """`auto` is the first GPU, else Apple's, else the CPU. Raises `TunesmithError` for a device this machine does not have."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise TunesmithError(f"device {name!r} is not on this machine; use device=auto or device=cpu")
    return device
