"""SNELL and SNELLA beat SPT-LoRA and LoRA on new images, and take less memory than masked sparse tuning.

    python benchmarks/claims/snell.py

Memory is that of benchmarks/results/sparse_step.json.
"""

import statistics

from _common import ahead, percent, sparse_step
from _omniglot import LIMITS, moved

from tunesmith.bench.claims import claim

SIDES = {
    "snella": {"method": "snella", "rank": 8, "target_sparsity": 0.6}, "snell": {"method": "snell", "rank": 8, "sparsity": 0.6}, "spt-lora": {"method": "spt-lora", "budget": 60_000},
    "lora": {"method": "lora", "rank": 8}, "full": {"method": "full"}, "head alone": None,
}  # fmt: skip


def main():
    found = moved(SIDES)
    shown = "test accuracy: " + ", ".join(f"{name} {percent(each['runs'])}" for name, each in found.items())
    for paper, ours, others, reported in (
        ("SNELL (arXiv 2411.01800)", "snell", ("lora", "spt-lora"), "FGVC, ViT-B: SNELL-8 91.5, SPT-LoRA 90.1, LoRA-8 86.0 (Table 1)"),
        ("SNELLA (arXiv 2510.24037)", "snella", ("spt-lora", "snell"), "FGVC, ViT-B: SNELLA 91.9, SNELL-32 91.8, SPT-LoRA 90.1 (abstract)"),
    ):
        claim(
            paper,
            f"{ours} is more accurate than {' and '.join(others)}",
            reported,
            shown,
            found,
            3,
            all(ahead(found[ours]["runs"], found[other]["runs"]) for other in others),
            LIMITS,
        )
    memory = {layers: sparse_step(f"snell{size}", f"masked{size}")["peak_above_model_mb"] for layers, size in ((8, ":8"), (16, ":16"), (30, ""))}
    claim(
        "SNELL (arXiv 2411.01800)",
        "Kernelised sparse tuning takes 31 to 40% less memory than masked sparse tuning, the more the larger the model",
        "31.1 to 39.9% less for 86M to 632M weights (SNELLA's abstract)",
        "memory above the loaded model over that of masked training: " + ", ".join(f"{layers} layers {ratio:.2f}" for layers, ratio in memory.items()),
        {str(layers): ratio for layers, ratio in memory.items()},
        1,
        max(memory.values()) <= 0.69 and memory[30] < memory[8],
        f"the first 8 and 16 and all 30 layers of SmolLM2-135M's shape, mean ratio {statistics.mean(memory.values()):.2f}",
    )


if __name__ == "__main__":
    main()
