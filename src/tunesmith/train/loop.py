"""The recipe, carried out. Reads top to bottom: data, model, adapter, steps, evaluation, run folder.

Runs on one process, or on several under `torchrun` / `accelerate launch`: each takes its share of every step's batches,
gradients are summed, and process 0 alone evaluates and writes.
"""

import errno
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import tunesmith as ts

from .. import data, optim
from ..data import columns as cols
from ..data import tasks
from ..errors import TunesmithError
from ..files import only_writer
from ..methods import parse
from ..models import evaluating, quick_attention
from ..quantize import forget
from ..schedule import ist, light_peft
from . import base, checkpoint, memory, report
from . import folder as run_folder
from .evaluate import evaluate
from .metrics import Metrics
from .prepare import assert_learning, prepare, room, with_head
from .recipe import Recipe
from .step import loss_of, predicted, processes, reduced, schedule, seed, sum_gradients, to
from .taskdata import check_known, columns_of, in_tasks, task_of, with_tasks

CHECKPOINT_S = 60.0
PROBE = 16  # examples in a batch that layers' importance is measured on

Tell = Callable[[dict], None]
"""Told of every {"event": "note" | "start" | "step" | "log" | "scoring" | "eval" | "end", ...}."""


@dataclass
class RunResult:
    folder: Path
    metrics: dict[str, float]  # of the kept adapter on the evaluation data
    summary: dict


def run(recipe: Recipe, progress: Tell | None = None, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Train as `recipe` says and leave a run folder; with `resume`, go on where a killed run of the same recipe stopped.

    Raises `TunesmithError` for bad input, before anything is written; where another process is writing to the folder; when the loss
    is no longer a number; and when the disk is full, with the last checkpoint intact.
    """
    try:
        with ExitStack() as locks:
            return _run(recipe, progress, resume, overwrite, locks)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TunesmithError(
            f"the disk is full: nothing is lost up to the last checkpoint; make room and go on with `tunesmith train {recipe.output or 'RUN'} --resume`"
        ) from error


def _first_stage(recipe, pruning, progress, overwrite, locks) -> light_peft.Start:
    """A short run, in a folder beside the run's own, that says what of the model and its adapter the run begins with."""
    folder = Path(f"{recipe.output}-estimate")
    short = {"epochs": pruning.steps, "max_steps": pruning.steps, "eval_every": pruning.steps, "test": None, "baseline": False, "output": str(folder)}
    fields = pruning.model_dump(exclude_defaults=True) | {"prune": "light-peft", "stage": "estimate"}
    _run(recipe.model_copy(update=short | {"prune": fields}), progress, folder.exists() and not overwrite, overwrite, locks)
    if dist.is_initialized():
        dist.barrier()  # the first process has written what all read
    return light_peft.read(folder)


def _run(recipe, progress, resume, overwrite, locks):
    device, rank, world = processes(recipe.device)
    tell = progress if progress and rank == 0 else lambda event: None

    # Data: what is learned, what chooses the adapter that is kept, what is scored once at the end.
    rows = data.load(recipe.data, recipe.split, recipe.limit)
    task = task_of(recipe.task or tasks.guess(rows), recipe.task_options)
    columns = task.columns(rows, recipe.columns)
    labels, task_names = task.labels(rows, columns), cols.task_names(rows, columns)
    train, held = rows, None
    if recipe.eval:
        held = data.load(recipe.eval, recipe.eval_split, recipe.eval_limit)
    elif recipe.holdout:
        train, held = data.split(rows, recipe.holdout, recipe.seed, columns.get("label") if labels else None)
        held = data.sample(held, recipe.eval_limit)
    if recipe.per_label:
        if not labels:
            raise TunesmithError(f"per_label is for task classification, not {task.name}; say limit={recipe.per_label} instead")
        train = data.per_label(train, recipe.per_label, columns["label"], recipe.seed)
    test = data.load(recipe.test, recipe.eval_split, recipe.eval_limit) if recipe.test else None
    scored = {name: (source, rows, columns_of(task, rows, columns)) for name, source, rows in (
        ("eval", recipe.eval, held), ("test", recipe.test, test)) if rows is not None}  # fmt: skip
    tell({"event": "note", "text": f"task {task.name}: " + ", ".join(f"{role} from column {column!r}" for role, column in columns.items())})
    tell({"event": "note", "text": f"{len(train):,} rows to train on, {len(held) if held is not None else 0:,} to evaluate on"})

    method = parse(recipe.method).for_tasks(len(task_names or ()))
    recipe = recipe.model_copy(
        update={
            "task": task.name,
            "columns": columns,
            "method": method.dump(),
            "max_length": min(recipe.max_length, method.longest or recipe.max_length),
            "lr": recipe.lr or method.default_lr,
            "head_lr": recipe.head_lr or min(10 * (recipe.lr or method.default_lr), max(recipe.lr or method.default_lr, 0.01)),
            "dtype": recipe.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
            "output": recipe.output or run_folder.default(recipe.model, method.method, task.name),
        }
    )
    folder = Path(recipe.output)
    pruning = light_peft.parse_prune(recipe.prune) if recipe.prune else None
    if pruning and recipe.selection:
        raise TunesmithError("prune scores all layers together, selection trains some at a time; leave one of them out")
    run_folder.check(folder, recipe, resume, overwrite)
    if world > 1:
        dist.barrier()  # everyone has looked before the first one writes
    if resume and (folder / "summary.json").exists():
        run_folder.check_data(folder, recipe.data, data.fingerprint(rows))
        tell({"event": "note", "text": f"the run in {folder} is finished already"})
        run_folder.tidy(folder)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # a kill came before it was removed
        report.write(folder)
        summary = json.loads((folder / "summary.json").read_text())
        return RunResult(folder, summary["eval"], summary)

    begun = _first_stage(recipe, pruning, progress, overwrite, locks) if pruning and pruning.stage == "both" else None
    if begun:
        method = begun.method(method)

    # Model, and the examples tokenised once. A step takes `share` batches, one or more for each process.
    model, tokenizer = base.load(recipe.model, task.name, labels, recipe.dtype, recipe.seed, recipe.quantize, method, begun and begun.units)
    for line in base.described(model):
        tell({"event": "note", "text": line})
    model.to(device)
    for source, other, found in scored.values():
        if source:
            check_known(source, other, found, task, tokenizer, labels, task_names)
    longest = room(model, method, recipe.max_length)
    examples = with_tasks(task.encode(train, columns, tokenizer, labels, longest), cols.task_ids(train, columns, task_names))
    if recipe.packing:
        if task.name != "sft":
            raise TunesmithError(f"packing is for task sft, not {task.name}; set packing=false")
        if task_names:
            raise TunesmithError("packing lays examples of several tasks into one row, which can be of one task only; set packing=false")
        examples = data.pack(examples, longest)
    pad_id = tokenizer.pad_token_id or 0
    share = recipe.accumulate * world
    epoch_batches: dict[int, list] = {}

    def batches(epoch: int) -> list[list[int]]:
        if epoch not in epoch_batches:
            epoch_batches.clear()
            epoch_batches[epoch] = data.batches(examples, recipe.batch_size, recipe.seed, epoch)
        return epoch_batches[epoch]

    per_epoch = math.ceil(len(batches(0)) / share)
    total = min(recipe.epochs * per_epoch, recipe.max_steps or math.inf)
    eval_every = recipe.eval_every or per_epoch

    def watch(done: int, rows: int):
        tell({"event": "scoring", "done": done, "rows": rows})

    def score(name: str):
        _, rows, found = scored[name]
        return evaluate(model, tokenizer, task, rows, found, labels, recipe.eval_batch_size, recipe.max_new_tokens, None, watch, longest, task_names=task_names)

    def inputs_of(batch: list[int]) -> dict[str, torch.Tensor]:
        return to(data.collate([examples[i] for i in batch], pad_id, "right", model.dtype), device)

    def calibrate(model: nn.Module):
        """The gradient of the mean loss over the first batches, the same ones in every process."""
        first = batches(0)[: recipe.calibration_batches]
        count = max(sum(predicted(inputs_of(batch)["labels"]) for batch in first), 1)
        for batch in first:
            with quick_attention():
                loss_of(model, inputs_of(batch), task, count).backward()

    def probe(index: int) -> float:
        """The loss of one batch of training examples, of an order of their own."""
        epoch, i = divmod(index, math.ceil(len(examples) / PROBE))
        inputs = inputs_of(data.batches(examples, PROBE, recipe.seed, -1 - epoch)[i])
        with evaluating(model), in_tasks(model, inputs.get("task_ids")):
            return loss_of(model, inputs, task, max(predicted(inputs["labels"]), 1)).item()

    # The adapter and its optimiser.
    seed(recipe.seed, "adapter")
    ts.adapt(model, with_head(method, model) if task.name == "classification" else method, calibrate=calibrate)
    if begun:
        begun.fill(model)
    elif pruning:
        pruning.prepare(model)
    forget(model)
    prepare(model, recipe.gradient_checkpointing)
    parameters = ts.trainable(model)
    optimizer = optim.build(model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, head_lr=recipe.head_lr, betas=recipe.betas)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    size = ts.summary(model)
    selection = ist.parse(recipe.selection) if recipe.selection else pruning if not begun else None
    stages = ts.stages(model, total, selection, probe, recipe.seed)
    if recipe.packing and any(site.kind == "tokens" for site in size.sites):
        raise TunesmithError(f"{method.method} puts its tokens before a row, not before each example packed into it; set packing=false")

    # The run folder: from here on there is something to resume.
    state_file = folder / "checkpoint" / "state.pt"
    go_on = resume and state_file.exists()
    if rank == 0:
        counts = {"rows": len(rows), "train_rows": len(train), "eval_rows": len(held) if held is not None else 0}
        about = {"source": recipe.data, "task": task.name, **counts, "columns": columns, "labels": labels, "tasks": task_names}
        locks.enter_context(only_writer(folder))
        run_folder.start(folder, recipe, about | {"fingerprint": data.fingerprint(rows)}, overwrite)
    whole = parameters | checkpoint.fixed(model)
    state = checkpoint.read(state_file, whole, optimizer, stages) if go_on else checkpoint.Progress()
    if recipe.baseline and rank == 0 and not go_on:
        with ts.disabled(model):  # the untouched model
            for name in scored:
                result = score(name)
                state.baseline[name] = result.metrics
                run_folder.write_rows(folder / f"{name}_base.jsonl", result.predictions)
    if world > 1:
        for tensor in whole.values():
            dist.broadcast(tensor.data, 0)
    log = Metrics(folder, state) if rank == 0 else None
    tell({"event": "start", "folder": str(folder), "step": state.step, "total": total, "summary": str(size)})

    memory.reset(device)
    began, saved_at, spent = time.monotonic(), time.monotonic(), state.time_s
    model.train()
    while state.step < total and not state.stopped:
        # One step: this process's batches, each loss weighted by its share of the step's predicted tokens.
        step_began = time.monotonic()
        epoch, index = divmod(state.step, per_epoch)
        mine = batches(epoch)[index * share : (index + 1) * share][rank::world]
        inputs = [inputs_of(batch) for batch in mine]
        count = reduced(sum(predicted(batch["labels"]) for batch in inputs), device, world)
        rate = schedule(state.step, total, recipe.warmup, recipe.schedule)
        for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak * rate
        seed(recipe.seed, "step", state.step, rank)
        loss = 0.0
        for batch in inputs:
            with in_tasks(model, batch.get("task_ids")), quick_attention():
                part = loss_of(model, batch, task, max(count, 1))
                loss += part.item()
                if (extra := ts.auxiliary_loss(model)) is not None:
                    part = part + extra / (len(inputs) * world)
                part.backward()
        loss = reduced(loss, device, world)
        if state.step == 0 and rank == 0 and math.isfinite(loss) and (warning := assert_learning(model)):
            tell({"event": "note", "text": warning})
        sum_gradients(parameters.values(), world)
        stages.before_step(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.grad_clip or math.inf)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            what = "loss" if not math.isfinite(loss) else "gradient"
            kept = f"the last good checkpoint is {state_file}" if state_file.exists() else "there is no checkpoint yet"
            raise TunesmithError(
                f"the {what} is no longer a number at step {state.step + 1} (lr {recipe.lr * rate:.3g}); {kept}; try lr={recipe.lr / 10:g}"
            )
        optimizer.step()
        stages.step()
        optimizer.zero_grad(set_to_none=True)

        state.step += 1
        state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
        state.tokens += int(reduced(sum(len(examples[i]["input_ids"]) for batch in mine for i in batch), device, world))
        state.lap_s += time.monotonic() - step_began
        state.train_s += time.monotonic() - step_began
        state.time_s = spent + time.monotonic() - began
        state.peak_mb = max(state.peak_mb, memory.peak_mb(device))
        place = {"step": state.step, "epoch": round(state.step / per_epoch, 4)}
        tell({"event": "step", **place, "loss": loss, "tokens_per_s": state.tokens / state.lap_s, "peak_mb": state.peak_mb})
        end_of_epoch = state.step % per_epoch == 0
        if state.step == 1 or state.step % recipe.log_every == 0 or state.step == total:
            line = place | {"loss": state.loss_sum / state.loss_count, "grad_norm": norm.item(), "lr": recipe.lr * rate, "tokens_per_s": state.tokens / state.lap_s}
            line |= {"time_s": state.time_s, "peak_mb": state.peak_mb}
            state.loss_sum, state.loss_count, state.tokens, state.lap_s = 0.0, 0, 0, 0.0
            if log:
                log.write(line)
            tell({"event": "log", **line})

        # Evaluation keeps the best adapter; without evaluation data the latest is the best.
        if state.step % eval_every == 0 or state.step == total:
            if rank == 0 and held is not None:
                result = score("eval")
                model.train()
                value = result.metrics[task.metric]
                state.last = result.metrics
                log.write(place | {"eval": result.metrics})
                if not state.best or (value > state.best["value"] if task.higher_is_better else value < state.best["value"]):
                    state.best, state.stale = place | {"value": value, "metrics": result.metrics}, 0
                    run_folder.write_predictions(folder, "eval", result.predictions)
                    ts.save(model, folder / "adapter")
                else:
                    state.stale += 1
                state.stopped = state.stale >= (recipe.early_stop or math.inf)
                tell({"event": "eval", **place, "metrics": result.metrics, "best": state.stale == 0})
            elif rank == 0:
                state.best = place | {"value": None, "metrics": {}}
                ts.save(model, folder / "adapter")
            state.stopped = bool(reduced(state.stopped, device, world))

        due = state.step % recipe.checkpoint_every == 0 if recipe.checkpoint_every else time.monotonic() - saved_at > CHECKPOINT_S
        if rank == 0 and (due or end_of_epoch or state.step == total or state.stopped):
            state.time_s = spent + time.monotonic() - began
            state.metrics_bytes = log.sync()
            checkpoint.write(state_file, state, whole, optimizer, stages)
            saved_at = time.monotonic()

    # The kept adapter once over the test data, and the run in one file.
    stages.finish(folder)
    if rank:
        return RunResult(folder, {}, {})
    if test is not None:
        if state.best["step"] != state.step:
            ts.detach(model)
            ts.load(model, folder / "adapter")
        tested = score("test")
        run_folder.write_predictions(folder, "test", tested.predictions)
    summary = {
        "method": method.method, "model": recipe.model, "task": task.name, "metric": task.metric, "higher_is_better": task.higher_is_better,
        "best": state.best["value"], "final": state.last.get(task.metric), "best_step": state.best["step"], "eval": state.best["metrics"],
    }  # fmt: skip
    if test is not None:
        summary["test"] = tested.metrics
    summary |= {f"base_{'metrics' if name == 'eval' else name + '_metrics'}": metrics for name, metrics in state.baseline.items()}
    counts = max(size, ts.summary(model), key=lambda each: each.trainable).to_dict()  # some adapters grow
    summary |= {
        "params": {key: counts[key] for key in ("trainable", "total", "percent", "bytes")},
        "time_s": state.time_s, "train_s": state.train_s, "peak_mb": state.peak_mb,
        "steps": state.step, "epochs": state.step / per_epoch, "stopped_early": state.stopped,
    }  # fmt: skip
    log.close()
    run_folder.write_json(folder / "summary.json", summary)
    shutil.rmtree(folder / "checkpoint")
    report.write(folder)
    tell({"event": "end", "folder": str(folder), "summary": summary})
    return RunResult(folder, summary["eval"], summary)
