"""Choosing by sensitivity what trains, and how, beats LoRA and adapters everywhere at the same budget.

python benchmarks/claims/spt.py
"""

from _common import ahead, percent
from _omniglot import LIMITS, moved

from tunesmith.bench.claims import claim

SIDES = {
    "spt-lora": {"method": "spt-lora", "budget": 60_000}, "lora": {"method": "lora", "rank": 6, "alpha": 6},
    "spt-adapter": {"method": "spt-adapter", "budget": 60_000}, "series-adapter": {"method": "series-adapter", "bottleneck": 38},
}  # fmt: skip


def main():
    found = moved(SIDES)
    for ours, theirs in (("spt-lora", "lora"), ("spt-adapter", "series-adapter")):
        claim(
            "SPT (arXiv 2303.08566)",
            f"{ours} is more accurate than {theirs} with no more trained parameters",
            "FGVC, ViT-B: SPT-LoRA 90.1, LoRA-8 86.0; SPT-Adapter 89.8, Adapter-8 85.5 (Table 1)",
            f"test accuracy: {percent(found[ours]['runs'])} with {found[ours]['parameters']:,} parameters against {percent(found[theirs]['runs'])} with {found[theirs]['parameters']:,}",
            {name: found[name] for name in (ours, theirs)},
            3,
            ahead(found[ours]["runs"], found[theirs]["runs"]) and found[ours]["parameters"] <= 1.05 * found[theirs]["parameters"],
            LIMITS,
        )


if __name__ == "__main__":
    main()
