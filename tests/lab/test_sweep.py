"""A sweep goes on where it was killed, and ends in a page."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tunesmith import TunesmithError
from tunesmith.lab.fp4 import FP4
from tunesmith.lab.sweep import _key, grid, sweep
from tunesmith.lab.tasks import TASKS, run

CONFIGS = [FP4(), FP4(scale="e4m3", tensor_scale=True, stochastic=("g",))]


def test_a_sweep_and_its_page(tmp_path):
    told = []
    found = sweep(tmp_path / "s", CONFIGS, ["regression", "classification"], [0, 1], 0.05, 2, lambda *event: told.append(event))
    assert len(told) == 12 and told[-1][0] == told[-1][1] == 12
    assert {row["name"] for row in found["rows"]} == {config.name for config in CONFIGS} and found["front"]
    for row in found["rows"]:
        assert row["overhead"] > 0 and len(row["gaps"]) == 2 and all(abs(gap) < 1 for gap in row["gaps"])
    assert json.loads((tmp_path / "s" / "fp4.json").read_text()) == json.loads(json.dumps(found))
    html = (tmp_path / "s" / "fp4.html").read_text()
    assert "NVFP4 + tensor scale + SR g" in html and "<svg" in html and "https://" not in html and 'src="' not in html
    assert (tmp_path / "s" / "fp4.csv").read_text().startswith("technique,gap,")


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    first = sweep(tmp_path, CONFIGS[:1], ["regression"], [0], 0.05)
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text + text.splitlines()[0][:20])  # as a kill leaves it
    told = []
    again = sweep(tmp_path, CONFIGS, ["regression"], [0], 0.05, 1, lambda *event: told.append(event))
    assert len(told) == 1 and again["rows"][0] == first["rows"][0]
    assert all(json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())


def test_a_killed_sweep_goes_on(tmp_path):
    command = [sys.executable, "-m", "tunesmith", "lab", "fp4", "--output", str(tmp_path / "s"), "--tasks", "regression", "--seeds", "0", "--share", "0.02", "--jobs", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((tmp_path / "s" / "runs.jsonl").exists() and (tmp_path / "s" / "runs.jsonl").read_text().count("\n") > 2):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children and not psutil.wait_procs(children, timeout=30)[1]
    before = (tmp_path / "s" / "runs.jsonl").read_text()
    assert not (tmp_path / "s" / "fp4.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "runs.jsonl").read_text().startswith(before[: before.rfind("\n")])
    assert len(json.loads(done.stdout)["rows"]) == len(grid("small"))


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    again = lambda *event: sweep(tmp_path / "s", CONFIGS[:1], ["regression"], [0], 0.02)  # noqa: E731
    with pytest.raises(TunesmithError, match="another process is writing .*s; wait"):
        sweep(tmp_path / "s", CONFIGS[:1], ["regression"], [0], 0.02, progress=again)
    assert again()["rows"]


def test_runs_are_the_same_twice_and_each_task_learns():
    for task in ("regression", "classification", "diffusion"):
        config = FP4(stochastic=("g",), hadamard="both")
        assert run(task, config, 0, 0.02) == run(task, config, 0, 0.02) != run(task, config, 1, 0.02)
        assert run(task, None, 0, 0.2) < run(task, None, 0, 0.005)


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(TunesmithError, match="no task 'regresion' .*regression"):
        sweep(tmp_path / "a", CONFIGS, ["regresion"])
    with pytest.raises(TunesmithError, match="at least one task"):
        sweep(tmp_path / "a", CONFIGS, [])
    with pytest.raises(TunesmithError, match="no grid 'tiny'"):
        grid("tiny")
    monkeypatch.setenv("TUNESMITH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(TunesmithError, match="task language needs tiny Shakespeare"):
        sweep(tmp_path / "a", CONFIGS, list(TASKS))
    assert not (tmp_path / "a").exists()


def test_grids_hold_what_the_paper_compares():
    small, full = grid("small"), grid("full")
    assert len(set(small)) == len(small) == 32 and len(set(full)) == len(full) and set(small) <= set(full)
    assert FP4(scale="e4m3", tensor_scale=True, hadamard="both", stochastic=("g",)) in small
    assert len({config.name for config in full}) == len(full)


def test_a_gap_is_the_share_lost_of_what_exact_arithmetic_learns(tmp_path):
    """With the same seed; 1 for what knows nothing. The staircase of the page goes from cheap to dear."""
    configs = [FP4(stochastic=("g",)), FP4(scale="e5m3")]
    losses = {(None, 0): 0.2, (None, 1): 0.6, (configs[0], 0): 0.2, (configs[0], 1): 0.7, (configs[1], 0): 1.0, (configs[1], 1): 0.8}
    lines = [json.dumps({"key": _key("regression", config, seed, 1.0), "loss": loss}) for (config, seed), loss in losses.items()]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    first, second = sweep(tmp_path, configs, ["regression"], [0, 1])["rows"]
    assert first["gaps"] == pytest.approx([0, 0.25]) and second["gaps"] == pytest.approx([1, 0.5])
    stairs = re.search('class="front" points="([^"]*)"', (tmp_path / "fp4.html").read_text()).group(1)
    x, y = zip(*(map(float, point.split(",")) for point in stairs.split()), strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y)


def test_training_that_breaks_down_counts_as_knowing_nothing(monkeypatch):
    monkeypatch.setitem(TASKS, "regression", (lambda config, seed, steps: float("nan"), 1, 1.0))
    assert run("regression", None, 0) == 1.0


def test_an_interrupted_sweep_ends_at_once(tmp_path):
    command = [sys.executable, "-m", "tunesmith", "lab", "fp4", "--output", str(tmp_path / "s"), "--tasks", "diffusion", "--seeds", "0", "--jobs", "1", "--share", "0.2", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((tmp_path / "s" / "runs.jsonl").exists() and (tmp_path / "s" / "runs.jsonl").read_text()):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_ten_steps_are_enough_for_the_schedule():
    assert run("regression", None, 0, 10 / TASKS["regression"][1]) > 0
