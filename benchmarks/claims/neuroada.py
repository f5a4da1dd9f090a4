"""NeuroAda beats LoRA at the smallest budgets, with little of masked training's memory.

    python benchmarks/claims/neuroada.py

Memory is that of benchmarks/results/sparse_step.json.
"""

from _common import LIMITS, above, accuracies, few_shot, parameters, percent, step_ratio, values

from tunesmith.bench.claims import claim

SIDES = {
    "neuroada k=1": {"method": "neuroada", "k": 1},
    "lora r=1": {"method": "lora", "rank": 1, "alpha": 1},
    "neuroada k=16": {"method": "neuroada", "k": 16},
    "lora r=8": {"method": "lora", "rank": 8},
}
PAPER = "NeuroAda (arXiv 2510.18940)"


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    for ours, theirs in (("neuroada k=1", "lora r=1"), ("neuroada k=16", "lora r=8")):
        share = parameters(SIDES[ours]) / parameters(SIDES[theirs])
        claim(
            PAPER,
            f"{ours} is more accurate than {theirs}",
            "LLaMA-7B, eight commonsense tasks: k=20 82.7, k=1 80.0, LoRA r=32 74.7 (README; LoRA from SHiRA's Table 2)",
            f"test accuracy with {share:.2f} of the parameters: {percent(found[ours])} against {percent(found[theirs])}",
            {name: row for name, row in accuracies(rows).items() if name in (ours, theirs)},
            3,
            above(found[ours], found[theirs]),
            LIMITS,
        )
    step_ratio(PAPER, "neuroada", "masked", "NeuroAda needs up to 60% less memory than masked training", "up to 60% less (abstract)", None, 0.5)


if __name__ == "__main__":
    main()
