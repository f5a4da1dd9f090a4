"""PEQA brings a model in 4 and 3 bits back to where the float model is tuned to, training its scales alone.

    python benchmarks/claims/peqa.py

The optimiser's memory is counted: AdamW keeps two numbers for each trained one.
"""

from _common import LIMITS, about, accuracies, few_shot, parameters, percent, values

from tunesmith.bench.claims import claim

PAPER = "PEQA (arXiv 2305.14152)"
PEQA = {"method": "peqa"}
FLOAT = {"lora": {"method": "lora", "rank": 8}, "full": {"method": "full"}}


def main():
    plain = few_shot(FLOAT)
    target = {name: values(row) for name, row in plain.items()}
    for format, reported in (
        ("int4", "LLaMA-7B on Wikitext2: 5.84 at 4 bits, LoRA at 16 bits 5.53, LoRA and then GPTQ 7.13 (from memory of the paper)"),
        ("int3", "6.19 at 3 bits, LoRA and then GPTQ 19.47 (from memory of the paper)"),
    ):
        rows = few_shot({"peqa": PEQA}, format)
        found = values(rows["peqa"])
        claim(
            PAPER,
            f"a base in {format} is tuned by its scales alone to within a point of the float base under LoRA",
            reported,
            f"test accuracy: peqa in {format} {percent(found)}; float " + ", ".join(f"{name} {percent(each)}" for name, each in target.items()),
            accuracies(rows, format) | accuracies(plain),
            3,
            about(found, target["lora"]),
            LIMITS + "; groups of 64 weights share a scale",
        )
    counts = {"peqa, a scale for each row": parameters({"method": "peqa", "group_size": "row"}), "lora r=8": parameters(FLOAT["lora"]), "full": parameters(FLOAT["full"])}
    claim(
        PAPER,
        "the optimiser keeps less for scales than for LoRA and far less than for all weights",
        "LLaMA-7B: 1.36M scales, LoRA r=4 on q and v 2.10M, 6.7G weights",
        "numbers in AdamW's states: " + ", ".join(f"{name} {2 * count:,}" for name, count in counts.items()),
        {name: 2 * count for name, count in counts.items()},
        1,
        counts["peqa, a scale for each row"] < counts["lora r=8"] < counts["full"],
        "counted, on a 22M encoder",
    )


if __name__ == "__main__":
    main()
