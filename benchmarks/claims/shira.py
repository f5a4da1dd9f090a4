"""SHiRA is more accurate than LoRA, loses less of two tasks when their adapters are added up, and switches faster.

    python benchmarks/claims/shira.py

Switching is that of benchmarks/results/switching.json, memory that of benchmarks/results/sparse_step.json.
"""

import json
from pathlib import Path

from _common import LIMITS, above, accuracies, few_shot, percent, step_ratio, values
from _omniglot import LIMITS as SMALL
from _omniglot import fused, moved

from tunesmith.bench.claims import claim

MASKS = ("struct", "random", "magnitude", "gradient", "snip")
SIDES = {
    f"shira {mask}": {"method": "shira", "rank": 8, "mask": mask} if mask != "struct" else {"method": "shira", "density": 0.03, "mask": mask} for mask in MASKS
} | {"lora": {"method": "lora", "rank": 8}}
FUSED = {name: SIDES[name] for name in ("shira random", "shira magnitude", "lora")}
PAPER = "SHiRA (arXiv 2406.13175)"


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    best = max((name for name in found if name != "lora"), key=lambda name: sum(found[name]))
    claim(
        PAPER,
        "SHiRA is more accurate than LoRA with as many trained parameters",
        "LLaMA-7B, eight commonsense tasks: SNIP 77.4, WM 77.0, Grad 76.6, LoRA 74.7 (Table 2)",
        "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows),
        3,
        above(found[best], found["lora"]),
        LIMITS + "; the best mask is compared",
    )
    rates = {name: side["lr"] for name, side in moved(FUSED).items()}
    lost = fused(FUSED, rates)
    claim(
        PAPER,
        "Two tasks' SHiRA adapters lose less when added up than two LoRA adapters",
        "three tasks on LLaMA2-7B: LoRA 78.4 to 67.3, SHiRA-WM 78.5 to 74.0 (Table 4)",
        "test accuracy alone and added up: "
        + ", ".join(f"{name} {100 * each['alone']['mean']:.1f} to {100 * each['fused']['mean']:.1f}%" for name, each in lost.items()),
        lost,
        3,
        all(above(lost["lora"]["lost"]["runs"], lost[name]["lost"]["runs"]) for name in FUSED if name != "lora"),
        SMALL,
    )
    switch = json.loads(Path("benchmarks/results/switching.json").read_text())
    claim(
        PAPER,
        "Switching from one fused adapter to another is 5 to 16 times as fast as with LoRA",
        "4.7 times on SDXL, 5.7 on LLaMA2-7B, up to 16 for one tensor, on a CPU (Figure 5)",
        f"{1000 * switch['shira_switch_s']:.0f} ms against {1000 * switch['peft_merge_unmerge_s']:.0f} ms of peft's LoRA r=32: {switch['shira_times_faster']:.0f} times",
        {key: switch[key] for key in ("shira_switch_s", "peft_merge_unmerge_s", "shira_times_faster")},
        1,
        switch["shira_times_faster"] >= 5,
        "a model of 135M weights",
    )
    step_ratio(PAPER, "shira", "peft", "SHiRA trains with 16% less memory than peft's LoRA", "29.3 GB against 35.1 GB on LLaMA2-7B (Table 6)", None, 0.84)


if __name__ == "__main__":
    main()
