"""Runs of a method that starts from the gradient of the first batches."""

import errno

import pytest
import torch
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny
from tunesmith.data import batches, collate, load, tasks
from tunesmith.errors import TunesmithError
from tunesmith.train import recipe as recipes
from tunesmith.train.loop import run
from tunesmith.train.metrics import Metrics

torch.set_num_threads(1)
PATH = "model.layers.1.mlp.down_proj"


def start(models, data, output, resume=False, **values):
    values = {"method": {"method": "lora", "init": "gradient", "rank": 2}, "epochs": 1, "batch_size": 4, "holdout": 0, "max_new_tokens": 2, **values}
    folder = run(recipes.check(values | {"model": models["llama"], "data": data["sums"], "output": output}), resume=resume).folder
    return load_file(folder / "adapter" / "adapter.safetensors")


def test_it_starts_from_the_first_batches_gradient(here, models, data):
    saved = start(models, data, "run", max_steps=1, calibration_batches=3)
    rows, task = load(data["sums"]), tasks.get("sft")
    tokenizer = tiny.tiny_tokenizer()
    examples = task.encode(rows, task.columns(rows, {}), tokenizer, None, 512)
    model = tiny.tiny_llama()
    for batch in batches(examples, 4)[:3]:
        inputs = collate([examples[i] for i in batch], tokenizer.pad_token_id)
        ts.causal_lm_loss(model, **inputs, count=1).backward()
    _, _, Vh = torch.linalg.svd(model.get_submodule(PATH).weight.grad)
    A0 = saved[f"{PATH}.A0"]
    torch.testing.assert_close((A0 @ Vh[:2].T).square().sum(), A0.square().sum(), rtol=1e-3, atol=0)  # the two span the same plane
    assert not torch.equal(A0, saved[f"{PATH}.A"])
    other = start(models, data, "other", max_steps=1, calibration_batches=1)
    assert not torch.allclose(other[f"{PATH}.A0"].abs(), A0.abs(), rtol=1e-2)


def test_a_run_that_was_cut_off_ends_in_the_same_bits(here, models, data, monkeypatch):
    values = {"log_every": 1, "checkpoint_every": 2, "limit": 28, "calibration_batches": 2}
    whole = start(models, data, "whole", **values)
    write, calls = Metrics.write, []

    def full(self, line):
        calls.append(line)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(Metrics, "write", full)
    with pytest.raises(TunesmithError, match="the disk is full"):
        start(models, data, "cut", **values)
    assert (here / "cut" / "checkpoint" / "state.pt").exists()
    cut = start(models, data, "cut", resume=True, **values)
    assert cut.keys() == whole.keys() and all(torch.equal(cut[key], whole[key]) for key in whole)
