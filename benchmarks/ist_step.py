"""Time and memory of one training step under IST, beside the same method without it and peft's LoRA.

    python benchmarks/ist_step.py                     # every variant, writes benchmarks/results/ist_step.json
    python benchmarks/ist_step.py --variants lora lora-ist --steps 2 --repeats 1

The model is of the SmolLM2-135M architecture with random weights, in float32, on 4 x 256 tokens; a quarter of the layers trains at
each step, importance is not probed. Measured as in lora_step.py: each run is a process of its own, they take turns, medians.
"""

import argparse
import functools
import json
from pathlib import Path

from lora_step import compare, options, publish, run
from lora_step import prepare as prepare_lora

RESULT = Path(__file__).parent / "results" / "ist_step.json"
METHODS = {"lora": {"method": "lora", "rank": 16, "alpha": 32}, "dora": {"method": "dora", "rank": 16, "alpha": 32}, "series": {"method": "series-adapter"}, "parallel": {"method": "parallel-adapter"}}
VARIANTS = [*METHODS, *(f"{name}-ist" for name in METHODS), "peft"]


def prepare(variant, model):
    if variant == "peft":
        return prepare_lora(variant, model)
    import tunesmith as ts

    ts.adapt(model, METHODS[variant.removesuffix("-ist")])
    parameters, loss = list(ts.trainable(model).values()), lambda ids: ts.causal_lm_loss(model, ids, ids)
    return (parameters, loss, ts.stages(model, 100, ts.IST(interval=None))) if variant.endswith("-ist") else (parameters, loss)


def prepare_of(variant):
    return functools.partial(prepare, variant)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args)))
        return
    results = compare(__file__, args.variants, args, prepare_of)
    publish(__file__, args, results, [*((f"{name}-ist", name) for name in METHODS), ("lora-ist", "peft")])


if __name__ == "__main__":
    main()
