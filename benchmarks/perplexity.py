"""Perplexity and size of SmolLM2-135M with its linear layers in few bits, rounded to nearest and calibrated.

    python benchmarks/perplexity.py                        # writes benchmarks/results/perplexity.json
    python benchmarks/perplexity.py --formats int4 int3    # measures these anew and keeps the other rows

The text is tiny Shakespeare: 16 pieces of 512 tokens from its beginning calibrate (GPTQ), 24 from its last tenth are scored.
With bitsandbytes installed, its NF4 stands beside ours: the same model with each weight as that library gives it back.
"""

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path

import torch
from result import keep

import tunesmith as ts
from tunesmith import models

FORMATS = {
    "int8": "int8", "nf4": "nf4", "nf4, double": {"format": "nf4", "double_quant": True}, "int4": "int4", "mxfp4": "mxfp4", "nvfp4": "nvfp4", "sketch4": "sketch4",
    "nf3": "nf3", "int3": "int3", "sketch3": "sketch3", "int2": "int2", "sketch2": "sketch2",
}  # fmt: skip
CALIBRATED = ("nf4", "int4", "nf3", "int3", "int2")
LENGTH, KNOWN, SCORED = 512, 16, 24


def perplexity(model, pieces) -> float:
    with torch.no_grad():
        return math.exp(sum(ts.causal_lm_loss(model, piece[None], piece[None]).item() for piece in pieces) / len(pieces))


def bitsandbytes_nf4(model):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize_4bit(*quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4"))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "perplexity.json")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    args = parser.parse_args()
    model, tokenizer = models.load("smollm2-135m", "lm")
    text = (Path(os.environ.get("TUNESMITH_DATA", "../shared/data")) / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    learned, scored = (torch.tensor(tokenizer(part)["input_ids"]).split(LENGTH) for part in (text[: len(text) // 10], text[-len(text) // 10 :]))
    learned, scored = learned[:KNOWN], scored[:SCORED]

    def calibrate(model):
        with torch.no_grad():
            for piece in learned:
                model(input_ids=piece[None])

    known = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.exists() else {}
    found = {"float32": {"perplexity": perplexity(model, scored)}}
    for name, format in FORMATS.items():
        if name not in args.formats:
            found |= {row: known[row] for row in (name, f"{name}, calibrated") if row in known}
            continue
        for how in (None, calibrate) if name in CALIBRATED else (None,):
            fresh, _ = models.load("smollm2-135m", "lm")
            size = ts.quantize.footprint(ts.quantize(fresh, format, calibrate=how))
            row = {key: size[key] for key in ("bytes", "closed_form", "bits_per_weight")} | {"perplexity": perplexity(fresh, scored)}
            found[f"{name}, calibrated" if how else name] = row
            print(name, "calibrated" if how else "", row, flush=True)
    if "bitsandbytes nf4" in known:
        found["bitsandbytes nf4"] = known["bitsandbytes nf4"]
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes nf4"] = {"perplexity": perplexity(bitsandbytes_nf4(model), scored)}
    keep(
        {
            "what": "perplexity per token on held-out text, float32 arithmetic",
            "command": "python benchmarks/perplexity.py",
            "model": "SmolLM2-135M",
            "tokens": LENGTH * SCORED,
            "rows": found,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
