"""Runs on bases in few bits, from the recipe to the merged model."""

import json

import pytest
import torch

import tunesmith as ts
from tunesmith import TunesmithError
from tunesmith.lifecycle.export import merge_to_folder
from tunesmith.lifecycle.quantized import quantize_to_folder
from tunesmith.quantize import packed_weights
from tunesmith.train import base, run
from tunesmith.train.folder import open_run
from tunesmith.train.predict import evaluate_on, predict_texts
from tunesmith.train.recipe import check


def recipe(model, data, output, **more):
    return check({"model": model, "data": data, "output": str(output), "epochs": 1, "batch_size": 8, "limit": 32} | more)


def logits(model):
    ids = torch.arange(10, 42).view(2, 16)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("method", ["lora", "peqa", {"method": "loftq", "rank": 4, "alpha": 4, "iterations": 3}, {"method": "qwha", "rank": 2}, "paca"])
def test_a_run_on_a_quantised_base(models, data, tmp_path, method):
    events = []
    result = run(recipe(models["llama"], data["sums"], tmp_path / "run", method=method, quantize={"format": "int4", "group_size": 16}, task="sft"), events.append)
    assert any("bits per weight" in event.get("text", "") for event in events)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["params"]["trainable"] > 0 and result.metrics
    opened = open_run(tmp_path / "run")
    assert packed_weights(opened.model) and all(w.original is None for w in packed_weights(opened.model).values())
    first, second = logits(opened.model), logits(open_run(tmp_path / "run").model)
    assert torch.equal(first, second)
    with ts.disabled(opened.model):
        assert not torch.equal(logits(opened.model), first)


def test_the_start_of_loftq_is_found_again_from_the_file(models, data, tmp_path):
    method = {"method": "loftq", "rank": 4, "alpha": 4, "iterations": 2}
    run(recipe(models["llama"], data["sums"], tmp_path / "run", method=method, quantize="nf3", task="sft", max_steps=1, lr=1e-12))
    opened = open_run(tmp_path / "run")
    plain, _ = base.load(models["llama"], "sft")
    with ts.disabled(opened.model):
        rounded = (logits(opened.model) - logits(plain)).abs().mean()
    assert (logits(opened.model) - logits(plain)).abs().mean() < 0.9 * rounded


def test_a_quantised_folder_takes_the_models_place(models, data, tmp_path):
    found = quantize_to_folder(models["llama"], tmp_path / "q", {"format": "int3", "group_size": 16}, calibration=data["prose"], text=data["prose"])
    assert found["bytes"] == found["closed_form"] and found["before"] > 1 and found["after"] > 1
    plain = quantize_to_folder(models["llama"], tmp_path / "plain", {"format": "int3", "group_size": 16}, text=data["prose"])
    assert abs(found["after"] - found["before"]) < abs(plain["after"] - plain["before"]) + 0.5
    result = run(recipe(str(tmp_path / "q"), data["sums"], tmp_path / "run", method={"method": "loftq", "rank": 2}, task="sft"))
    assert result.metrics and packed_weights(open_run(tmp_path / "run").model)
    assert evaluate_on(tmp_path / "q", data["prose"], "lm").metrics["perplexity"] == pytest.approx(found["after"], rel=0.2)
    assert predict_texts(tmp_path / "run", ["what is 1 + 1?"])
    with pytest.raises(TunesmithError, match="is quantised already"):
        run(recipe(str(tmp_path / "q"), data["sums"], tmp_path / "other", quantize="nf4", task="sft"))
    with pytest.raises(TunesmithError, match="exists already"):
        quantize_to_folder(models["llama"], tmp_path / "q")


def test_merging_goes_onto_the_matrices_that_were_trained_on(models, data, tmp_path):
    run(recipe(models["llama"], data["sums"], tmp_path / "run", quantize="int4", task="sft", lr=5e-3))
    found = merge_to_folder(tmp_path / "run", tmp_path / "merged")
    assert found["max_error"] < 1e-4 and not (tmp_path / "merged" / "quantized.json").exists()
    with pytest.raises(TunesmithError, match="undoes .* of what the adapter does"):
        merge_to_folder(tmp_path / "run", tmp_path / "two", "int2")
    assert not (tmp_path / "two").exists()
    forced = merge_to_folder(tmp_path / "run", tmp_path / "two", "int2", force=True)
    assert forced["lost"] > 0.3 and (tmp_path / "two" / "quantized.json").exists()
    assert merge_to_folder(tmp_path / "run", tmp_path / "eight", "int8")["lost"] < 0.3


@pytest.mark.parametrize(("method", "format"), [("peqa", "int4"), ("sketchtune", "sketch4")])
def test_what_stays_packed_is_written_packed(models, data, tmp_path, method, format):
    run(recipe(models["llama"], data["sums"], tmp_path / "run", quantize=format, method=method, task="sft", lr=1e-2))
    wanted = logits(open_run(tmp_path / "run").model)
    found = merge_to_folder(tmp_path / "run", tmp_path / "merged")
    assert found["max_error"] < 1e-4
    model, _ = base.load(str(tmp_path / "merged"), "sft")
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    assert {w.format.format for w in packed_weights(model).values()} == {format}


def test_formats_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(TunesmithError, match="unknown number format 'nf5'"):
        check({"model": "m", "data": "d", "quantize": "nf5"})
    with pytest.raises(TunesmithError, match="no field 'group'"):
        check({"model": "m", "data": "d", "quantize": {"format": "nf4", "group": 3}})


def test_weights_that_were_trained_have_no_original(models, data, tmp_path):
    run(recipe(models["llama"], data["sums"], tmp_path / "run", method="peqa", quantize="int4", task="sft", max_steps=2))
    merge_to_folder(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(TunesmithError, match="loftq starts from what rounding took .*holds those that training ended with"):
        run(recipe(str(tmp_path / "merged"), data["sums"], tmp_path / "next", method="loftq", task="sft"))
    assert run(recipe(str(tmp_path / "merged"), data["sums"], tmp_path / "next", method="lora", task="sft", max_steps=1)).metrics


def test_a_method_of_some_layers_starts_from_their_originals(models):
    method = ts.methods.parse({"method": "lora", "targets": {"q_proj": {"method": "qwha"}, "v_proj": {}}})
    model, _ = base.load(models["llama"], "sft", format="int2", method=method)
    ts.adapt(model, method)
    assert all(p.abs().sum() > 0 for path, p in ts.trainable(model).items() if path.endswith(".c"))
