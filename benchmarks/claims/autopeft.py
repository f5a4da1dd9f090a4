"""AutoPEFT's front, found on one task with little data, dominates the usual adapters on another, and beats random search.

    python benchmarks/claims/autopeft.py

The search sees CLINC150 alone, ten texts of each of its 150 intents, three epochs, and 1,000 held-out texts; 80 trials, of which
24 are random, beside 80 random ones. Its front and the usual methods at their defaults are then trained on Banking77, ten texts of
each of its 77 intents, over three seeds, at the same rates: 1e-3 times each method's own (`combined`'s rule) and 1e-2 for the head.
"""

import json
import math
import statistics
from pathlib import Path

from _common import BASE, kept, percent, plain

from tunesmith.bench.claims import claim, spread
from tunesmith.bench.compare import compare
from tunesmith.files import atomic_write
from tunesmith.search.search import search

FOLDER, MEASURED = Path("runs/autopeft"), Path("benchmarks/results/autopeft.json")
CLINC = {"data": "clinc150", "model": "minilm", "per_label": 10, "holdout": 0.05, "eval_limit": 1000, "epochs": 3, "batch_size": 16, "eval_every": 10_000, "dtype": "bfloat16", "head_lr": 0.01}
USUAL = {
    "lora": {"method": "lora"}, "pfeiffer": {"method": "series-adapter"}, "prefix": {"method": "prefix-tuning"},
    "mam": {"method": "combined", "parts": ["parallel-adapter", "prefix-tuning"]}, "full": {"method": "full", "lr": 5e-4},
}  # fmt: skip
TRIALS, STARTUP, SEEDS = 80, 24, [0, 1, 2]
PAPER = "AutoPEFT (arXiv 2301.12132)"
LIMITS = f"a 22M encoder; {TRIALS} trials of half a minute; plain Gaussian processes in place of the paper's fully Bayesian ones; trained parameters include the head's 29,645"


def volume(rows: list[dict], least: float, most: float) -> float:
    """The area that (log of trained parameters, accuracy) of some trials dominate, over (most, 0)."""
    area, best = 0.0, 0.0
    for row in sorted(rows, key=lambda row: row["trainable"]):
        if row["value"] > best:
            area += (row["value"] - best) * (math.log10(most) - math.log10(max(row["trainable"], least)))
            best = row["value"]
    return area


def searched(seed: int, random: bool) -> list[dict]:
    """The trials of one search, kept in MEASURED."""
    known = dict(kept(MEASURED))
    name = f"{'random' if random else 'guided'} {seed}"
    if name not in known:
        found = search(CLINC, FOLDER / name.replace(" ", "-"), trials=TRIALS, startup=STARTUP, seed=seed, random=random)
        known = dict(kept(MEASURED)) | {name: [{key: row[key] for key in ("value", "trainable", "method", "text", "front")} for row in found["trials"]]}
        atomic_write(MEASURED, json.dumps(known, indent=1) + "\n")
    return known[name]


def main():
    guided, random = searched(0, False), searched(0, True)
    most = max(row["trainable"] for row in guided + random)
    least = min(row["trainable"] for row in guided + random)
    areas = {name: volume(rows, least, most) for name, rows in (("guided", guided), ("random", random))}
    claim(
        PAPER,
        "The guided search finds a better front than random search with as many trials",
        "AutoPEFT above random search in hypervolume on RTE (figure)",
        f"hypervolume (accuracy times decades of parameters) {areas['guided']:.3f} against {areas['random']:.3f} after {TRIALS} trials",
        areas,
        1,
        areas["guided"] > areas["random"],
        LIMITS,
    )
    front = sorted((row for row in guided if row["front"]), key=lambda row: row["trainable"])
    sides = {row["text"]: row["method"] for row in front} | USUAL
    result = compare(list(sides.values()), BASE, FOLDER / "banking77", SEEDS, jobs=1)
    if result["failures"]:
        raise SystemExit(result["failures"][0]["reason"])
    rows = dict(zip(sides, result["rows"], strict=True))
    found = {name: [run["value"] for run in row["runs"]] for name, row in rows.items()}
    mean = {name: statistics.mean(each) for name, each in found.items()}
    ours = [row["text"] for row in front]
    measured = {name: spread(each) | {"trainable": rows[name]["trainable"], "method": plain(rows[name])} for name, each in found.items()}
    shown = ", ".join(f"{name} {percent(found[name])} with {rows[name]['trainable']:,}" for name in sides)
    beaten = [name for name in USUAL if name != "full" and any(mean[o] >= mean[name] and rows[o]["trainable"] <= rows[name]["trainable"] for o in ours)]
    claim(
        PAPER,
        "The front, moved to another task, dominates LoRA, the Pfeiffer adapter, prefix tuning and MAM at their defaults",
        "AutoPEFT found on RTE is above the usual configurations of as many parameters on GLUE on average (abstract)",
        f"dominated on Banking77: {', '.join(beaten) or 'none'}; test accuracy: {shown}",
        measured,
        len(SEEDS),
        len(beaten) == 4,
        LIMITS,
    )
    claim(
        PAPER,
        "Somewhere on the front is as good as full fine-tuning",
        "on par with full fine-tuning on GLUE (abstract)",
        f"best of the front {percent(found[max(ours, key=mean.get)])}, full {percent(found['full'])}",
        {name: measured[name] for name in (max(ours, key=mean.get), "full")},
        len(SEEDS),
        max(mean[o] for o in ours) >= mean["full"],
        LIMITS,
    )


if __name__ == "__main__":
    main()
