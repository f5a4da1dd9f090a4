"""Time to switch from one LoRA r=32 to another on the SmolLM2-135M shape: activation here, merge and unmerge in peft.

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
result = {
    "what": "switching between two LoRA r=32 on all linear layers, SmolLM2-135M shape, fp32, median seconds", "command": "python benchmarks/switching.py",
    "machine": {"cores": os.cpu_count(), "torch": torch.__version__}, "tunesmith_activate_s": activate_s, "peft_merge_unmerge_s": merge_s, "times_faster": merge_s / activate_s,
}  # fmt: skip
keep(result, args.output)
