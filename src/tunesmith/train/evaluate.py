"""Scoring a model on a task: the numbers, and every answer beside the expected one."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import by_length, collate, sample, tasks
from ..data.batching import IGNORE
from ..data.columns import as_text, task_ids
from ..data.extract import same_answer
from ..data.metrics import accuracy, json_scores, macro_f1
from ..data.tasks.prompts import prompt
from ..engine.model import virtual_tokens
from ..errors import TunesmithError
from ..models import encode_prompt, evaluating, generate
from .taskdata import in_tasks, with_tasks

LOGITS = 2**26
"""Largest number of logits held at once (256 MB in float32)."""
MAX_NEW_TOKENS = {"math": 256, "sft": 128}

Progress = Callable[[int, int], None]


@dataclass
class Evaluation:
    """`metrics` by name; `predictions` as {"input", "expected", "predicted", "correct"} in the order of the data."""

    metrics: dict[str, float]
    predictions: list[dict]


def evaluate(model, tokenizer, task, dataset, columns: dict[str, str], labels: list[str] | None = None,
             batch_size: int = 32, max_new_tokens: int | None = None, limit: int | None = None,
             progress: Progress | None = None, max_length: int = 512, answers: int = 64,
             task_names: list[str] | None = None) -> Evaluation:
    """Score `model` on at most `limit` evenly spread rows of `dataset`; `task` is a task or its name.

    classification: accuracy, macro_f1, loss. choice: accuracy by summed log-probability, accuracy_norm by the mean
    per token. math: accuracy; for letters also accuracy_official and accuracy_strict. lm: loss, perplexity. sft: loss
    and perplexity per answer token, token_accuracy, and exact_match (with json_valid and json_field_accuracy where
    the answers are JSON objects) of the answers generated for at most `answers` rows, the only ones in `predictions`.

    Deterministic; runs without gradients and restores training flags. `progress(done, total)` counts rows.
    `task_names` are the training data's tasks, for rows whose column of the role `task` names one of them.
    """
    task = tasks.get(task) if isinstance(task, str) else task
    rows = sample(dataset, limit)
    if not len(rows):
        raise TunesmithError("there are no rows to evaluate on")
    with evaluating(model):
        return SCORERS[task.name](model, tokenizer, task, rows, columns, labels=labels, batch_size=batch_size,
                                  max_new_tokens=max_new_tokens or MAX_NEW_TOKENS.get(task.name, 0),
                                  progress=progress, max_length=max_length, answers=answers, task_names=task_names)


def _forward(model, examples: list[dict], pad_id: int, batch_size: int, max_tokens: int | None,
             progress: Progress | None) -> Iterable[tuple[list[int], dict[str, Tensor], Tensor]]:
    """(indices, batch, float32 logits) for batches of similar length, the longest first."""
    lengths = [len(example["input_ids"]) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    device = next(model.parameters()).device
    done = 0
    for indices in by_length(lengths, order, batch_size, max_tokens):
        batch = {name: t.to(device) for name, t in collate([examples[i] for i in indices], pad_id).items()}
        with in_tasks(model, batch.get("task_ids")):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        yield indices, batch, logits.float()
        done += len(indices)
        if progress:
            progress(done, len(examples))


def _token_logits(model, examples: list[dict], pad_id: int, batch_size: int, progress: Progress | None):
    """As `_forward`, with the logits (b, t, vocabulary) of the tokens alone where a method put others before them."""
    max_tokens = max(1, LOGITS // model.config.vocab_size)
    for indices, batch, logits in _forward(model, examples, pad_id, batch_size, max_tokens, progress):
        yield indices, batch, logits[:, -batch["input_ids"].shape[1]:]


def _pad(tokenizer) -> int:
    return tokenizer.pad_token_id or 0


def _classification(model, tokenizer, task, rows, columns, labels, batch_size, progress, max_length, task_names, **_) -> Evaluation:
    labels = labels or [model.config.id2label[i] for i in range(model.config.num_labels)]
    examples = with_tasks(task.encode(rows, columns, tokenizer, labels, max_length), task_ids(rows, columns, task_names))
    predicted = [0] * len(examples)
    loss = 0.0
    for indices, batch, logits in _forward(model, examples, _pad(tokenizer), batch_size, None, progress):
        loss += torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        for i, best in zip(indices, logits.argmax(-1).tolist(), strict=True):
            predicted[i] = best
    expected = [example["labels"] for example in examples]
    texts = rows[columns["text"]]
    predictions = [{"input": as_text(text), "expected": labels[e], "predicted": labels[p], "correct": e == p}
                   for text, e, p in zip(texts, expected, predicted, strict=True)]
    return Evaluation({"accuracy": accuracy(expected, predicted), "macro_f1": macro_f1(expected, predicted),
                       "loss": loss / len(examples)}, predictions)


def _loss(model, tokenizer, examples, batch_size, progress) -> dict[str, float]:
    total, count, hits = 0.0, 0, 0
    for _, batch, logits in _token_logits(model, examples, _pad(tokenizer), batch_size, progress):
        for row, target in zip(logits[:, :-1], batch["labels"][:, 1:], strict=True):  # a row at a time: one softmax held
            learned = target != IGNORE
            total += torch.nn.functional.cross_entropy(row[learned], target[learned], reduction="sum").item()
            hits += (row[learned].argmax(-1) == target[learned]).sum().item()
            count += learned.sum().item()
    loss = total / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": hits / max(count, 1)}


def _lm(model, tokenizer, task, rows, columns, batch_size, progress, max_length, **_) -> Evaluation:
    examples = task.encode(rows, columns, tokenizer, None, max_length)
    return Evaluation(_loss(model, tokenizer, examples, batch_size, progress), [])


def _sft(model, tokenizer, task, rows, columns, batch_size, max_new_tokens, progress, max_length, answers, task_names, **_) -> Evaluation:
    examples = with_tasks(task.encode(rows, columns, tokenizer, None, max_length), task_ids(rows, columns, task_names))
    metrics = _loss(model, tokenizer, examples, batch_size, progress)
    few = sample(rows, answers) if answers else rows.select([])
    conversations = task.conversations(few, columns)
    asked = [prompt(tokenizer, turns[:-1], task.style(tokenizer)) for turns in conversations]
    written = _written(model, tokenizer, asked, max_new_tokens, batch_size, max_length, ids=task_ids(few, columns, task_names))
    expected = [turns[-1]["content"].strip() for turns in conversations]
    predictions = [{"input": turns[-2]["content"] if len(turns) > 1 else "", "expected": e, "predicted": p, "correct": same_answer(e, p)}
                   for turns, e, p in zip(conversations, expected, written, strict=True)]
    if predictions:
        exact = sum(row["correct"] for row in predictions) / len(predictions)
        metrics |= {"exact_match": exact} | json_scores(expected, written)
    return Evaluation(metrics, predictions)


def _written(model, tokenizer, prompts: list[str], max_new_tokens, batch_size, max_length, progress=None, num_beams=1, ids=None):
    # as in training, a prompt that is too long keeps its end
    encoded = [encode_prompt(tokenizer, text)[-max_length:] for text in prompts]
    return [text.strip() for text in generate_in_tasks(model, tokenizer, encoded, ids, max_new_tokens, batch_size, progress=progress,
                                                       num_beams=num_beams)]


def generate_in_tasks(model, tokenizer, prompts: Sequence[str | list[int]], ids: list[int] | None, *options, **more) -> list[str]:
    """`models.generate`, the prompts of each task together."""
    more["virtual"] = virtual_tokens(model)
    if ids is None:
        return generate(model, tokenizer, prompts, *options, **more)
    written = [""] * len(prompts)
    for task in sorted(set(ids)):
        places = [i for i, other in enumerate(ids) if other == task]
        with in_tasks(model, [task]):
            for i, text in zip(places, generate(model, tokenizer, [prompts[i] for i in places], *options, **more), strict=True):
                written[i] = text
    return written


def _math(model, tokenizer, task, rows, columns, batch_size, max_new_tokens, progress, max_length, **_) -> Evaluation:
    golds, questions = task.golds(rows, columns), task.questions(rows, columns)
    asked = [prompt(tokenizer, [{"role": "user", "content": q}], task.style(tokenizer)) for q in questions]
    written = _written(model, tokenizer, asked, max_new_tokens, batch_size, max_length, progress, task.num_beams)
    scored = [task.score(text, gold) for text, gold in zip(written, golds, strict=True)]
    predictions = [{"input": q, "expected": gold if isinstance(gold, str) else f"{gold:g}", "predicted": found,
                    "correct": right, "output": text}
                   for q, gold, (found, right), text in zip(questions, golds, scored, written, strict=True)]
    metrics = {"accuracy": sum(right for _, right in scored) / len(scored)}
    if isinstance(golds[0], str):
        for rule in ("official", "strict"):
            metrics[f"accuracy_{rule}"] = sum(task.score(text, gold, rule)[1]
                                              for text, gold in zip(written, golds, strict=True)) / len(golds)
    return Evaluation(metrics, predictions)


def _choice(model, tokenizer, task, rows, columns, batch_size, progress, max_length, **_) -> Evaluation:
    questions, style = task.questions(rows, columns), task.style(tokenizer)
    # Candidates that differ in their last token only ("… answer1", "… answer2") share one forward.
    contexts: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}
    for q, question in enumerate(questions):
        text = prompt(tokenizer, [{"role": "user", "content": question.text}], style)
        start = encode_prompt(tokenizer, text)
        for c, candidate in enumerate(question.candidates):
            answer = _continuation(tokenizer, text, start, candidate)
            room = max(1, max_length - len(answer))
            contexts.setdefault(tuple(start[-room:] + answer[:-1]), []).append((q, c, answer))
    scores = [[(-math.inf, -math.inf)] * len(question.candidates) for question in questions]
    keys = list(contexts)
    examples = [{"input_ids": list(key)} for key in keys]
    for indices, _, logits in _token_logits(model, examples, _pad(tokenizer), batch_size, progress):
        for i, row in zip(indices, logits, strict=True):
            for q, c, answer in contexts[keys[i]]:
                length = len(keys[i])
                answered = row[length - len(answer):length].log_softmax(-1)
                logprob = answered.gather(-1, torch.tensor(answer, device=row.device)[:, None]).sum().item()
                scores[q][c] = (logprob, logprob / len(answer))
    # ties go to the first candidate
    best = [[max(range(len(row)), key=lambda c, k=k, row=row: row[c][k]) for row in scores] for k in (0, 1)]
    expected = [question.answer for question in questions]
    predictions = [{"input": q.text, "expected": q.names[q.answer], "predicted": q.names[p], "correct": p == q.answer}
                   for q, p in zip(questions, best[0], strict=True)]
    return Evaluation({"accuracy": accuracy(expected, best[0]), "accuracy_norm": accuracy(expected, best[1])}, predictions)


def _continuation(tokenizer, text: str, start: list[int], candidate: str) -> list[int]:
    """The tokens of `candidate` after `text`, found as in training: from the whole where the prompt is its prefix."""
    whole = encode_prompt(tokenizer, text + candidate)
    if whole[:len(start)] == start and len(whole) > len(start):
        return whole[len(start):]
    return tokenizer.encode(candidate, add_special_tokens=False)


SCORERS = {"classification": _classification, "sft": _sft, "choice": _choice, "math": _math, "lm": _lm}
