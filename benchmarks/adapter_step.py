"""Time and memory of one training step of series and parallel adapters, beside AdapterHub's library.

    python -m venv hub && hub/bin/pip install torch==2.13.0 "numpy<2.4" adapters==1.3.0    # it needs an older transformers
    python benchmarks/adapter_step.py --hub-python hub/bin/python                           # writes benchmarks/results/adapter_step.json

The model is of the SmolLM2-135M architecture with random weights, in float32, on 4 x 256 tokens; bottlenecks of 64 with biases
and ReLU, behind (series) or beside (parallel, scale 4) every feed-forward block. Measured as in lora_step.py: each run is a
process of its own, they take turns, medians. The library's loss is transformers', ours `tunesmith.causal_lm_loss`.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from lora_step import compare, options, publish, run

RESULT = Path(__file__).parent / "results" / "adapter_step.json"
VARIANTS = ["series", "hub-series", "parallel", "hub-parallel"]


def prepare(variant, model):
    kind = variant.removeprefix("hub-")
    if variant.startswith("hub-"):
        import adapters

        config = {"series": adapters.SeqBnConfig, "parallel": adapters.ParBnConfig}[kind](reduction_factor=model.config.hidden_size / 64, non_linearity="relu")
        adapters.init(model)
        model.add_adapter("a", config)
        model.train_adapter("a")
        return [p for p in model.parameters() if p.requires_grad], lambda ids: model(input_ids=ids, labels=ids).loss
    import tunesmith as ts

    fields = {"bottleneck": 64, "activation": "relu", "bias": True, "scale": 4.0 if kind == "parallel" else 1.0}
    ts.adapt(model, {"method": f"{kind}-adapter", **fields})
    return list(ts.trainable(model).values()), lambda ids: ts.causal_lm_loss(model, ids, ids)


def prepare_of(variant):
    return functools.partial(prepare, variant)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--hub-python", default=sys.executable, help="the interpreter that has AdapterHub's library")
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args)))
        return
    results = compare(__file__, args.variants, args, prepare_of, interpreter=lambda variant: args.hub_python if variant.startswith("hub-") else sys.executable)
    publish(__file__, args, results, [("series", "hub-series"), ("parallel", "hub-parallel")])


if __name__ == "__main__":
    main()
