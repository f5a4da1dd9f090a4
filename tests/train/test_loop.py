"""A run from data to run folder on tiny models."""

import errno
import json
import math
import resource

import pytest
import torch
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny
from tests.conftest import messages
from tunesmith import data as tdata
from tunesmith.data import tasks
from tunesmith.errors import TunesmithError
from tunesmith.train import checkpoint, step
from tunesmith.train import loop as loops
from tunesmith.train import recipe as recipes
from tunesmith.train.loop import run
from tunesmith.train.metrics import Metrics
from tunesmith.train.predict import evaluate_on, predict_rows, predict_texts
from tunesmith.train.prepare import assert_learning, prepare

torch.set_num_threads(1)
QUICK = {"epochs": 1, "batch_size": 8, "max_new_tokens": 2, "output": "run"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(values, **options):
    return run(recipes.check(QUICK | values), **options)


def refused(match, values, **options):
    with pytest.raises(TunesmithError, match=match) as caught:
        start(values, **options)
    assert "\n" not in str(caught.value)


def test_a_classifier_from_one_file(here, models, data):
    events = []
    result = start({"model": models["bert"], "data": data["tickets"], "method": "full", "epochs": 8, "lr": 5e-3, "log_every": 4}, progress=events.append)
    folder, summary = result.folder, result.summary
    assert result.metrics["accuracy"] == summary["best"] >= 0.8 and summary["best_step"] <= summary["steps"] == 88  # chance is 1/3
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "versions.json", "data.json", "metrics.jsonl", "summary.json", "adapter", "tensorboard", "predictions.jsonl", "report.html",
    }  # fmt: skip
    logged = lines(folder / "metrics.jsonl")
    assert logged[0].keys() == {"step", "epoch", "loss", "grad_norm", "lr", "tokens_per_s", "time_s", "peak_mb"} and logged[0]["step"] == 1
    assert [row["epoch"] for row in logged if "eval" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged[0]["loss"] > 1.3 * next(row for row in reversed(logged) if "loss" in row)["loss"]
    assert summary["params"]["trainable"] == sum(p.numel() for p in tiny.tiny_bert().parameters()) and summary["params"]["percent"] == 100
    about = json.loads((folder / "data.json").read_text())
    assert about["labels"] == ["card", "rate", "top_up"] and about["columns"] == {"text": "text", "label": "label"}
    assert about["train_rows"] + about["eval_rows"] == about["rows"] == 96
    assert [e["event"] for e in events if e["event"] not in ("step", "log", "scoring", "eval")][-2:] == ["start", "end"]
    resolved = recipes.load(folder / "recipe.yaml")
    assert resolved.task == "classification" and resolved.lr == 5e-3 and resolved.dtype == "float32" and resolved.method["method"] == "full"
    # The adapter in the folder gives the predictions in the folder, and those of other ways to ask.
    kept = lines(folder / "predictions.jsonl")
    texts = [row["input"] for row in kept]
    again = predict_texts(folder, texts)
    assert [row["predicted"] for row in again] == [row["predicted"] for row in kept] and all(0.3 < row["score"] <= 1 for row in again)
    assert evaluate_on(folder, data["more"]).metrics["accuracy"] >= 0.7
    (here / "unlabelled.csv").write_text("text\nmy card was stolen\nwhat is the exchange rate\n")
    assert [row["input"] for row in predict_rows(folder, "unlabelled.csv")] == ["my card was stolen", "what is the exchange rate"]


def test_the_new_head_is_trained_and_saved_with_every_method(here, models, data):
    for method in ("lora", "bitfit", "ln-tuning", "linear-probe"):
        folder = start({"model": models["bert"], "data": data["tickets"], "method": method, "output": method}).folder
        assert any("classifier" in name for name in load_file(folder / "adapter" / "adapter.safetensors"))
        kept = lines(folder / "predictions.jsonl")
        assert [row["predicted"] for row in predict_texts(folder, [row["input"] for row in kept])] == [row["predicted"] for row in kept]


def test_the_best_adapter_is_kept_and_scored_on_the_test_data(here, models, data):
    values = {
        "model": models["llama"], "data": data["sums"], "method": "full", "lr": 0.3, "epochs": 3, "eval": data["sums"], "eval_limit": 8,
        "test": data["sums"], "baseline": True, "schedule": "constant", "warmup": 0, "grad_clip": None,
    }  # fmt: skip
    result = start(values)
    evals = [row["eval"]["loss"] for row in lines(result.folder / "metrics.jsonl") if "eval" in row]
    summary = result.summary
    assert summary["best"] == pytest.approx(min(evals), rel=1e-5) and summary["final"] == pytest.approx(evals[-1], rel=1e-5)
    assert summary["test"]["loss"] == pytest.approx(summary["best"], rel=1e-4)  # the same rows, with the kept adapter
    assert summary["base_metrics"]["loss"] == summary["base_test_metrics"]["loss"] > 5
    assert all({"input", "expected", "predicted", "base_predicted"} <= row.keys() for row in lines(result.folder / "predictions.jsonl"))
    assert evaluate_on(result.folder, data["sums"], limit=8).metrics["loss"] == pytest.approx(summary["best"], rel=1e-4)
    assert len(predict_rows(result.folder, data["sums"], 8)) == 40


def test_it_stops_when_nothing_improves(here, models, data):
    summary = start({"model": models["bert"], "data": data["tickets"], "lr": 1e-9, "epochs": 9, "early_stop": 2}).summary
    assert summary["stopped_early"] and summary["epochs"] == 3 and summary["best_step"] == summary["steps"] / 3


def test_without_evaluation_data_the_last_adapter_is_kept(here, models, data):
    result = start({"model": models["llama"], "data": data["prose"], "holdout": 0, "task": "lm", "max_length": 32, "max_steps": 3})
    assert result.metrics == {} and result.summary["best"] is None and result.summary["steps"] == 3
    assert (result.folder / "adapter").is_dir() and not (result.folder / "predictions.jsonl").exists()
    assert predict_texts(result.folder, ["the card"])[0]["input"] == "the card"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_parts_of_a_batch_and_packed_rows_have_the_whole_batchs_gradient(kind):
    model, task = tiny.BUILDERS[kind](), tasks.get("sft")
    examples = [{"input_ids": list(range(5, 5 + n)), "labels": [-100] * 2 + list(range(7, 5 + n))} for n in (4, 9, 6, 17, 3)]
    for one in examples:
        one["labels"][0] = -100

    def gradient(parts):
        batches = [tdata.collate(part, 0, "right", model.dtype) for part in parts]
        count = sum(step.predicted(b["labels"]) for b in batches)
        model.zero_grad()
        total = sum(step.loss_of(model, b, task, count) for b in batches)
        total.backward()
        return count, total.item(), model.get_input_embeddings().weight.grad.clone()

    whole = gradient([examples])
    for parts in ([examples[:2], examples[2:]], [tdata.pack(examples, 24)], [[row] for row in tdata.pack(examples, 40)]):
        count, loss, grad = gradient(parts)
        assert count == whole[0] == 29 and loss == pytest.approx(whole[1], rel=1e-5)
        torch.testing.assert_close(grad, whole[2], rtol=1e-4, atol=1e-6)


def test_packing_trains_and_is_refused_where_it_means_nothing(here, models, data):
    result = start({"model": models["llama"], "data": data["sums"], "packing": True, "max_length": 64, "batch_size": 2, "lr": 0.01})
    assert result.summary["steps"] < 36 / 2
    refused("packing is for task sft", {"model": models["bert"], "data": data["tickets"], "packing": True, "output": "x"})
    refused("prompt-tuning .*packing=false", {"model": models["llama"], "data": data["sums"], "packing": True, "method": "prompt-tuning", "output": "x"})
    assert not (here / "x").exists()


def test_gradient_checkpointing_keeps_every_gradient():
    inputs = tiny.batch("llama")
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ts.adapt(tiny.tiny_llama(), "lora")
        prepare(model, gradient_checkpointing=recompute)
        ts.causal_lm_loss(model, inputs["input_ids"], inputs["input_ids"], inputs["attention_mask"]).backward()
        assert assert_learning(model) is None
        grads.append({n: p.grad for n, p in ts.trainable(model).items()})
    assert all((grads[0][n] == grads[1][n]).all() for n in grads[0])
    with pytest.raises(TunesmithError, match="no gradient checkpointing"):
        prepare(ts.adapt(tiny.tiny_convnet(), "lora"), gradient_checkpointing=True)


def test_modules_that_learn_nothing_are_named():
    model = prepare(ts.adapt(tiny.tiny_llama(), "lora"))
    with pytest.raises(TunesmithError, match="no adapter got a gradient"):
        assert_learning(model)
    hidden = model.model(**tiny.batch("llama")).last_hidden_state
    hidden.register_hook(lambda g: g)
    model.model.layers[0](torch.randn(1, 3, 32), position_embeddings=model.model.rotary_emb(hidden[:1, :3], torch.arange(3)[None]))[0].sum().backward()
    assert "7 of 14 adapted modules" in assert_learning(model) and "model.layers.1" in assert_learning(model)


def test_a_loss_that_is_no_number_ends_the_run(here, models, data):
    values = {"model": models["bert"], "data": data["tickets"], "method": "full", "lr": 1e30, "warmup": 0, "checkpoint_every": 1}
    refused(r"no longer a number at step 2 \(lr .*\); the last good checkpoint is run/checkpoint/state.pt; try lr=1e\+29", values)
    assert (here / "run" / "checkpoint" / "state.pt").exists()


def test_a_full_disk_loses_nothing(here, models, data, monkeypatch):
    values = {"model": models["bert"], "data": data["tickets"], "log_every": 1, "checkpoint_every": 2}
    start(values | {"output": "whole"})
    write, calls = Metrics.write, []

    def full(self, line):
        calls.append(line)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(Metrics, "write", full)
    refused("the disk is full: .* go on with `tunesmith train run --resume`", values)
    start(values, resume=True)
    for name in ("adapter/adapter.safetensors", "predictions.jsonl"):
        assert (here / "run" / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert [row.get("loss") for row in lines(here / "run" / "metrics.jsonl")] == [row.get("loss") for row in lines(here / "whole" / "metrics.jsonl")]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(here):
    model = ts.adapt(tiny.tiny_llama(), "lora")
    parameters, optimizer, stages = ts.trainable(model), torch.optim.AdamW(ts.trainable(model).values()), ts.stages(model, 9)
    file = here / "checkpoint" / "state.pt"
    checkpoint.write(file, checkpoint.Progress(step=3), parameters, optimizer, stages)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TunesmithError, match="cannot write the checkpoint .*the one before it is still there"):
            checkpoint.write(file, checkpoint.Progress(step=4), parameters, optimizer, stages)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
    assert checkpoint.read(file, parameters, optimizer, stages).step == 3
    file.write_bytes(before[:1000])
    with pytest.raises(TunesmithError, match="cannot be read"):
        checkpoint.read(file, parameters, optimizer, stages)
    other = ts.trainable(ts.adapt(tiny.tiny_llama(), {"method": "lora", "rank": 2}))
    file.write_bytes(before)
    with pytest.raises(TunesmithError, match="another model or method"):
        checkpoint.read(file, other, optimizer, stages)


def test_a_folder_in_use_is_left_alone(here, models, data):
    values = {"model": models["bert"], "data": data["tickets"], "max_steps": 2, "lr": 0.001}
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("precious")
    refused("mine exists and is not empty; output=NAME", values | {"output": "mine"})
    refused("not a run folder, so --overwrite leaves it alone", values | {"output": "mine"}, overwrite=True)
    refused("is a file", values | {"output": "mine/thesis.tex"})
    refused("choose one", values, resume=True, overwrite=True)
    first = start(values).summary
    refused("run exists .*--resume goes on.*--overwrite", values)
    refused(r"cannot go on with another recipe: lr was 0\.001 and is 0\.002", values | {"lr": 0.002}, resume=True)
    assert start(values, resume=True).summary == first
    assert start(values | {"lr": 0.002}, overwrite=True).summary["steps"] == 2
    assert (here / "mine" / "thesis.tex").read_text() == "precious"


def test_a_run_does_not_go_on_with_other_data(here, models):
    (here / "d.csv").write_text("text,label\n" + "".join(f"{t},{l}\n" for t, l in messages(30)))
    values = {"model": models["bert"], "data": "d.csv", "method": "full", "lr": 1e30, "warmup": 0}
    refused("no longer a number", values)
    (here / "d.csv").write_text("text,label\n" + "".join(f"{t},{l}\n" for t, l in messages(30, seed=5)))
    refused("the data in d.csv have changed", values, resume=True)


BAD = {
    "empty": ("", "is empty"),
    "header": ("text,label\n", "no data rows"),
    "columns": ("a,b\n1,2\n3,4\n", "task"),
    "one_label": ("text,label\na,x\nb,x\n", 'only the label "x"'),
    "blank": ("text,label\na,x\n,y\n", "blank in row"),
    "ragged": ("text,label\na,x\nb,y,z\n", "line 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_sentence_and_writes_nothing(here, models, name):
    text, match = BAD[name]
    (here / f"{name}.csv").write_text(text)
    refused(match, {"model": models["bert"], "data": f"{name}.csv"})
    assert not (here / "run").exists()


def test_other_bad_input_writes_nothing(here, models, data):
    good = {"model": models["bert"], "data": data["tickets"]}
    (here / "other.csv").write_text("text,label\na,card\nb,rates\n")
    refused(r"other\.csv, row 2 has the label \"rates\".*did you mean 'rate'", good | {"eval": "other.csv"})
    refused("other.csv", good | {"test": "other.csv"})
    refused("there is no file", good | {"data": "tickets.csv"})
    refused('no column "txt".*did you mean .text', good | {"columns": {"text": "txt"}})
    refused("cannot load model|config.json is missing", good | {"model": str(here)})
    refused("encoder", good | {"data": data["sums"]})
    refused("target 'q_prj'", {"model": models["llama"], "data": data["sums"], "method": {"method": "lora", "targets": ["q_prj"]}})
    refused("unknown optimizer 'adamm'", good | {"optimizer": "adamm"})
    refused("device 'cuda:99' is not", good | {"device": "cuda:99"})
    refused("device 'gpu' is not", good | {"device": "gpu"})
    refused("task classification has no option 'prompt'", good | {"task_options": {"prompt": "alpaca"}})
    refused("task math has no option 'rules' .*'rule'", {"model": models["llama"], "data": data["sums"], "task": "math", "task_options": {"rules": 1}})
    assert not (here / "run").exists()


def test_awkward_but_usable_files(here, models):
    rows = [("\N{POUND SIGN}5 fee, twice", "fee"), ("x" * 100_000, "fee"), ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "other")] * 4 + [("once", "rare")]
    text = "text,label\n" + "".join(f'"{t}",{l}\n' for t, l in rows)
    (here / "bom.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (here / "windows.csv").write_bytes(text.encode("cp1252"))
    for name, match in (("bom", "occur in one row only"), ("windows", "cp1252")):
        with pytest.warns(UserWarning, match=match):
            result = start({"model": models["bert"], "data": f"{name}.csv", "max_steps": 1, "holdout": 0.3, "output": name})
        assert json.loads((result.folder / "data.json").read_text())["labels"] == ["fee", "other", "rare"]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls(shape):
    rates = [step.schedule(i, 100, 0.06, shape) for i in range(100)]
    assert rates[:7] == pytest.approx([i / 7 for i in range(1, 8)], abs=0.02) and max(rates) == 1
    assert all(a >= b for a, b in zip(rates[6:], rates[7:], strict=False)) and (rates[-1] == 1) == (shape == "constant")
    assert all(0 < rate <= 1 for rate in rates) and math.isclose(step.schedule(0, 1, 0.06, shape), 1)


def test_default_folders_are_named_after_the_run():
    from tunesmith.train.folder import default

    assert default("org/Some Model", "lora", "sft") == "runs/Some-Model-lora-sft" and default("models/bert/", "full", "lm") == "runs/bert-full-lm"
    assert loops.CHECKPOINT_S == 60


def test_a_base_in_bfloat16_with_recomputation(here, models, data):
    values = {"model": models["llama"], "data": data["sums"], "dtype": "bfloat16", "gradient_checkpointing": True, "packing": True, "max_length": 48}
    result = start(values)
    saved = load_file(result.folder / "adapter" / "adapter.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32} and any(t.abs().sum() for name, t in saved.items() if name.endswith("B"))
    assert evaluate_on(result.folder, data["sums"], limit=4).metrics["loss"] > 0


def test_texts_are_cut_to_what_a_method_takes(here, models):
    (here / "long.csv").write_text("text,label\n" + "".join(f'"{"how do I top up " * (5 + i)}",{"ab"[i % 2]}\n' for i in range(20)))
    run(recipes.check(QUICK | {"model": models["bert"], "data": "long.csv", "method": {"method": "combined", "parts": [{"method": "dept", "max_length": 16}, "bitfit"]}}))
    assert recipes.load(here / "run" / "recipe.yaml").max_length == 16


@pytest.mark.parametrize(("kind", "method"), [("bert", "prompt-tuning"), ("bert", {"method": "combined", "parts": ["prefix-tuning", "lora"]}), ("gpt2", "prefix-tuning")])
def test_virtual_tokens_leave_positions_to_the_text(here, models, data, kind, method):
    room = tiny.BUILDERS[kind]().config.max_position_embeddings
    (here / "long.csv").write_text("text,label\n" + "".join(f"{'money ' * 3 * room},{'ab'[i % 2]}\n" for i in range(8)))
    start({"model": models[kind] if kind in models else str(tiny.save_tiny(here / kind, kind)), "data": "long.csv", "method": method, "max_length": 4 * room, "task": "classification"})
    assert predict_texts("run", ["money " * 4 * room])
    refused("virtual tokens do not fit before a text", {"model": models["bert"], "data": data["tickets"], "method": {"method": "prompt-tuning", "tokens": 5000}, "output": "no"})
