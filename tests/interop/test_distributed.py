"""Two CPU processes train what one does, and the file they write holds the whole adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny

from .distributed import METHODS, model_and_batch

HERE = Path(__file__).parent


def launch(processes, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", str(HERE / "distributed.py"), *map(str, args)]
    path = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE.parents[1])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def alone(method):
    """The same training in this process, with all rows in one batch."""
    model, ids = model_and_batch(method)
    optimizer = torch.optim.AdamW(ts.trainable(model).values(), lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ids


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def run(request, tmp_path_factory):
    """The folder in which two processes left an adapter of each method."""
    folder = tmp_path_factory.mktemp(request.param)
    launch(2, request.param, folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(run, method, tmp_path):
    model, ids = alone(method)
    ts.save(model, tmp_path / "alone")
    ours, theirs = (load_file(f / "adapter.safetensors") for f in (tmp_path / "alone", run / method))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert theirs[key].shape == ours[key].shape and theirs[key].numel()
        torch.testing.assert_close(theirs[key], ours[key], atol=2e-4, rtol=1e-3)
    again = ts.load(tiny.tiny_llama(), run / method)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, torch.load(run / method / "logits", weights_only=True), atol=1e-5, rtol=1e-5)
