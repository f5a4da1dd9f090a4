"""Time and memory of one training step of each method, beside LoRA of as many parameters and peft's version of the method.

    python benchmarks/method_step.py                       # all of them, writes benchmarks/results/method_step.json
    python benchmarks/method_step.py --methods bone vera --repeats 5
    python benchmarks/method_step.py --device cuda --steps 20 --repeats 1

The model has the first 6 layers of the SmolLM2-135M architecture, random weights, float32, 4 x 256 tokens; every linear
layer but the head is adapted. Measured as in lora_step.py: each run is a process of its own, they take turns, medians.
`lora` has the rank whose parameter count is nearest to the method's (at least 1), and is run for each method again.
"""

import argparse
import json
import sys
from pathlib import Path

from lora_step import compare, machine, options, run

RESULT = Path(__file__).parent / "results" / "method_step.json"
LAYERS = 6
PER_RANK = LAYERS * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))  # LoRA's parameters for each rank

# name: (recipe of the method, (peft's config class, its arguments) where peft has the method)
METHODS = {
    "rslora": ({"rank": 16}, ("LoraConfig", {"r": 16, "lora_alpha": 16, "use_rslora": True})),
    "dora": ({"rank": 16}, ("LoraConfig", {"r": 16, "lora_alpha": 16, "use_dora": True})),
    "bone": ({"rank": 32}, ("MissConfig", {"r": 32})),
    "miss": ({"rank": 32}, ("MissConfig", {"r": 32})),
    "bat": ({"rank": 32}, ("MissConfig", {"r": 32, "init_weights": "bat"})),
    "soka": ({"rank": 16}, ("LoKrConfig", {"r": 512, "alpha": 512})),
    "hut": ({"rank": 16}, ("HiraConfig", {"r": 16})),
    "transformed-lora": ({}, None),
    "wara": ({"rank": 16}, None),
    "adalora": ({"rank": 16, "target_rank": 8}, ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000, "lora_alpha": 16})),
    "vera": ({"rank": 256}, ("VeraConfig", {"r": 256})),
    "fourierft": ({"n_frequency": 1000}, ("FourierFTConfig", {"n_frequency": 1000})),
    "s2-lora": ({"rank": 64}, None),
    "mola": ({"rank": 8, "experts": 4}, None),
    "poly": ({"rank": 4, "n_skills": 4}, ("PolyConfig", {"task_type": "CAUSAL_LM", "r": 4, "n_skills": 4, "n_splits": 1})),
    "mhr": ({"rank": 4, "n_skills": 4, "n_splits": 4}, ("PolyConfig", {"task_type": "CAUSAL_LM", "r": 4, "n_skills": 4, "n_splits": 4})),
}


def ours(recipe):
    import tunesmith as ts

    def prepare(model):
        ts.adapt(model, recipe)

        def loss(ids):
            value, extra = ts.causal_lm_loss(model, ids, ids), ts.auxiliary_loss(model)
            return value if extra is None else value + extra

        return list(ts.trainable(model).values()), loss

    return prepare


def theirs(config, arguments):
    import peft
    import torch

    def prepare(model):
        # all linear layers by name: some of peft's methods do not know the word
        config_ = getattr(peft, config)(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **arguments)
        model = peft.get_peft_model(model, config_)

        def loss(ids):
            more = {"task_ids": torch.zeros(len(ids), dtype=torch.long, device=ids.device)} if config == "PolyConfig" else {}
            return model(input_ids=ids, labels=ids, **more).loss

        return [p for p in model.parameters() if p.requires_grad], loss

    return prepare


def prepare_of(variant):
    """`method`, `method:peft` or `lora:rank`."""
    name, _, side = variant.partition(":")
    if side == "peft":
        return theirs(*METHODS[name][1])
    if name == "lora":
        return ours({"method": "lora", "rank": int(side)})
    return ours({"method": name, **METHODS[name][0]})


def parameters(name):
    from lora_step import build

    import tunesmith as ts

    model = build(LAYERS).to("meta")
    return ts.summary(ts.adapt(model, {"method": name, **METHODS[name][0]})).trainable


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = options(parser, RESULT)
    if args.run:
        print(json.dumps(run(prepare_of(args.run), args, LAYERS)))
        return
    found = json.loads(args.output.read_text())["methods"] if args.output.exists() else {}
    for name in args.methods:
        rank = max(1, round(parameters(name) / PER_RANK))
        sides = [name, f"lora:{rank}", *([f"{name}:peft"] if METHODS[name][1] else [])]
        results = compare(__file__, sides, args, prepare_of, LAYERS)
        ratio = {other: {key: results[name][key] / results[other][key] for key in ("step_s", "fastest_step_s", "peak_above_model_mb")} for other in sides[1:]}
        found[name] = {"config": METHODS[name][0], "ratios": ratio, "runs": {side: {k: v for k, v in each.items() if k != "losses"} for side, each in results.items()}}
        report = {"command": "python benchmarks/method_step.py", "machine": machine(args), "repeats": args.repeats, "methods": dict(sorted(found.items()))}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(found))


def table(found):
    lines = ["| method | trained | time / LoRA | memory / LoRA | time / peft | memory / peft |", "|---|---|---|---|---|---|"]
    for name, each in sorted(found.items()):
        cells = [f"{each['ratios'][o][k]:.2f}" if o else "" for o in (next(o for o in each["ratios"] if o.startswith("lora:")), next((o for o in each["ratios"] if o.endswith(":peft")), None)) for k in ("step_s", "peak_above_model_mb")]
        lines.append(f"| {name} | {each['runs'][name]['trained_parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
