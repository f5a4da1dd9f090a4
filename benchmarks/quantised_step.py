"""Time and memory of one training step on a base in few bits, beside the same adapter on the float32 base.

    python benchmarks/quantised_step.py                    # writes benchmarks/results/quantised_step.json
    python benchmarks/quantised_step.py --variants lora lora@nf4 --repeats 5

The model is of the SmolLM2-135M architecture with random weights, on 4 x 256 tokens; every linear layer but the head is in
the format after the @ and adapted. Measured as in lora_step.py: each run is a process of its own, they take turns, medians.
Memory is all of the process's beyond what Python and the libraries take (a process without a model).

- lora, qwha: rank 16; fourierft: as many entries as qwha, DFT over both axes; dct: the same entries with a DCT over the inputs
- peqa: a scale for each row; sketchtune: a table of 16 values for each row; l4q: rank 4, groups of 64; paca: rank 31
- peft: peft's LoRA on the float32 base; full: every parameter trained
"""

import argparse
import functools
import json
from pathlib import Path

from lora_step import build, compare, options, publish, resident, run
from lora_step import prepare as prepare_lora

RESULT = Path(__file__).parent / "results" / "quantised_step.json"
RANK = 16
METHODS = {
    "lora": {"rank": RANK, "alpha": 32}, "loftq": {"rank": RANK}, "paca": {"rank": 31, "alpha": 31}, "qwha": {"rank": RANK}, "dct": {"rank": RANK, "basis": "cosine"}, "fourierft": {},
    "peqa": {"group_size": "row"}, "sketchtune": {"groups_per_row": 1}, "l4q": {"rank": 4, "group_size": 64},
}  # fmt: skip
FORMATS = {"nf4": "nf4", "nf4dq": {"format": "nf4", "double_quant": True}, "int4": "int4", "int3": "int3", "row4": {"format": "int4", "group_size": "row"}, "sketch4": "sketch4", "nvfp4": "nvfp4"}
VARIANTS = ["empty", "full", "peft", "lora", "lora@nf4", "lora@nf4dq", "lora@int4", "lora@int3", "lora@nvfp4", "paca@nf4", "qwha@int4", "dct@int4", "fourierft@int4", "lora@row4", "peqa@row4", "lora@sketch4", "sketchtune@sketch4", "l4q"]
PAIRS = [
    ("lora@nf4", "lora"), ("lora@nf4dq", "lora"), ("lora@int4", "lora"), ("lora@int3", "lora"), ("lora@nvfp4", "lora"), ("lora@nf4", "peft"), ("lora@nf4", "full"), ("paca@nf4", "lora@nf4"),
    ("qwha@int4", "dct@int4"), ("qwha@int4", "fourierft@int4"), ("qwha@int4", "lora@int4"), ("peqa@row4", "lora@row4"), ("peqa@row4", "full"), ("sketchtune@sketch4", "lora@sketch4"), ("l4q", "lora"), ("l4q", "full"),
]  # fmt: skip


def build_in(format, layers):
    import tunesmith as ts

    model = build(layers)
    return ts.quantize(model, FORMATS[format]) if format else model


def nothing(layers):
    import torch
    import transformers  # noqa: F401

    import tunesmith  # noqa: F401

    return torch.nn.Linear(1, 1)


def ours(method):
    import torch

    import tunesmith as ts

    def prepare(model):
        name, fields = "qwha" if method == "dct" else method, METHODS[method]
        if method == "fourierft":
            shapes = {m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
            fields = {"targets": {f".*({'|'.join(names_of(model, shape))})": {"n_frequency": RANK * sum(shape)} for shape in shapes}}
        ts.adapt(model, {"method": name, **fields})
        return list(ts.trainable(model).values()), lambda ids: ts.causal_lm_loss(model, ids, ids)

    return prepare


def names_of(model, shape):
    """The last names of the linear layers of one shape."""
    import torch

    return sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head" and m.weight.shape == shape})


def prepare_of(variant):
    method = variant.partition("@")[0]
    if method in ("full", "peft"):
        return functools.partial(prepare_lora, method)
    return ours(method)


def one(variant, args):
    if variant == "empty":
        nothing(0)
        return {"seconds": [0.0], "cpu_seconds": [0.0], "losses": [], "peak_mb": resident("VmHWM") - resident("VmRSS"), "loaded_mb": resident("VmRSS"), "trained": 0}
    return run(prepare_of(variant), args, 30, functools.partial(build_in, variant.partition("@")[2]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(one(args.run, args)))
        return
    results = compare(__file__, args.variants, args, prepare_of)
    empty = results.pop("empty")["loaded_model_mb"] if "empty" in results else 0
    for each in results.values():
        each["memory_mb"] = each["loaded_model_mb"] + each["peak_above_model_mb"] - empty
    publish(__file__, args, results, PAIRS, ("step_s", "fastest_step_s", "memory_mb", "peak_above_model_mb"), stored={name: footprints(name) for name in FORMATS})


def footprints(format):
    """Bytes of the packed weights beside the closed form."""
    from tunesmith.quantize import footprint

    return {key: value for key, value in footprint(build_in(format, 2)).items() if key in ("weights", "bytes", "closed_form", "bits_per_weight")}


if __name__ == "__main__":
    main()
