"""A run killed with SIGKILL at any moment goes on to the same bits; several processes train as one does."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time

import pytest
from safetensors.torch import load_file

from tunesmith import TunesmithError
from tunesmith.train import recipe as recipes
from tunesmith.train.loop import run

TIMES = ("time_s", "train_s", "tokens_per_s", "peak_mb")
# A server that has imported everything, computed nothing, and forks a fresh process for each run.
context = multiprocessing.get_context("forkserver")
transformers = [f"transformers.models.{name}" for name in ("auto", "auto.tokenization_auto", "bert.modeling_bert", "llama.modeling_llama")]
context.set_forkserver_preload(["tunesmith.train.loop", "torch.utils.tensorboard", "datasets", *transformers])


def train(values, resume=False, env=None, last=None):
    """The body of a child process, which kills itself after the step `last`."""
    os.environ.update(env or {})
    import torch

    torch.set_num_threads(1)

    def watch(event):
        if event["event"] == "step" and event["step"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    run(recipes.check(values), resume=resume, progress=watch)


def in_process(*args, **options):
    child = context.Process(target=train, args=args, kwargs=options)
    child.start()
    return child


def finished(*args):
    child = in_process(*args)
    child.join(120)
    assert child.exitcode == 0


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for row in (*lines, summary):
        for key in TIMES:
            row.pop(key, None)
    return lines, summary, {name: t for name, t in load_file(folder / "adapter" / "adapter.safetensors").items()}


def same(one, other):
    assert one[0] == other[0] and one[1] == other[1]
    assert one[2].keys() == other[2].keys() and all((one[2][n] == other[2][n]).all() for n in one[2])


@pytest.mark.parametrize(
    ("kind", "source", "method", "more"),
    [
        ("bert", "tickets", {"method": "lora", "rank": 4, "dropout": 0.2}, {}), ("llama", "sums", "full", {}), ("bert", "tickets", {"method": "id3", "budget": 60}, {}),
        ("bert", "tickets", {"method": "snella", "rank": 2, "rounds": 5}, {}), ("llama", "sums", {"method": "shira", "mask": "snip"}, {}),
        ("bert", "tickets", "lora", {"selection": {"selection": "ist", "interval": 3}}), ("llama", "sums", "peqa", {"quantize": "int4"}),
    ],  # fmt: skip
)
def test_a_killed_run_ends_in_the_same_bits(here, models, data, kind, source, method, more):
    values = {
        "model": models[kind], "data": data[source], "method": method, "epochs": 3, "batch_size": 4, "accumulate": 2, "lr": 0.01,
        "log_every": 3, "eval_every": 5, "checkpoint_every": 4, "max_new_tokens": 2, **more,
    }  # fmt: skip
    finished(values | {"output": "whole"})
    first = in_process(values | {"output": "cut"}, last=6)  # the checkpoint of step 4 is there
    first.join(120)
    assert first.exitcode == -signal.SIGKILL and (here / "cut" / "checkpoint" / "state.pt").exists()
    draw, loop_s = random.Random(kind), json.loads((here / "whole" / "summary.json").read_text())["time_s"]
    starts = lambda: len(list((here / "cut" / "tensorboard").glob("*")))  # noqa: E731 - of the loop, one file each
    while (before := starts()) < 5:  # at any moment, half-way through a write too
        child = in_process(values | {"output": "cut"}, True)
        while child.is_alive() and starts() == before:
            time.sleep(0.01)
        child.join(draw.uniform(0, loop_s / 2))
        child.kill()
        child.join(120)
        assert child.exitcode in (0, -signal.SIGKILL)
        if (here / "cut" / "summary.json").exists():
            break
    finished(values | {"output": "cut"}, True)
    same(outcome(here / "cut"), outcome(here / "whole"))
    assert not list((here / "cut").glob(".*")) and not (here / "cut" / "checkpoint").exists()


def test_a_folder_has_one_writer(here, models, data):
    values = {"model": models["bert"], "data": data["tickets"], "epochs": 1, "output": "one"}
    refused = []

    def watch(event):
        if event["event"] == "step" and not refused:
            for more in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(TunesmithError, match="another process is writing .*one; wait until it has ended") as error:
                    run(recipes.check(values), **more)
                refused.append(str(error.value))

    run(recipes.check(values), watch)
    assert len(refused) == 2 and (here / "one" / "summary.json").exists()
    assert not [file for file in here.iterdir() if file.name.startswith(".")]
    run(recipes.check(values), overwrite=True)


def in_two_processes(values):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [in_process(values, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


@pytest.mark.parametrize("selection", [None, {"selection": "ist", "interval": 3}])
def test_two_processes_train_as_one(here, models, data, selection):
    values = {"model": models["llama"], "data": data["sums"], "epochs": 2, "batch_size": 4, "lr": 0.01, "max_new_tokens": 2, "seed": 3, "selection": selection}
    finished(values | {"accumulate": 2, "output": "one"})
    in_two_processes(values | {"output": "two"})
    (lines, summary, weights), (lines2, summary2, weights2) = outcome(here / "one"), outcome(here / "two")
    assert [row["step"] for row in lines] == [row["step"] for row in lines2] and summary["steps"] == summary2["steps"]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(lines, lines2, strict=True) if "loss" in a)
    assert all((weights[n] - weights2[n]).abs().max() < 1e-3 for n in weights)
