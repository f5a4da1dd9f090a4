"""Training a quarter of the layers at a step, chosen by importance, is no less accurate than training all, and takes less memory.

    python benchmarks/claims/ist.py

Every side has as many steps. The memory is that of benchmarks/results/ist_step.json, which benchmarks/ist_step.py writes.
"""

import json
from pathlib import Path

from _common import LIMITS, above, accuracies, few_shot, percent, values

from tunesmith.bench.claims import claim

PAPER = "IST (arXiv 2410.11772)"
SIDES = {"lora": {"method": "lora", "rank": 8}, "series": {"method": "series-adapter"}}
SELECTIONS = {"every layer": None, "random": "rst", "ist": "ist"}


def main():
    for name, method in SIDES.items():
        rows = {called: few_shot({name: method}, selection=selection)[name] for called, selection in SELECTIONS.items()}
        found = {called: values(row) for called, row in rows.items()}
        shown = ", ".join(f"{called} {percent(each)}" for called, each in found.items())
        limits = LIMITS + "; one layer of six trains at a step, every parameter thus for a sixth of the steps"
        for sentence, reported, holds in (
            (f"{name}: as accurate as training every layer", "better on commonsense tasks (abstract)", not above(found["every layer"], found["ist"])),
            (f"{name}: layers chosen by importance are better than random ones", "better (abstract)", above(found["ist"], found["random"])),
        ):
            claim(PAPER, sentence, reported, f"test accuracy: {shown}", accuracies(rows), 3, holds, limits)
    ratios = json.loads(Path("benchmarks/results/ist_step.json").read_text())["ratios"]
    memory = {name: ratios[f"{name}-ist / {name}"]["peak_above_model_mb"] for name in SIDES}
    claim(
        PAPER,
        "a step takes at most three quarters of the memory above the model",
        "less memory (title)",
        ", ".join(f"{ratio:.2f} of {name}'s" for name, ratio in memory.items()),
        memory,
        1,
        max(memory.values()) <= 0.75,
        "SmolLM2-135M's shape on two CPU cores, 4 x 256 tokens; the backward still reaches the lowest chosen layer, on average the fourth of thirty, and without IST our layers keep no input of their own",
    )


if __name__ == "__main__":
    main()
