"""Time to switch from one adapter to another on the SmolLM2-135M shape.

LoRA r=32: activation here, merge and unmerge in peft. SHiRA with 1% of each matrix, S2FT and PaCA: from one merged adapter to
another, which writes the chosen entries alone.

    python benchmarks/switching.py --output benchmarks/results/switching.json
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from result import keep
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path)
args = parser.parse_args()


def model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))


def median(switch, times: int) -> float:
    taken = []
    for i in range(times):
        began = time.perf_counter()
        switch("ab"[i % 2])
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


ours = model()
for name in "ab":
    ts.adapt(ours, ts.LoRA(rank=32), name=name)
activate_s = median(lambda name: ts.activate(ours, name), 20)

config = LoraConfig(r=32, target_modules="all-linear")
theirs = get_peft_model(model(), config, adapter_name="a")
theirs.add_adapter("b", config)


def merged(name):
    theirs.base_model.unmerge_adapter()
    theirs.set_adapter(name)
    theirs.base_model.merge_adapter()


theirs.base_model.merge_adapter()
merge_s = median(merged, 8)
sparse = {}
for method in ("shira", "s2ft", "paca"):
    own = model()
    for seed, name in enumerate("ab"):
        ts.adapt(own, {"method": method, "seed": seed}, name=name)

    def scattered(name, own=own):
        ts.unmerge(own)
        ts.activate(own, name)
        ts.merge(own)

    ts.merge(own)
    sparse[method] = median(scattered, 20)
result = {
    "what": "switching between two LoRA r=32 on all linear layers, and between two merged sparse adapters, SmolLM2-135M shape, fp32, median seconds", "command": "python benchmarks/switching.py",
    "machine": {"cores": os.cpu_count(), "torch": torch.__version__}, "tunesmith_activate_s": activate_s, "peft_merge_unmerge_s": merge_s, "times_faster": merge_s / activate_s,
    **{f"{method}_switch_s": seconds for method, seconds in sparse.items()}, **{f"{method}_times_faster": merge_s / seconds for method, seconds in sparse.items()},
}  # fmt: skip
keep(result, args.output)
