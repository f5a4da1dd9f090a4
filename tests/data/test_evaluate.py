"""Scores against plain computations, and against models that know the answers."""

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.conftest import messages
from tunesmith.data import collate, tasks
from tunesmith.errors import TunesmithError
from tunesmith.models import encode_prompt
from tunesmith.train import evaluate as module
from tunesmith.train.evaluate import evaluate

torch.set_num_threads(1)
CHAT, ENCODER = tiny.tiny_tokenizer(), tiny.tiny_tokenizer(classifier=True)
ARC = "{}\n\nAnswer format: answer1/answer2/answer3"
SUMS = Dataset.from_dict({"question": ["card", "rate", "money", "stolen"], "answer": ["1+1=<<1+1=2>>2\n#### 2", "so\n#### 30", "#### 4", "#### 12"]})
CHOICES = Dataset.from_dict({"instruction": [ARC.format(w) for w in ("card", "what is the rate", "money")], "answer": ["answer2", "answer3", "answer1"]})
JSON = Dataset.from_dict({"prompt": ["card", "rate", "what is the rate"], "response": ['{"a": 1}', '{"a": 2}', '{"a": "x", "b": 3}']})
PROSE = Dataset.from_dict({"text": [text for text, _ in messages(30)]})
TICKETS = Dataset.from_list([{"text": text, "label": label} for text, label in messages(40)])
LABELS = ["card", "rate", "top_up"]
TEXT_TASKS = {"math": SUMS, "choice": CHOICES, "sft": JSON, "lm": PROSE}


def columns_of(task, rows):
    return tasks.get(task).columns(rows)


@pytest.mark.parametrize("task", [*TEXT_TASKS, "classification"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_do_not_depend_on_batches_and_modes_come_back(task, kind, monkeypatch):
    rows = TEXT_TASKS.get(task, TICKETS)
    model, tokenizer = (tiny.tiny_bert(3), ENCODER) if task == "classification" else (tiny.BUILDERS[kind](), CHAT)
    model.train()
    told = []
    options = {"columns": columns_of(task, rows), "labels": LABELS, "max_new_tokens": 6, "max_length": 128}
    whole = evaluate(model, tokenizer, task, rows, batch_size=64, progress=lambda *done: told.append(done), **options)
    assert model.training and told[-1][0] == told[-1][1]
    monkeypatch.setattr(module, "LOGITS", 1)
    single = evaluate(model, tokenizer, task, rows, batch_size=1, **options)
    assert whole.metrics == pytest.approx(single.metrics, rel=1e-5) and whole.predictions == single.predictions
    assert whole == evaluate(model, tokenizer, task, rows, batch_size=64, **options) or task != "math"
    headline = tasks.get(task).metric
    assert headline in whole.metrics and all(isinstance(value, float) for value in whole.metrics.values())
    for row in whole.predictions:
        assert {"input", "expected", "predicted", "correct"} <= row.keys() and isinstance(row["correct"], bool)


def test_classification_is_what_sklearn_says():
    model, rows = tiny.tiny_bert(3), TICKETS
    result = evaluate(model, ENCODER, "classification", rows, columns_of("classification", rows), LABELS, batch_size=7)
    logits = torch.cat([model(**collate([{"input_ids": ENCODER(text)["input_ids"]}], 0)).logits for text in rows["text"]]).detach()
    expected = torch.tensor([LABELS.index(label) for label in rows["label"]])
    assert [LABELS.index(row["predicted"]) for row in result.predictions] == logits.argmax(-1).tolist()
    assert [row["input"] for row in result.predictions] == list(rows["text"]) and [row["expected"] for row in result.predictions] == list(rows["label"])
    assert result.metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, expected).item(), rel=1e-5)
    assert result.metrics["accuracy"] == pytest.approx((logits.argmax(-1) == expected).float().mean().item())
    with pytest.raises(TunesmithError, match="row 1 has the label \"card\""):
        evaluate(model, ENCODER, "classification", rows, columns_of("classification", rows), ["rate", "top_up"])


def test_a_limit_takes_spread_rows():
    result = evaluate(tiny.tiny_bert(3), ENCODER, "classification", TICKETS, columns_of("classification", TICKETS), LABELS, limit=10)
    assert [row["input"] for row in result.predictions] == list(TICKETS["text"])[::4]
    with pytest.raises(TunesmithError, match="no rows to evaluate on"):
        evaluate(tiny.tiny_bert(3), ENCODER, "classification", TICKETS.select([]), {"text": "text", "label": "label"}, LABELS)


@pytest.mark.parametrize("task", ["lm", "sft"])
def test_loss_is_the_mean_over_learned_tokens(task):
    model, rows = tiny.tiny_llama(), TEXT_TASKS[task]
    examples = tasks.get(task).encode(rows, columns_of(task, rows), CHAT, None, 40)
    total = count = hits = 0
    for example in examples:
        logits, labels = model(torch.tensor([example["input_ids"]])).logits[0, :-1], torch.tensor(example["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += (labels != -100).sum().item()
        hits += (logits.argmax(-1) == labels).sum().item()
    result = evaluate(model, CHAT, task, rows, columns_of(task, rows), max_length=40, max_new_tokens=4, answers=0)
    assert result.metrics == pytest.approx({"loss": total / count, "perplexity": math.exp(total / count), "token_accuracy": hits / count}, rel=1e-5)
    assert result.predictions == []


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
def test_choices_are_scored_by_the_log_probability_of_their_tokens(prompt):
    model, task = tiny.tiny_llama(), tasks.get("choice", prompt=prompt)
    rows = Dataset.from_dict({"question": ["what is", "my card"], "choices": [["the rate", "!", "what is the rate"], ["stolen", "blocked"]], "answer": [0, 1]})
    for rows in (rows, CHOICES):  # noqa: B020 - both forms of choices
        columns = task.columns(rows)
        summed, mean = [], []
        for question in task.questions(rows, columns):
            scores = []
            for candidate in question.candidates:
                start = encode_prompt(CHAT, module.prompt(CHAT, [{"role": "user", "content": question.text}], prompt))
                answer = CHAT.encode(candidate)
                logits = model(torch.tensor([[*start, *answer]])).logits[0].log_softmax(-1)
                scores.append((sum(logits[len(start) + i - 1, token].item() for i, token in enumerate(answer)), len(answer)))
            summed.append(question.names[max(range(len(scores)), key=lambda c: scores[c][0])])
            mean.append(max(range(len(scores)), key=lambda c: scores[c][0] / scores[c][1]) == question.answer)
        result = evaluate(model, CHAT, task, rows, columns)
        assert [row["predicted"] for row in result.predictions] == summed and result.metrics["accuracy_norm"] == sum(mean) / len(mean)


def taught(task, rows, steps=500):
    """A tiny model that knows the rows by heart."""
    model = tiny.tiny_llama().train()
    examples = tasks.get(task).encode(rows, columns_of(task, rows), CHAT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = collate(examples, 0)
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 5e-3:
            return model
    raise AssertionError(f"the model has not learned the rows: loss {loss.item():.3f}")


@pytest.mark.parametrize(("task", "rows", "metrics"), [
    ("math", SUMS, {"accuracy": 1.0}), ("choice", CHOICES, {"accuracy": 1.0, "accuracy_norm": 1.0}),
    ("sft", JSON, {"exact_match": 1.0, "token_accuracy": 1.0, "json_valid": 1.0, "json_field_accuracy": 1.0}),
])  # fmt: skip
def test_what_was_learned_is_answered(task, rows, metrics):
    result = evaluate(taught(task, rows), CHAT, task, rows, columns_of(task, rows), max_new_tokens=40)
    assert {name: result.metrics[name] for name in metrics} == metrics and all(row["correct"] for row in result.predictions)


def test_letters_are_reported_by_both_rules(monkeypatch):
    rows = Dataset.from_dict({"question": ["p", "q"], "answer": ["B", "C"]})
    monkeypatch.setattr(module, "generate", lambda model, tokenizer, prompts, *rest, **options: ["A car. The answer is B.", " C "])
    result = evaluate(tiny.tiny_llama(), CHAT, tasks.get("math", rule="strict"), rows, {"question": "question", "answer": "answer"})
    assert result.metrics == {"accuracy": 0.5, "accuracy_official": 0.5, "accuracy_strict": 0.5}
    assert [(row["predicted"], row["correct"], row["output"]) for row in result.predictions] == [("B", True, "A car. The answer is B."), ("", False, "C")]
