"""Bone (MiSS) converges faster than LoRA and PiSSA with as many parameters, and ends higher.

    python benchmarks/claims/bone.py

Bone of rank 16 trains r·out numbers for a layer, LoRA r·(in + out): ranks are chosen so that Bone has no more of them.
Convergence is the mean training loss over the whole run: the area under the curve.
"""

import statistics

from _common import LIMITS, about, above, accuracies, few_shot, logged, percent, spread, values

from tunesmith.bench.claims import claim

SIDES = {"bone": {"method": "bone", "rank": 16}, "lora": {"method": "lora", "rank": 8}, "pissa": {"method": "pissa", "rank": 8}}


def main():
    rows = few_shot(SIDES, runs=True)
    losses = {name: [statistics.mean(run) for run in logged(row, "loss")] for name, row in rows.items()}
    claim(
        "MiSS / Bone (arXiv 2409.15371)",
        "Bone converges faster than LoRA and PiSSA with as many parameters",
        "training loss of Bone below LoRA's and PiSSA's from the first hundred steps on (figures; LLaMA2-7B, MetaMathQA)",
        "mean training loss: " + ", ".join(f"{name} {statistics.mean(each):.3f}" for name, each in losses.items()),
        {name: spread(each) for name, each in losses.items()},
        3,
        all(above(losses[other], losses["bone"]) for other in ("lora", "pissa")),
        LIMITS,
    )
    found = {name: values(row) for name, row in rows.items()}
    claim(
        "MiSS / Bone (arXiv 2409.15371)",
        "Bone ends above LoRA and PiSSA with as many parameters",
        "GSM8K 48.2 against 40.8 (LoRA) and 43.9 (PiSSA), LLaMA2-7B",
        "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows),
        3,
        all(above(found["bone"], found[other]) for other in ("lora", "pissa")),
        LIMITS + (f"; within a point of both: {'yes' if all(about(found['bone'], found[o]) for o in ('lora', 'pissa')) else 'no'}"),
    )


if __name__ == "__main__":
    main()
