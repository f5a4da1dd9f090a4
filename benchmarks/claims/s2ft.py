"""S²FT is more accurate than LoRA, forgets less, and its step takes less time and memory than full fine-tuning and LoRA.

    python benchmarks/claims/s2ft.py

Time and memory are those of benchmarks/results/sparse_step.json.
"""

from _common import LIMITS, above, accuracies, few_shot, percent, step_ratio, values
from _omniglot import LIMITS as SMALL
from _omniglot import fused, moved

from tunesmith.bench.claims import claim

SIDES = {
    "s2ft": {"method": "s2ft", "heads": 0.1, "channels": 0.06},
    "s2ft activation": {"method": "s2ft", "heads": 0.1, "channels": 0.06, "choice": "activation"},
    "lora": {"method": "lora", "rank": 8},
    "full": {"method": "full"},
}
PAPER = "S2FT (arXiv 2412.06289)"


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    claim(
        PAPER,
        "S2FT is more accurate than LoRA",
        "LLaMA3-8B: commonsense 86.6 against 82.5, arithmetic 79.6 against 77.2 (project page)",
        "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows),
        3,
        above(found["s2ft"], found["lora"]),
        LIMITS,
    )
    kept = moved(SIDES)
    claim(
        PAPER,
        "S2FT keeps more of what the model knew than LoRA and full fine-tuning",
        "11.5% above full fine-tuning in generalisation after instruction tuning (abstract)",
        f"accuracy on the old alphabets after learning a new one (before: {100 * kept['lora']['known_before']:.1f}%): "
        + ", ".join(f"{name} {percent(each['known']['runs'])} with {percent(each['runs'])} on the new one" for name, each in kept.items()),
        kept,
        3,
        all(above(kept["s2ft"]["known"]["runs"], kept[other]["known"]["runs"]) for other in ("lora", "full")),
        SMALL,
    )
    pair = {name: SIDES[name] for name in ("s2ft", "lora")}
    lost = fused(pair, {name: kept[name]["lr"] for name in pair})
    claim(
        PAPER,
        "Two tasks' S2FT adapters lose less when added up than two LoRA adapters",
        "LoRA 83.1 to 79.8 and 77.2 to 71.6, S2FT 86.6 to 84.0 and 79.6 to 75.3 (project page)",
        "test accuracy alone and added up: "
        + ", ".join(f"{name} {100 * each['alone']['mean']:.1f} to {100 * each['fused']['mean']:.1f}%" for name, each in lost.items()),
        lost,
        3,
        above(lost["lora"]["lost"]["runs"], lost["s2ft"]["lost"]["runs"]),
        SMALL,
    )
    step_ratio(
        PAPER,
        "s2ft",
        "full",
        "S2FT takes up to a third of full fine-tuning's memory, and is 1.5 to 2.7 times as fast",
        "1.5-2.7 times as fast, up to 3 times less memory (abstract)",
        0.67,
        0.4,
    )
    step_ratio(PAPER, "s2ft", "lora", "S2FT takes about 10% less time and memory than LoRA", "about 10% (abstract)", 0.95, 0.95)


if __name__ == "__main__":
    main()
