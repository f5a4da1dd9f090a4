"""Training on several tasks at once, for methods that route by task."""

import csv
import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from tests.conftest import messages
from tunesmith.data import collate, tasks
from tunesmith.data.columns import task_ids, task_names
from tunesmith.errors import TunesmithError
from tunesmith.train import recipe as recipes
from tunesmith.train.loop import run
from tunesmith.train.predict import evaluate_on, predict_rows, predict_texts

torch.set_num_threads(1)
QUICK = {"epochs": 1, "batch_size": 8, "max_new_tokens": 2, "output": "run"}


def start(values, **options):
    return run(recipes.check(QUICK | values), **options)


def refused(match, values):
    with pytest.raises(TunesmithError, match=match):
        start(values)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def desks(here):
    """desks.csv: messages whose label only the desk decides that they came to."""
    with (here / "desks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "desk"), *((text, *(("card", "north"), ("rate", "south"))[i % 2]) for i, (text, _) in enumerate(messages(48)))])
    return {"data": "desks.csv", "columns": {"task": "desk"}}


def test_rows_carry_their_task():
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["x", "y", "x"], "shop": [10, 9, 10]})
    columns = tasks.get("classification").columns(rows, {"task": "shop"})
    assert columns == {"text": "text", "label": "label", "task": "shop"} and task_names(rows, columns) == ["9", "10"]
    assert task_ids(rows, columns, ["9", "10"]) == [1, 0, 1] and task_ids(rows, columns, None) is None
    assert task_ids(rows.remove_columns("shop"), columns, ["9", "10"]) is None
    assert "task" not in tasks.get("classification").columns(rows)
    with pytest.raises(TunesmithError, match='row 2 is of task "9", which is not among the 2 tasks'):
        task_ids(rows, columns, ["10", "11"])
    with pytest.raises(TunesmithError, match='"shop" .task. is blank in row 1'):
        tasks.get("classification").columns(Dataset.from_dict({"text": ["a"], "label": ["x"], "shop": [""]}), {"task": "shop"})
    talk = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], "shop": ["s"]})
    assert tasks.get("sft").columns(talk, {"task": "shop"}) == {"messages": "messages", "task": "shop"}
    assert tasks.get("sft").columns(Dataset.from_dict({"prompt": ["a"], "response": ["b"], "shop": ["s"]}), {"task": "shop"})["task"] == "shop"
    batch = collate([{"input_ids": [1, 2], "labels": 0, "task_ids": 3}, {"input_ids": [1], "labels": 1, "task_ids": 0}], 0)
    assert batch["task_ids"].tolist() == [3, 0]
    assert "task_ids" not in collate([{"input_ids": [1], "labels": 1}], 0)


def test_a_classifier_that_answers_by_task(here, models, desks):
    method = {"method": "poly", "n_tasks": 2, "targets": ["query", "value"]}
    result = start(desks | {"model": models["bert"], "method": method, "epochs": 12, "lr": 2e-2, "schedule": "constant", "eval": "desks.csv", "eval_every": 12})
    about = json.loads((result.folder / "data.json").read_text())
    assert about["tasks"] == ["north", "south"] and about["columns"]["task"] == "desk"
    assert result.metrics["accuracy"] > 0.9  # the texts alone allow a half
    routing = [t for name, t in load_file(result.folder / "adapter" / "adapter.safetensors").items() if name.endswith(".Z")]
    assert all(t.shape == (2, 8) for t in routing) and max((t[0] - t[1]).abs().max() for t in routing) > 0.1
    kept = lines(result.folder / "predictions.jsonl")
    assert [row["predicted"] for row in predict_rows(result.folder, "desks.csv")] == [row["predicted"] for row in kept]
    assert evaluate_on(result.folder, "desks.csv").metrics["accuracy"] == pytest.approx(result.metrics["accuracy"])
    answers = [predict_texts(result.folder, ["my card was stolen"] * 2, task_ids=ids) for ids in ([0, 1], [1, 0])]
    assert answers[0][0] == answers[1][1] != answers[0][1]
    with pytest.raises(TunesmithError, match="routes by task and knows 2"):
        predict_texts(result.folder, ["my card was stolen"])


def test_a_writer_that_answers_by_task(here, models):
    rows = [{"prompt": f"say {i % 7}", "response": ("yes", "no")[i % 2], "who": ("a", "b")[i % 2]} for i in range(40)]
    (here / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": models["llama"], "data": "talk.jsonl", "columns": {"task": "who"}, "method": "mhr", "lr": 2e-2, "epochs": 3, "log_every": 1, "gradient_checkpointing": True}
    result = start(values)
    assert recipes.load(result.folder / "recipe.yaml").method["n_tasks"] == 2 and recipes.load(result.folder / "recipe.yaml").task == "sft"
    kept = {row["input"]: row["predicted"] for row in lines(result.folder / "predictions.jsonl")}
    held = [row for row in rows if row["prompt"] in kept]
    written = predict_rows(result.folder, "talk.jsonl")
    assert len(written) == 40 and held
    (here / "turns.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "who": row["who"]}) + "\n" for row in rows))
    assert predict_rows(result.folder, "turns.jsonl") == written
    assert evaluate_on(result.folder, "talk.jsonl").metrics["loss"] < lines(result.folder / "metrics.jsonl")[0]["loss"] - 0.1


def test_other_methods_ignore_tasks(here, models, desks):
    result = start(desks | {"model": models["bert"], "method": "lora", "max_steps": 2})
    assert result.summary["steps"] == 2 and json.loads((result.folder / "data.json").read_text())["tasks"] == ["north", "south"]


def test_a_run_that_routes_goes_on_where_it_stopped(here, models, desks, monkeypatch):
    values = desks | {"model": models["bert"], "method": "poly", "checkpoint_every": 3, "max_steps": 6}
    start(values | {"output": "whole"})

    def stop(event):
        if event["event"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(values, progress=stop)
    start(values, resume=True)
    assert (here / "run" / "adapter" / "adapter.safetensors").read_bytes() == (here / "whole" / "adapter" / "adapter.safetensors").read_bytes()


def test_bad_tasks_are_one_sentence_and_write_nothing(here, models, desks):
    good = desks | {"model": models["bert"], "method": "poly"}
    (here / "east.csv").write_text("text,label,desk\nmy card,card,nort\n")
    (here / "none.csv").write_text("text,label\nmy card,card\n")
    refused('east.csv, row 1 is of task "nort".*did you mean \'north\'', good | {"eval": "east.csv"})
    refused("none.csv has no column", good | {"eval": "none.csv"})
    refused("poly: n_tasks=1 is fewer than the 2 tasks", good | {"method": {"method": "poly", "n_tasks": 1}})
    refused("poly: n_tasks=2 and the data name no tasks", good | {"columns": {}, "method": {"method": "poly", "n_tasks": 2}})
    (here / "talk.jsonl").write_text("".join(json.dumps({"prompt": "a", "response": "b", "who": who}) + "\n" for who in "xyxy"))
    refused("packing lays examples of several tasks", {"model": models["llama"], "data": "talk.jsonl", "columns": {"task": "who"}, "packing": True})
    assert not (here / "run").exists()
