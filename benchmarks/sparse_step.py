"""Time and memory of one training step of the selective methods, beside LoRA, peft's LoRA, full and masked fine-tuning.

    python benchmarks/sparse_step.py                    # writes benchmarks/results/sparse_step.json
    python benchmarks/sparse_step.py --variants paca lora --repeats 5

The model is of the SmolLM2-135M architecture with random weights, in float32, on 4 x 256 tokens; every linear layer but
the head is adapted. Measured as in lora_step.py: each run is a process of its own, they take turns, medians. SNELL and
masked fine-tuning are measured on the first 8 and 16 layers too.

- lora, peft: LoRA r = 16, tunesmith's and peft's; paca: rank 31, with as many trained parameters
- s2ft: 5.2% of the heads, 2% of the feed-forward channels (as the paper's LLaMA2-7B)
- neuroada: one input of each neuron; shira: 1% of each matrix; snell, snella: rank 8, 90% sparse; id3: 0.5%
- full: every parameter trained; masked: every matrix, its gradient multiplied by a stored mask of 1% (mask-based sparse tuning)
"""

import argparse
import functools
import json
from pathlib import Path

from lora_step import compare_sizes, options, publish, run
from lora_step import prepare as prepare_lora

RESULT = Path(__file__).parent / "results" / "sparse_step.json"
METHODS = {
    "paca": {"rank": 31, "alpha": 31},
    "s2ft": {"heads": 0.052, "channels": 0.02},
    "neuroada": {"k": 1},
    "shira": {"density": 0.01},
    "snell": {"rank": 8, "sparsity": 0.9},
    "snella": {"rank": 8},
    "id3": {"budget": 500_000},
}
VARIANTS = ["lora", "peft", "full", "masked", *METHODS]
PAIRS = [
    ("paca", "lora"), ("paca", "peft"), ("s2ft", "full"), ("s2ft", "lora"), ("neuroada", "masked"), ("neuroada", "lora"), ("shira", "peft"), ("shira", "masked"),
    ("snell", "masked"), ("snella", "masked"), ("snell:8", "masked:8"), ("snell:16", "masked:16"), ("id3", "masked"),
]  # fmt: skip


def zero(mask, p):
    p.grad.mul_(mask)


def masked(model):
    import torch

    model.requires_grad_(False)
    matrices = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for W in matrices:
        W.requires_grad_(True).register_post_accumulate_grad_hook(functools.partial(zero, torch.rand(W.shape) < 0.01))
    return matrices, lambda ids: model(input_ids=ids, labels=ids).loss


def ours(method):
    import tunesmith as ts

    def prepare(model):
        ts.adapt(model, {"method": method, **METHODS[method]})
        return list(ts.trainable(model).values()), lambda ids: ts.causal_lm_loss(model, ids, ids), ts.stages(model, 1000)

    return prepare


def prepare_of(variant):
    name = variant.partition(":")[0]
    if name == "masked":
        return masked
    if name in METHODS:
        return ours(name)
    return lambda model: prepare_lora({"lora": "tunesmith"}.get(name, name), model)


def layers_of(variant):
    return int(variant.partition(":")[2] or 30)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sized = [f"{name}:{layers}" for layers in (8, 16) for name in ("snell", "masked")]
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *sized], default=[*VARIANTS, *sized])
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args, layers_of(args.run))))
        return
    publish(__file__, args, compare_sizes(__file__, args.variants, args, prepare_of, layers_of), PAIRS)


if __name__ == "__main__":
    main()
