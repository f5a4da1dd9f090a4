"""SketchTune is better than LoftQ with as many stored bytes, and its step is faster than LoRA's on the same base.

    python benchmarks/claims/sketchtune.py

Bytes are those of the packed weights and of the adapter in float16. Time is that of benchmarks/results/quantised_step.json.
"""

import json
from pathlib import Path

from _common import BASE, LIMITS, above, accuracies, few_shot, parameters, percent, values

import tunesmith as ts
from tunesmith import models
from tunesmith.bench.claims import claim

PAPER = "SketchTune (arXiv 2410.06364)"
SKETCH, LOFTQ = {"method": "sketchtune"}, {"method": "loftq", "rank": 4, "alpha": 4, "iterations": 5}


def stored(format, method: dict) -> int:
    """Bytes of MiniLM's packed weights and of the adapter; SketchTune's tables are part of the weights."""
    model, _ = models.load(BASE["model"], "classification", labels=["a", "b"])
    packed = ts.quantize.footprint(ts.quantize(model, format))["bytes"]
    return packed + (0 if method["method"] == "sketchtune" else 2 * parameters(method))


def main():
    rows = few_shot({"sketchtune": SKETCH}, "sketch4") | few_shot({"loftq": LOFTQ, "lora": {"method": "lora", "rank": 4}}, "nf4")
    found = {name: values(row) for name, row in rows.items()}
    bytes = {"sketchtune": stored("sketch4", SKETCH), "loftq": stored("nf4", LOFTQ)}
    measured = accuracies({"sketchtune": rows["sketchtune"]}, "sketch4") | accuracies({name: rows[name] for name in ("loftq", "lora")}, "nf4")
    for name, count in bytes.items():
        measured[name]["stored_bytes"] = count
    claim(
        PAPER,
        "SketchTune is more accurate than LoftQ with as many stored bytes",
        "14.5% above LoftQ on GSM8K with 7.3 times fewer trained parameters (abstract)",
        f"test accuracy with {bytes['sketchtune'] / bytes['loftq']:.2f} of the bytes: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        measured,
        3,
        bytes["sketchtune"] <= 1.02 * bytes["loftq"] and above(found["sketchtune"], found["loftq"]),
        LIMITS + "; tables by k-means without data",
    )
    step = json.loads(Path("benchmarks/results/quantised_step.json").read_text())["ratios"]["sketchtune@sketch4 / lora@sketch4"]
    claim(
        PAPER,
        "SketchTune's step takes less time than LoRA's on the same base",
        "one gather and one product (no figure at hand)",
        f"{step['step_s']:.2f} of the time, {step['memory_mb']:.2f} of the memory",
        step,
        1,
        step["step_s"] < 1,
        "SmolLM2-135M's shape on two CPU cores, 4 x 256 tokens; the gradient of a table needs that of the whole matrix, which LoRA never forms",
    )


if __name__ == "__main__":
    main()
