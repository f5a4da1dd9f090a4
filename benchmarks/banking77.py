"""One epoch of Banking77 with MiniLM and LoRA r=8: tunesmith beside peft inside transformers.Trainer at its defaults.

Run from the repository root, with the data sets in $TUNESMITH_DATA or ../shared/data:

    python benchmarks/banking77.py --seeds 3 --output benchmarks/results/banking77.json

Each run is a process of its own. Both train the same modules (LoRA on every linear layer of the encoder, the head in
full), with the same batch size, schedule, optimiser and learning rate, and are timed over the training alone.
`defaults` is tunesmith once more with its own rate for the new head, ten times the adapter's (at most 0.01).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from result import keep

EPOCHS, BATCH, LR, RANK, ALPHA = 1, 16, 2e-3, 8, 16


def ours(seed: int, head_lr: float | None = LR) -> dict:
    from tunesmith.train.loop import run
    from tunesmith.train.recipe import check

    with tempfile.TemporaryDirectory() as folder:
        recipe = check({
            "model": "minilm", "data": "banking77", "eval": "banking77", "epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "seed": seed, "schedule": "linear", "warmup": 0.0, "head_lr": head_lr,
            "method": {"method": "lora", "rank": RANK, "alpha": ALPHA}, "output": f"{folder}/run",
        })  # fmt: skip
        result = run(recipe)
    return {"accuracy": result.summary["eval"]["accuracy"], "train_s": result.summary["train_s"], "steps": result.summary["steps"]}


def defaults(seed: int) -> dict:
    return ours(seed, None)


def theirs(seed: int) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from tunesmith import data, models
    from tunesmith.data import tasks

    task = tasks.get("classification")
    train, test = data.load("banking77", "train"), data.load("banking77", "test")
    columns = task.columns(train, None)
    labels = task.labels(train, columns)
    model, tokenizer = models.load("minilm", "classification", labels, seed=seed)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS"))
    number = {label: i for i, label in enumerate(labels)}

    def encoded(rows):
        texts, wanted = list(rows[columns["text"]]), [number[label] for label in rows[columns["label"]]]
        return Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=512)) | {"labels": wanted})

    train, test = encoded(train), encoded(test)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=LR, seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=train, processing_class=tokenizer)
        began = time.perf_counter()
        steps = trainer.train().global_step
        train_s = time.perf_counter() - began
        predicted = torch.tensor(trainer.predict(test).predictions).argmax(-1)
    return {"accuracy": (predicted == torch.tensor(test["labels"])).float().mean().item(), "train_s": train_s, "steps": steps}


SIDES = {"ours": ours, "theirs": theirs, "defaults": defaults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(SIDES[args.child[0]](int(args.child[1]))))
        return
    runs = {side: [] for side in SIDES}
    for seed in range(args.seeds):
        for side in runs:
            out = subprocess.run([sys.executable, __file__, "--child", side, str(seed)], stdout=subprocess.PIPE, check=True, text=True)
            runs[side].append({"seed": seed} | json.loads(out.stdout.splitlines()[-1]))
            print(side, runs[side][-1], flush=True)
    import torch

    sides = {side: {key: statistics.mean(run[key] for run in each) for key in ("accuracy", "train_s")} | {"spread": statistics.stdev(run["accuracy"] for run in each) if len(each) > 1 else None, "runs": each} for side, each in runs.items()}
    result = {
        "what": "Banking77, MiniLM, LoRA r=8, one epoch, batch 16", "command": f"python benchmarks/banking77.py --seeds {args.seeds}",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__}, "tunesmith": sides["ours"], "peft_trainer": sides["theirs"], "tunesmith_defaults": sides["defaults"],
        "time_ratio": sides["ours"]["train_s"] / sides["theirs"]["train_s"],
    }  # fmt: skip
    keep(result, args.output)


if __name__ == "__main__":
    main()
