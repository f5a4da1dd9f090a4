"""LLM-Adapters' table: LoRA above parallel, series and prefix adapters on arithmetic word problems.

    python benchmarks/claims/llm_adapters.py

SmolLM2-135M trains on the 394 problems of docs/runs/word_problems.py for three epochs and answers AddSub's 395. The prefix has as many
tokens as the paper's, the others about as many parameters as LoRA of rank 16 on every linear layer.
"""

import importlib.util
import os
from pathlib import Path

from _common import above, percent

from tunesmith.bench.claims import claim, spread
from tunesmith.bench.compare import compare

FOLDER, PROBLEMS = Path("runs/llm-adapters"), Path("runs/llm-adapters/problems.jsonl")
BASE = {
    "model": "smollm2-135m", "data": str(PROBLEMS), "test": "addsub", "task": "math", "holdout": 0, "epochs": 3, "batch_size": 4, "max_new_tokens": 128,
    "eval_batch_size": 64, "dtype": "bfloat16",
}  # fmt: skip
SIDES = {
    "lora": {"method": "lora", "rank": 16, "alpha": 32}, "parallel": {"method": "parallel-adapter", "targets": ["up_proj", "down_proj"], "bottleneck": 38, "activation": "tanh", "scale": 1.0, "bias": False},
    "series": {"method": "series-adapter", "bottleneck": 128}, "prefix": {"method": "prefix-tuning", "tokens": 30},
}  # fmt: skip
PAPER = "LLM-Adapters (arXiv 2304.01933)"
LIMITS = "a 135M model of its own family, 394 problems, one test set, each method at its default rate; the paper trains LLaMA-7B on ten thousand"


def main():
    PROBLEMS.parent.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.spec_from_file_location("word_problems", Path(__file__).parents[2] / "docs" / "runs" / "word_problems.py")
    spec.loader.exec_module(words := importlib.util.module_from_spec(spec))
    words.main(Path(os.environ.get("TUNESMITH_DATA", "../shared/data")) / "math", PROBLEMS)
    result = compare(list(SIDES.values()), BASE, FOLDER, [0, 1, 2])
    if result["failures"]:
        raise SystemExit(result["failures"][0]["reason"])
    rows = dict(zip(SIDES, result["rows"], strict=True))
    found = {name: [run["value"] for run in row["runs"]] for name, row in rows.items()}
    claim(
        PAPER,
        "LoRA is better than parallel, series and prefix adapters, in this order",
        "average of GSM8K, AQuA, MAWPS and SVAMP, LLaMA-7B: LoRA 46.9, parallel 46.4, series 44.6, prefix 35.0 (README)",
        "accuracy on AddSub: " + ", ".join(f"{name} {percent(each)} with {rows[name]['trainable']:,}" for name, each in found.items()),
        {name: spread(each) | {"trainable": rows[name]["trainable"], "train_s": rows[name]["train_s"]} for name, each in found.items()},
        3,
        all(above(found[a], found[b]) for a, b in zip(found, list(found)[1:], strict=False)),
        LIMITS,
    )


if __name__ == "__main__":
    main()
