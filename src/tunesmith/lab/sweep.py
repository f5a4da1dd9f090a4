"""Combinations of techniques over tasks and seeds, side by side, with a page of what each loses against what it costs."""

import csv
import io
import json
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ..bench.compare import pareto
from ..errors import TunesmithError, nearest
from ..files import atomic_write, only_writer
from . import page
from .cost import cost
from .fp4 import FP4
from .tasks import TASKS, run

RUNS = "runs.jsonl"
FORMATS = {"MXFP4": {}, "NVFP4": {"scale": "e4m3"}, "NVFP4 + tensor scale": {"scale": "e4m3", "tensor_scale": True}, "UE5M3": {"scale": "e5m3", "block": 16}}


def grid(name: str) -> list[FP4]:
    """`small`: each format with each technique alone and the paper's combination. `full`: formats, blocks, modes and techniques crossed."""
    techniques = [
        {}, {"stochastic": ("g",)}, {"hadamard": "backward"}, {"hadamard": "both"}, {"hadamard": "backward", "stochastic": ("g",)}, {"hadamard": "both", "stochastic": ("g",)},
        {"estimator": "dge"}, {"estimator": "scale"},
    ]  # fmt: skip
    forms = list(FORMATS.values())
    if name == "small":
        return [FP4(**form, **technique) for form in forms for technique in techniques]
    if name != "full":
        raise TunesmithError(f"there is no grid {name!r}{nearest(name, ['small', 'full']) or '; there are small and full'}")
    forms += [{"mode": mode} for mode in ("ceil", "rceil", "even")]
    forms += [{"scale": "e5m3"}, {"scale": "e5m3", "block": 16, "tensor_scale": True}, {"block": 16}, {"scale": "e4m3", "block": 32, "tensor_scale": True}, {"scale": "e4m3", "block": 32}]
    techniques += [{"hadamard": "forward"}, {"stochastic": ("x", "W", "g")}, {"hadamard": "both", "stochastic": ("g",), "h": 32}, {"estimator": "diagonal"}]
    return [FP4(**form, **technique) for form in forms for technique in techniques]


def sweep(
    output: str | Path,
    configs: Iterable[FP4],
    tasks: Iterable[str] = tuple(TASKS),
    seeds: Iterable[int] = (0, 1, 2),
    share: float = 1.0,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict:
    """Train on each task with each config and with exact arithmetic, once per seed, and write runs.jsonl, fp4.json, fp4.csv and fp4.html to `output`.

    `share`: of the tasks' usual steps. `jobs`: processes at once. A run that runs.jsonl holds is not done again, so that a killed
    sweep goes on where it was. `progress(done, total, text)`. Returns what fp4.json holds.
    Raises `TunesmithError` for no task or an unknown one, for data that a task needs and does not find, where another sweep writes
    to `output`, and where a process is killed.
    """
    output, tasks, seeds = Path(output), list(tasks), list(seeds)
    if not tasks or not seeds:
        raise TunesmithError("a sweep needs at least one task and one seed")
    for task in tasks:
        if task not in TASKS:
            raise TunesmithError(f"there is no task {task!r}{nearest(task, TASKS) or '; there are ' + ', '.join(TASKS)}")
    if "language" in tasks:
        from .tasks import shakespeare

        shakespeare()
    with only_writer(output):
        return _sweep(output, [None, *dict.fromkeys(configs)], tasks, seeds, share, jobs, progress)


def _sweep(output, configs, tasks, seeds, share, jobs, progress):
    wanted = {_key(task, config, seed, share): (task, config, seed) for config in configs for task in tasks for seed in seeds}
    known = {key: loss for key, loss in _read(output / RUNS).items() if key in wanted}
    todo = [key for key in wanted if key not in known]
    output.mkdir(parents=True, exist_ok=True)
    others = multiprocessing.active_children()
    with (output / RUNS).open("a", encoding="utf-8") as file, ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _alone) as pool:
        futures = {pool.submit(run, *wanted[key], share): key for key in todo}
        try:
            for future in as_completed(futures):
                key = futures[future]
                known[key] = future.result()
                file.write(json.dumps({"key": key, "loss": known[key]}) + "\n")
                file.flush()
                task, config, seed = wanted[key]
                progress(len(known), len(wanted), f"{task}, {config.name if config else 'exact'}, seed {seed}: {known[key]:.4f}")
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise TunesmithError(f"a process of the sweep was killed, most often out of memory; with fewer jobs, the same sweep goes on from {output / RUNS}") from None
            raise
    result = _result(configs, tasks, seeds, share, known)
    atomic_write(output / "fp4.json", json.dumps(result, indent=1) + "\n")
    atomic_write(output / "fp4.csv", _csv(result))
    atomic_write(output / "fp4.html", page.html(result))
    return result


def _alone() -> None:
    """One thread for each process, which ends with the sweep: Ctrl-C is the sweep's to handle, and nothing outlives its kill."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _key(task: str, config: FP4 | None, seed: int, share: float) -> str:
    return json.dumps([task, config.model_dump() if config else None, seed, share], sort_keys=True)


def _read(file: Path) -> dict[str, float]:
    """What was finished; a last line that a kill cut off does not count."""
    found = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                found[row["key"]] = row["loss"]
            except (ValueError, KeyError, TypeError):
                continue
        text = file.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return found


def _result(configs: list, tasks: list[str], seeds: list[int], share: float, known: dict[str, float]) -> dict:
    """A gap is the share lost of what exact arithmetic learns on a task with the same seed: 0 for its loss, 1 for that of knowing nothing."""

    def losses(task, config):
        return [known[_key(task, config, seed, share)] for seed in seeds]

    def lost(task, loss, exact):
        return (loss - exact) / (TASKS[task][2] - exact or 1)

    exact = {task: losses(task, None) for task in tasks}
    rows = []
    for config in configs[1:]:
        found = {task: losses(task, config) for task in tasks}
        gaps = [statistics.mean(lost(task, found[task][i], exact[task][i]) for task in tasks) for i in range(len(seeds))]
        rows.append({
            "name": config.name, "config": config.model_dump(), "gap": statistics.mean(gaps), "gap_std": statistics.stdev(gaps) if len(gaps) > 1 else 0.0, "gaps": gaps,
            "losses": {task: statistics.mean(each) for task, each in found.items()}, **cost(config).to_dict(),
        })  # fmt: skip
    front = pareto([(row["overhead"], -row["gap"]) for row in rows])
    return {"tasks": tasks, "seeds": seeds, "share": share, "exact": {task: statistics.mean(each) for task, each in exact.items()}, "rows": rows, "front": [rows[i]["name"] for i in front]}


def _csv(result: dict) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = ("overhead", "flops_hadamard", "ops_vector", "bytes", "rng_draws", "syncs")
    writer.writerow(["technique", "gap", "standard_deviation", *result["tasks"], *costs])
    writer.writerows([row["name"], row["gap"], row["gap_std"], *row["losses"].values(), *(row[key] for key in costs)] for row in result["rows"])
    return text.getvalue()
