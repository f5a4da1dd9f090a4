"""A run, or an untouched model, on data it was not trained on."""

from pathlib import Path

import torch

from .. import data, models
from ..data import columns as cols
from ..data import tasks
from ..data.tasks.classification import truncated
from ..data.tasks.math import QUESTION
from ..data.tasks.prompts import prompt
from . import base
from .evaluate import Evaluation, evaluate, generate_in_tasks
from .folder import Run, is_run, open_run, pick_device
from .taskdata import columns_of, in_tasks, task_of, with_tasks

ASKED = {
    "classification": ("text", cols.TEXT), "lm": ("text", cols.TEXT), "sft": ("prompt", cols.PROMPT),
    "math": ("question", QUESTION), "choice": ("question", QUESTION),
}  # fmt: skip
MAX_NEW_TOKENS = 256


def evaluate_on(target: str | Path, source: str, task: str | None = None, split: str = "test", limit: int | None = None, batch_size: int = 32) -> Evaluation:
    """Score a run folder, or a model by name, on `source`. `task` is for a model; a run has its own."""
    rows = data.load(source, split, limit)
    if is_run(target):
        run = open_run(target)
        found = columns_of(run.task, rows, run.columns)
        recipe = run.recipe
        return evaluate(
            run.model, run.tokenizer, run.task, rows, found, run.labels, batch_size, recipe.max_new_tokens, max_length=recipe.max_length, task_names=run.task_names
        )
    which = task_of(task or tasks.guess(rows), {})
    found = which.columns(rows)
    model, tokenizer = base.load(str(target), which.name)
    return evaluate(model.to(pick_device("auto")), tokenizer, which, rows, found, batch_size=batch_size)


def predict_rows(folder: str | Path, source: str, batch_size: int = 32) -> list[dict]:
    """Answers for a file with the columns of the run's task; the column of the right answer need not be there."""
    run, rows = open_run(folder), data.load(source, "test")
    names, known = rows.column_names, run.columns
    ids = cols.task_ids(rows, known, run.task_names)
    if "messages" in known and known["messages"] in names:
        turns = [t[:-1] if t[-1]["role"] == "assistant" else t for t in rows[known["messages"]]]
        return _generated(run, turns, batch_size, ids)
    role, usual = ASKED[run.task.name]
    column = known.get(role) if known.get(role) in names else cols.find(names, usual)
    if column is None:
        raise cols.missing(role, names, run.task.name)
    if run.task.name == "choice" and known.get("choices") in names:
        given = {"question": column, "choices": known["choices"], "answer": "first"}
        rows = rows.select_columns([column, known["choices"]]).add_column("first", ["0"] * len(rows))
        result = evaluate(run.model, run.tokenizer, run.task, rows, given, batch_size=batch_size, max_length=run.recipe.max_length)
        return [{"input": row["input"], "predicted": row["predicted"]} for row in result.predictions]
    texts = [cols.as_text(value) for value in rows[column]]
    more = {key: rows[known[key]] for key in ("input", "system") if known.get(key) in names}
    return predict_texts(run, texts, batch_size, **more, task_ids=ids)


def predict_texts(
    run: Run | str | Path, texts: list[str], batch_size: int = 32, input: list | None = None, system: list | None = None, task_ids: list[int] | None = None
) -> list[dict]:
    """[{"input", "predicted"}] for texts; a classification also gives the probability of its label as "score".

    `input` is further context of each prompt, `system` its system message, `task_ids` its task where the run has several.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if run.task.name == "classification":
        return _classified(run, texts, batch_size, task_ids)
    conversations = []
    for i, text in enumerate(texts):
        first = [{"role": "system", "content": system[i]}] if system and system[i] else []
        conversations.append([*first, {"role": "user", "content": text} | ({"input": input[i]} if input and input[i] else {})])
    return _generated(run, conversations, batch_size, task_ids)


def _classified(run: Run, texts: list[str], batch_size: int, task_ids: list[int] | None) -> list[dict]:
    examples = with_tasks([{"input_ids": ids} for ids in truncated(run.tokenizer, texts, run.recipe.max_length)], task_ids)
    order = sorted(range(len(texts)), key=lambda i: -len(examples[i]["input_ids"]))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(texts)
    device = next(run.model.parameters()).device
    with torch.inference_mode():
        for indices in data.by_length([len(e["input_ids"]) for e in examples], order, batch_size):
            batch = data.collate([examples[i] for i in indices], run.tokenizer.pad_token_id or 0)
            with in_tasks(run.model, batch.pop("task_ids", None)):
                best = run.model(**{name: t.to(device) for name, t in batch.items()}).logits.float().softmax(-1).max(-1)  # (b,), (b,)
            for i, score, label in zip(indices, best.values.tolist(), best.indices.tolist(), strict=True):
                found[i] = score, label
    return [{"input": text, "predicted": run.labels[label], "score": round(score, 6)} for text, (score, label) in zip(texts, found, strict=True)]


def _generated(run: Run, conversations: list[list[dict]], batch_size: int, task_ids: list[int] | None) -> list[dict]:
    if run.task.name == "lm":
        asked = [turns[-1]["content"] for turns in conversations]
    else:
        style = run.task.style(run.tokenizer)
        asked = [prompt(run.tokenizer, turns, style) for turns in conversations]
    ids = [models.encode_prompt(run.tokenizer, text)[-run.recipe.max_length :] for text in asked]
    written = generate_in_tasks(run.model, run.tokenizer, ids, task_ids, run.recipe.max_new_tokens or MAX_NEW_TOKENS, batch_size)
    return [{"input": turns[-1]["content"], "predicted": text.strip()} for turns, text in zip(conversations, written, strict=True)]
