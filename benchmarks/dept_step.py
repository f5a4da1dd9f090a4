"""Time and memory of one training step of decomposed prompt tuning, beside prompt tuning of as many parameters.

    python benchmarks/dept_step.py                     # every variant, writes benchmarks/results/dept_step.json
    python benchmarks/dept_step.py --variants dept:8 prompt:8 --steps 2 --repeats 1
    python benchmarks/dept_step.py --device cuda --steps 20

The models are the first 8 and 16 layers and the whole 30 of the SmolLM2-135M architecture with random weights, in float32, on
4 x 256 tokens. Measured as in lora_step.py: each run is a process of its own, they take turns, medians. Both methods train
57,600 numbers:

- prompt: 100 virtual tokens, 100·576
- dept: 22 virtual tokens (the paper tries 20 to 80) and offsets of rank 54 for 256 positions, 22·576 + (256 + 576)·54; on a
  GPU, where a row has 512 tokens, 15 and rank 45, 15·576 + (512 + 576)·45
- short: 9 virtual tokens and rank 63, 9·576 + (256 + 576)·63; on CPUs alone
"""

import argparse
import functools
import json
from pathlib import Path

from lora_step import compare_sizes, options, publish, run

RESULT = Path(__file__).parent / "results" / "dept_step.json"
LAYERS = (8, 16, 30)
METHODS = {
    "prompt": {"method": "prompt-tuning", "tokens": 100},
    "dept": {"method": "dept", "tokens": 22, "rank": 54, "max_length": 256},
    "short": {"method": "dept", "tokens": 9, "rank": 63, "max_length": 256},
}
LONGER = {"dept": {"method": "dept", "tokens": 15, "rank": 45, "max_length": 512}}
VARIANTS = [f"{name}:{layers}" for layers in LAYERS for name in METHODS]


def prepare(name, model):
    import tunesmith as ts

    ts.adapt(model, (METHODS | LONGER if model.device.type == "cuda" else METHODS)[name])
    return list(ts.trainable(model).values()), lambda ids: ts.causal_lm_loss(model, ids, ids)


def prepare_of(variant):
    return functools.partial(prepare, variant.partition(":")[0])


def layers_of(variant):
    return int(variant.partition(":")[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args, layers_of(args.run))))
        return
    variants = [v for v in args.variants if args.device == "cpu" or not v.startswith("short")]
    results = compare_sizes(__file__, variants, args, prepare_of, layers_of)
    publish(__file__, args, results, [(f"{name}:{n}", f"prompt:{n}") for name in ("dept", "short") for n in LAYERS])


if __name__ == "__main__":
    main()
