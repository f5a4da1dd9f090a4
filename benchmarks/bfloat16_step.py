"""One training step of SmolLM2-135M with LoRA on a CPU: float32, bfloat16 as torch has it, and bfloat16 with attention's gradients in float32.

    python benchmarks/bfloat16_step.py --output benchmarks/results/bfloat16_step.json

4 texts of 64, 128 and 256 tokens, rank 8 on all linear layers, the first 10 of the model's layers; medians of interleaved steps.
Attention with dropout, as BERT's, is another kernel and left alone.
"""

import argparse
import contextlib
import copy
import os
import statistics
import time
from pathlib import Path

import torch
from result import keep

import tunesmith as ts
from tunesmith import models
from tunesmith.models import quick_attention

WAYS = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16, plain": (torch.bfloat16, contextlib.nullcontext),
    "bfloat16": (torch.bfloat16, quick_attention),
}
LENGTHS, ROWS, LAYERS, REPEATS = (64, 128, 256), 4, 10, 6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    base, _ = models.load("smollm2-135m", "lm")
    base.model.layers = base.model.layers[:LAYERS]
    own = {way: ts.adapt(copy.deepcopy(base).to(dtype), {"method": "lora", "rank": 8}).train() for way, (dtype, _) in WAYS.items()}
    optimizers = {way: torch.optim.AdamW(ts.trainable(model).values(), lr=1e-4) for way, model in own.items()}

    def seconds(way: str, length: int) -> float:
        ids = torch.randint(1000, 20_000, (ROWS, length))
        began = time.perf_counter()
        optimizers[way].zero_grad()
        with WAYS[way][1]():
            ts.causal_lm_loss(own[way], ids, ids).backward()
        optimizers[way].step()
        return time.perf_counter() - began

    found = {}
    for length in LENGTHS:
        times = {way: [] for way in WAYS}
        for _ in range(REPEATS):
            for way, each in times.items():
                each.append(seconds(way, length))
        found[length] = {way: statistics.median(each[1:]) for way, each in times.items()}
    ratios = {
        length: {"over plain": row["bfloat16"] / row["bfloat16, plain"], "over float32": row["bfloat16"] / row["float32"]} for length, row in found.items()
    }
    keep(
        {
            "what": "seconds of a training step, and bfloat16's over the others'",
            "command": "python benchmarks/bfloat16_step.py",
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
            "ratios": ratios,
            "seconds": found,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
