"""PaCA is as accurate as LoRA with as many trained parameters, and its step takes less time and memory.

    python benchmarks/claims/paca.py

Time and memory are those of benchmarks/results/sparse_step.json.
"""

from _common import LIMITS, about, accuracies, few_shot, percent, step_ratio, values

from tunesmith.bench.claims import claim

SIDES = {"paca": {"method": "paca", "rank": 15, "alpha": 15}, "lora": {"method": "lora", "rank": 8}}
PAPER = "PaCA (arXiv 2503.01905)"


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    claim(
        PAPER,
        "PaCA is as accurate as LoRA with as many trained parameters",
        "LLaMA2-7B on MMLU: LoRA r=8 47.6, PaCA r=16 47.8 (Table 1)",
        "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows),
        3,
        about(found["paca"], found["lora"]),
        LIMITS + "; as accurate means no more than one point below",
    )
    step_ratio(
        PAPER,
        "paca",
        "lora",
        "PaCA's training step takes 22% less time and 16% less memory than LoRA's",
        "0.78 of the time, 0.84 of the memory (abstract)",
        0.85,
        0.85,
    )


if __name__ == "__main__":
    main()
