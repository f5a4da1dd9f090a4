"""What the claims about accuracy share: MiniLM, ten examples of each of Banking77's 77 intents, and how two sides are told apart."""

import json
import statistics
from pathlib import Path

import torch

import tunesmith as ts
from tunesmith import models
from tunesmith.bench.claims import claim, spread
from tunesmith.bench.compare import compare
from tunesmith.files import atomic_write

BASE = {"data": "banking77", "test": "banking77", "model": "minilm", "per_label": 10, "holdout": 0.05, "epochs": 6, "batch_size": 16, "eval_every": 10_000, "dtype": "bfloat16", "head_lr": 0.01}
RATES, TRIAL, SEEDS = ["0.3x", "1x", "3x", "10x"], {"epochs": 3}, [0, 1, 2]
FOLDER = Path("runs/few-shot")
LIMITS = "a 22M encoder in bfloat16 on ten examples of each of 77 intents, six epochs, one rate for all heads, the adapter's chosen among four on held-out data after three epochs; the paper's models are 300 times as large"


MEASURED, BOARDS = Path("benchmarks/results/few-shot.json"), [Path(f"docs/leaderboard/{name}.json") for name in ("few-shot", "quantised")]


def few_shot(sides: dict[str, dict], quantize: str | None = None, runs: bool = False, selection: str | None = None) -> dict[str, dict]:
    """{"method" with the best of RATES, "values" of the seeds, "runs"} for each method, on a base in a number format, with a selection of layers.

    What MEASURED or BOARDS (of docs/leaderboard, measured alike) hold is not measured again, unless the `runs` themselves are wanted;
    those that FOLDER holds are not done again.
    """
    given = {key: value for key, value in (("quantize", quantize), ("selection", selection)) if value}
    listed = [row for board in BOARDS if board.exists() for row in json.loads(board.read_text())["rows"]]

    def alike(row):
        return row.get("quantize") == quantize and row.get("selection") == selection

    known = list(filter(alike, kept(MEASURED) + listed))
    found = {} if runs else {name: next((row for row in known if plain(row) == side), None) for name, side in sides.items()}
    if missing := {name: side for name, side in sides.items() if not found.get(name)}:
        result = compare(list(missing.values()), BASE | given, FOLDER.with_name("-".join([FOLDER.name, *given.values()])), SEEDS, rates=RATES, jobs=2, trial=TRIAL)
        if result["failures"]:
            raise SystemExit(result["failures"][0]["reason"])
        new = {
            name: {"quantize": quantize, **given, "method": row["method"], "values": [run["value"] for run in row["runs"]]}
            for name, row in zip(missing, result["rows"], strict=True)
        }
        atomic_write(MEASURED, json.dumps([row for row in kept(MEASURED) if plain(row) not in map(plain, new.values()) or not alike(row)] + list(new.values()), indent=1) + "\n")
        found |= {name: new[name] | {"runs": row["runs"]} for name, row in zip(missing, result["rows"], strict=True)}
    return {name: found[name] for name in sides}


def kept(file: Path) -> list | dict:
    """What experiments have kept there, [] before the first. To be read anew before it is written: another may have added to it meanwhile."""
    return json.loads(file.read_text()) if file.exists() else []


def plain(row: dict) -> dict:
    """A row's method without the rate that was chosen for it."""
    return {key: value for key, value in row["method"].items() if key != "lr"}


def parameters(method: dict, quantize: str | None = None) -> int:
    """Those of the adapter on MiniLM, without the classification head; the budget of a method that spends it while it trains."""
    model, _ = models.load(BASE["model"], "classification", labels=["a", "b"])

    def calibrate(model):  # values do not matter, shapes do
        model(input_ids=torch.tensor([[101, 2026, 4003, 102], [101, 2054, 2003, 102]]), labels=torch.tensor([0, 1])).loss.backward()

    return ts.summary(ts.adapt(ts.quantize(model, quantize) if quantize else model, method, calibrate=calibrate)).trainable or method["budget"]


def values(row: dict) -> list[float]:
    return row["values"]


def logged(row: dict, key: str) -> list[list[float]]:
    """What each run logged under `key` while it trained, of a row that was asked for with its runs."""
    lines = ([json.loads(line) for line in (FOLDER / run["folder"] / "metrics.jsonl").read_text().split("\n") if line] for run in row["runs"])
    return [[line[key] for line in each if key in line] for each in lines]


def error(a: list[float], b: list[float]) -> float:
    """Standard error of the difference of two means."""
    return sum(statistics.variance(side) / len(side) for side in (a, b)) ** 0.5


def above(a: list[float], b: list[float]) -> bool:
    """Whether a's mean exceeds b's by more than twice the standard error of the difference."""
    return statistics.mean(a) - statistics.mean(b) > 2 * error(a, b)


def ahead(a: list[float], b: list[float]) -> bool:
    """Whether a is above b, seed by seed, by more than twice the standard error of the mean difference."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(gaps) > 2 * statistics.stdev(gaps) / len(gaps) ** 0.5


def about(a: list[float], b: list[float], margin: float = 0.01) -> bool:
    """Whether a's mean is no more than `margin` below b's."""
    return statistics.mean(a) >= statistics.mean(b) - margin


def percent(side: list[float]) -> str:
    return f"{100 * statistics.mean(side):.1f} ± {100 * statistics.stdev(side):.1f}%"


def accuracies(rows: dict[str, dict], quantize: str | None = None) -> dict:
    """`measured` of a claim about accuracy."""
    return {name: spread(values(row)) | {"parameters": parameters(plain(row), quantize), "lr": row["method"]["lr"]} for name, row in rows.items()}


def sparse_step(one: str, other: str) -> dict[str, float]:
    """Time and memory of one training step over another's, as benchmarks/sparse_step.py measured them."""
    return json.loads(Path("benchmarks/results/sparse_step.json").read_text())["ratios"][f"{one} / {other}"]


def step_ratio(paper: str, one: str, other: str, sentence: str, reported: str, time: float | None, memory: float) -> None:
    """A claim that a step takes at most `time` and `memory` of another's."""
    found = sparse_step(one, other)
    claim(
        paper,
        sentence,
        reported,
        f"{one} takes {found['step_s']:.2f} of {other}'s time and {found['peak_above_model_mb']:.2f} of its memory above the loaded model",
        found,
        1,
        (time is None or found["step_s"] <= time) and found["peak_above_model_mb"] <= memory,
        "SmolLM2-135M's shape on two CPU cores, 4 x 256 tokens",
    )
