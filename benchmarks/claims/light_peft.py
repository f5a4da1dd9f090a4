"""Light-PEFT cuts more than 40% of the model and three quarters of the adapter early in training, and costs little accuracy.

    python benchmarks/claims/light_peft.py

MiniLM on 40 texts of each of Banking77's 77 intents, four epochs, LoRA of rank 8 on all linear layers. The first stage takes 200
steps (the whole run has 770).
"""

import statistics
import time

import torch
from _common import percent

import tunesmith as ts
from tunesmith.bench.claims import claim, spread
from tunesmith.engine.store import pruned_units
from tunesmith.pruning import prunable
from tunesmith.train import recipe as recipes
from tunesmith.train.folder import open_run
from tunesmith.train.loop import run

BASE = {
    "model": "minilm", "data": "banking77", "test": "banking77", "per_label": 40, "holdout": 0.05, "epochs": 4, "batch_size": 16,
    "eval_every": 10_000, "lr": 3e-3, "head_lr": 0.01, "method": {"method": "lora", "rank": 8},
}  # fmt: skip
PRUNE = {"prune": "light-peft", "steps": 200, "heads": 0.42, "channels": 0.42, "modules": 0.5, "ranks": 0.5}
SIDES = {"whole": {}, "light-peft": {"prune": PRUNE}}
SEEDS = range(3)
PAPER = "Light-PEFT (arXiv 2406.03792)"
LIMITS = "a 22M encoder on 40 texts of each of 77 intents, batches of 16 and a first stage of 200 steps; the authors' has 800 steps of 32 on GLUE, with RoBERTa-large"


def seconds(model, rows=32, length=16, repeats=10) -> float:
    """The fastest of some forwards."""
    ids = torch.randint(1000, 20_000, (rows, length), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - began)
    return min(times)


def in_blocks(model) -> int:
    """The weights and biases of attentions and feed-forward blocks."""
    return sum(p.numel() for c in prunable(model).values() for s in (c.outer, *c.inner) for p in s.values.values())


def main():
    found = {}
    for side, more in SIDES.items():
        rows = []
        for seed in SEEDS:
            folder = f"runs/light-peft/{side.replace(' ', '-').replace(',', '')}-{seed}"
            summary = run(recipes.check(BASE | more | {"seed": seed, "output": folder}), resume=True).summary
            model = open_run(folder).model
            rows.append({"accuracy": summary["test"]["accuracy"], "train_s": summary["train_s"], "blocks": in_blocks(model), "layers": len(pruned_units(model)), "forward_s": seconds(model),
                         "adapter": sum(p.numel() for path, p in ts.trainable(model).items() if not path.startswith("classifier")), "peak_mb": summary["peak_mb"]})  # fmt: skip
        found[side] = {key: spread([row[key] for row in rows]) for key in rows[0]}
    whole = found["whole"]
    for side in (s for s in SIDES if s != "whole"):
        here = found[side]
        ratio = {key: here[key]["mean"] / whole[key]["mean"] for key in ("blocks", "adapter", "train_s", "forward_s")}
        gap = statistics.mean(whole["accuracy"]["runs"]) - statistics.mean(here["accuracy"]["runs"])
        claim(
            PAPER,
            f"{side}: over 40% of the model and three quarters of the trained parameters go, at comparable accuracy and less time",
            "over 40% of the model pruned, 25% of the trained parameters (abstract)",
            f"{1 - ratio['blocks']:.0%} of the blocks' weights and {1 - ratio['adapter']:.0%} of the adapter cut; test accuracy {percent(here['accuracy']['runs'])} against "
            f"{percent(whole['accuracy']['runs'])}; training after the first stage {ratio['train_s']:.2f} and a forward {ratio['forward_s']:.2f} of the time",
            {"ratios": ratio} | {"whole": whole, side: here},
            len(SEEDS),
            ratio["blocks"] <= 0.6 and ratio["adapter"] <= 0.25 and gap <= 0.01 and max(ratio["train_s"], ratio["forward_s"]) <= 0.75,
            LIMITS,
        )


if __name__ == "__main__":
    main()
