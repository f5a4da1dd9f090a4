"""Time and memory of one training step of an adapter, beside Hugging Face peft and the frozen model.

    python benchmarks/lora_step.py                      # every variant, writes benchmarks/results/lora_step.json
    python benchmarks/lora_step.py --variants peft tunesmith --repeats 5
    python benchmarks/lora_step.py --device cuda --steps 20

The model is of the SmolLM2-135M architecture with random weights, in float32, on 4 x 256 tokens; the adapter has
r = 16, alpha = 32 on every linear layer but the head. A step is forward, loss, backward and (but for `frozen`) AdamW.

- peft, peft-dora: Hugging Face peft with the loss of transformers
- tunesmith, tunesmith-dora: the same mathematics, with `tunesmith.causal_lm_loss`
- frozen: transformers' forward and loss, and backward to the inputs alone; no parameter gets a gradient
- full: every weight trained

Each run of a variant is a process of its own, the variants take turns, and the numbers are the medians over the
repeats. On a machine that others use too, compare `cpu_s` with --threads 1: waiting threads spin. Memory is the
highest resident size the kernel saw during the steps, less that of the loaded model (Linux).

On a GPU the base is in bfloat16, a batch is 16 x 512 tokens, memory is what torch allocated, and all runs share a process.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ["peft", "tunesmith", "frozen", "full", "peft-dora", "tunesmith-dora"]
RESULT = Path(__file__).parent / "results" / "lora_step.json"


def build(layers=30):
    """LlamaForCausalLM in the shape of SmolLM2-135M, or of its first `layers`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).train()


def prepare(variant, model):
    """(parameters to train, loss of a batch of token ids)."""
    if variant == "full":
        return list(model.parameters()), lambda ids: model(input_ids=ids, labels=ids).loss
    if variant == "frozen":
        model.requires_grad_(False)
        embed = model.get_input_embeddings()
        return [], lambda ids: model(inputs_embeds=embed(ids).requires_grad_(), labels=ids).loss
    if variant.startswith("peft"):
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=variant == "peft-dora")
        model = peft.get_peft_model(model, config)
        loss = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
    else:
        import tunesmith as ts

        method = ts.DoRA if variant == "tunesmith-dora" else ts.LoRA
        ts.adapt(model, method(rank=16, alpha=32, targets="all-linear"))
        loss = lambda ids: ts.causal_lm_loss(model, ids, ids)  # noqa: E731
    start_alike(model)
    return [p for p in model.parameters() if p.requires_grad], loss


def start_alike(model):
    """Both libraries' A from the same random numbers, so that the losses can be compared."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad and re.search(r"lora_A|\.A$", name):
            torch.nn.init.kaiming_uniform_(p, a=5**0.5, generator=generator)


def resident(field):
    """`VmRSS` or `VmHWM` (the highest since the last reset) of this process, in MB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def run(prepare, args, layers=30, build=build):
    """One run: the seconds and the loss of each step, and the memory in MB.

    `prepare(model)` as above, of one variant, perhaps with the stages of a method that has some; `build(layers)` makes the model.
    """
    import torch

    gpu = args.device == "cuda"
    torch.set_num_threads(args.threads)
    model = build(layers)
    if gpu:
        model = model.to("cuda", torch.bfloat16)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    loaded = torch.cuda.memory_allocated() / 2**20 if gpu else resident("VmRSS")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
    parameters, loss_of, *stages = prepare(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True) if parameters else None

    def step(ids):
        loss = loss_of(ids)
        loss.backward()
        for stage in stages:
            stage.before_step(optimizer)
        if optimizer:
            optimizer.step()
        for stage in stages:
            stage.step()
        if optimizer:
            optimizer.zero_grad()
        return loss.item()  # not the tensor: its graph would live on into the next step

    generator = torch.Generator().manual_seed(1)
    seconds, cpu, losses = [], [], []
    for _ in range(args.steps):
        ids = torch.randint(model.config.vocab_size, (16, 512) if gpu else (4, 256), generator=generator).to(args.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "seconds": seconds[1:],  # the first step warms up
        "cpu_seconds": cpu[1:],
        "losses": losses[:5],
        "peak_mb": (torch.cuda.max_memory_allocated() / 2**20 if gpu else resident("VmHWM")) - loaded,
        "loaded_mb": loaded,
        "trained": sum(p.numel() for p in parameters),
    }


def compare(script, variants, args, prepare_of, layers=30, interpreter=lambda variant: sys.executable):
    """Run the variants in turns, each as `script --run variant` (on a GPU, here); the medians of what each run found."""
    runs = {variant: [] for variant in variants}
    for repeat in range(args.repeats):
        for variant in variants:
            if args.device == "cuda":
                runs[variant].append(run(prepare_of(variant), args, layers))
            else:
                command = [interpreter(variant), script, "--run", variant, "--steps", str(args.steps), "--threads", str(args.threads)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[variant].append(json.loads(output.splitlines()[-1]))
            print(f"{repeat + 1}/{args.repeats} {variant}: {statistics.median(runs[variant][-1]['seconds']):.3g} s", file=sys.stderr)
    return {
        variant: {
            "step_s": statistics.median(s for r in of for s in r["seconds"]),
            "fastest_step_s": min(s for r in of for s in r["seconds"]),
            "cpu_s": statistics.median(s for r in of for s in r["cpu_seconds"]),
            "peak_above_model_mb": statistics.median(r["peak_mb"] for r in of),
            "loaded_model_mb": statistics.median(r["loaded_mb"] for r in of),
            "trained_parameters": of[0]["trained"],
            "losses": of[0]["losses"],
        }
        for variant, of in runs.items()
    }


KEYS = ("step_s", "fastest_step_s", "peak_above_model_mb")


def compare_sizes(script, variants, args, prepare_of, layers_of):
    """`compare` for variants of several sizes of the model, those of one size in turns."""
    results = {}
    for layers in sorted({layers_of(v) for v in variants}):
        results |= compare(script, [v for v in variants if layers_of(v) == layers], args, prepare_of, layers)
    return results


def publish(script, args, results, pairs, keys=KEYS, **more):
    """Write what the variants took, and for each of `pairs` that is there the ratios of `keys`."""
    found = {f"{a} / {b}": {key: results[a][key] / results[b][key] for key in keys} for a, b in pairs if a in results and b in results}
    report = {
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]), "machine": machine(args), "repeats": args.repeats, "ratios": found, **more,
        "variants": {name: {k: v for k, v in each.items() if k != "losses"} for name, each in results.items()},
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def ratios(results):
    """Time, memory and greatest difference in loss of one variant against another."""
    pairs = [("tunesmith", "peft"), ("tunesmith", "frozen"), ("tunesmith", "full"), ("tunesmith-dora", "peft-dora"), ("tunesmith-dora", "tunesmith")]
    found = {}
    for a, b in pairs:
        if a in results and b in results:
            one, other = results[a], results[b]
            found[f"{a} / {b}"] = {k: one[k] / other[k] for k in ("step_s", "fastest_step_s", "cpu_s", "peak_above_model_mb")}
            if a.replace("tunesmith", "peft") == b:
                found[f"{a} / {b}"]["loss_difference"] = max(abs(x - y) for x, y in zip(one["losses"], other["losses"], strict=True))
    return found


def machine(args):
    import torch

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    return {**gpu, "cpu": cpu[1] if cpu else "", "cores": os.cpu_count(), "threads": args.threads, "python": sys.version.split()[0], **versions}


def options(parser, result):
    """The command line, with what every benchmark of a step can be told."""
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of each run; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help=f"default: results/{result.name}, or {result.stem}_cuda.json for a GPU")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = args.output or (result.with_stem(f"{result.stem}_cuda") if args.device == "cuda" else result)
    return args


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = options(parser, RESULT)
    prepare_of = functools.partial(functools.partial, prepare)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args)))
        return
    results = compare(__file__, args.variants, args, prepare_of)
    report = {
        "command": " ".join(["python benchmarks/lora_step.py", *sys.argv[1:]]),
        "machine": machine(args),
        "repeats": args.repeats,
        "ratios": ratios(results),
        "variants": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    main()
