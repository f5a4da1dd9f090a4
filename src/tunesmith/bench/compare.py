"""Several methods on one task under one budget: a process for each, one table, one page."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from ..errors import TunesmithError
from ..files import atomic_write
from ..methods import parse
from ..train import recipe as recipes
from ..train.folder import read_rows
from ..train.recipe import Recipe
from ..train.render import method_label
from ..train.report import median_speed
from . import page

COSTS = ("trainable", "train_s", "peak_mb")
COLUMNS = ("label", "value", "spread", "trainable", "percent", "bytes", "train_s", "time_s", "peak_mb", "tokens_per_s", "epochs", "steps")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, gain) points that no other point beats, in order of cost.

    A point beats another when it costs no more, gains no less, and differs.
    """
    return sorted(
        (i for i, (cost, gain) in enumerate(points) if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)),
        key=lambda i: points[i],
    )


def compare(
    methods: list[str | dict],
    base: Recipe | dict,
    output: str | Path,
    seeds: list[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[dict], None] | None = None,
    rates: list[float | str] | None = None,
    jobs: int = 1,
    trial: dict | None = None,
) -> dict:
    """Train each of `methods` as the recipe `base` says, and write compare.json, compare.csv and compare.html to `output`.

    methods: names or mappings, as in a recipe; a mapping may add `lr`, since methods differ in the rate that suits them.
    base: a recipe, or its fields; every method has its data, its epochs or steps, and its seed. Its method and output do not count.
    seeds: train each method once per seed; the table then has the mean and the standard deviation.
    overwrite: train anew what `output` holds under another recipe.
    progress: told the events of every run (see `train.run`).
    rates: learning rates, such as 2e-3 or, as multiples of the method's own default, "0.3x". Each method that names none gets
    the one that does best on the evaluation data with the first seed; those runs are one comparison of their own, in `output`/rates.
    trial: fields of the recipe that are otherwise in those runs, such as {"epochs": 2} to make them cheap.
    jobs: so many runs at once, each with its share of the cores: sooner done, but the runs' times then depend on each other.

    A run that `output` holds already under the same recipe and data is not trained again, and one that was cut off goes
    on. A run that fails is listed with its reason, and the others go on. Returns what compare.json holds.
    Raises `TunesmithError` before the first run for a recipe or method that is wrong, or for an `output` that holds others.
    """
    output, tell = Path(output), progress or (lambda event: None)
    if isinstance(base, Recipe):
        base = base.model_dump(mode="json", exclude_unset=True)
    base = {key: value for key, value in base.items() if key not in ("method", "output")}
    if rates:
        methods = _at_best_rates(methods, base | (trial or {}), rates, output, (seeds or [None])[:1], overwrite, tell, jobs)
    runs = [_plan(base, method, seed, output) for method in methods for seed in (seeds or [None])]
    if not runs:
        raise TunesmithError("compare needs at least one method")
    if twice := {run["folder"].name for run in runs if [r["folder"] for r in runs].count(run["folder"]) > 1}:
        raise TunesmithError(f"the same method is there twice: {', '.join(sorted(twice))}")
    for run in runs:
        _refuse_other(run, overwrite)
    children: set[subprocess.Popen] = set()

    def carry_out(i: int) -> None:
        run, summary = runs[i], runs[i]["folder"] / "summary.json"
        if not (run["same"] and summary.exists()):
            tell({"event": "note", "text": f"{run['title']} ({i + 1} of {len(runs)})"})
            if not run["same"]:
                shutil.rmtree(run["folder"], ignore_errors=True)
                atomic_write(run["file"], run["text"])
            fields = run["recipe"] | {"output": str(run["folder"])}
            run["failure"] = _train(fields, tell if jobs == 1 else lambda event: _briefly(run["title"], event, tell), jobs, children)
        if summary.exists() and not run["failure"]:
            run["summary"] = json.loads(summary.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in (map if jobs == 1 else pool.map)(carry_out, range(len(runs))):
                result = _result(base, runs)
                atomic_write(output / "compare.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
                atomic_write(output / "compare.csv", _csv(result))
                atomic_write(output / "compare.html", page.html(result))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.kill()
            raise
    return result


def _briefly(title: str, event: dict, tell) -> None:
    """Of runs side by side only what each ends with."""
    if event["event"] == "eval":
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
        tell({"event": "note", "text": f"{title}, step {event['step']}: {metrics}"})
    elif event["event"] == "note" and event["text"].startswith(("warning", "failed")):
        tell({"event": "note", "text": f"{title}: {event['text']}"})


def _at_best_rates(methods: list[str | dict], base: dict, rates: list[float | str], output: Path, seeds: list, overwrite: bool, tell, jobs: int) -> list[dict]:
    """Each method with the one of `rates` that does best on the evaluation data; of several, the one with the lowest loss there."""
    base = {key: value for key, value in base.items() if key != "test"}
    methods = [{"method": method} if isinstance(method, str) else method for method in methods]
    tried = [[method] if "lr" in method else [method | {"lr": rate} for rate in _scaled(rates, parse(method).default_lr)] for method in methods]
    trials = [method for each in tried if len(each) > 1 for method in each]
    rows = compare(trials, base, output / "rates", None if seeds == [None] else seeds, overwrite, tell, jobs=jobs) if trials else {"rows": []}
    scored = [row for row in rows["rows"] if row["value"] is not None]
    sign, chosen = 1 if rows.get("higher_is_better") else -1, []

    def merit(row: dict) -> tuple[float, float]:
        loss = row["runs"][0]["loss"]
        return sign * row["value"], -math.inf if loss is None else -loss

    for each in tried:
        own = [row for row in scored if row["method"] in each]
        chosen.append(max(own, key=merit)["method"] if own else each[0])  # what failed does so again, and says why, where the table is
    return chosen


def _scaled(rates: list[float | str], default: float) -> list[float]:
    return [float(f"{default * float(rate[:-1]):.3g}") if isinstance(rate, str) else rate for rate in rates]


def _file_name(title: str) -> str:
    name = re.sub(r"[^\w.]+", "-", title).strip("-.").lower()
    return name if len(name) <= 80 else f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plan(base: dict, method: str | dict, seed: int | None, output: Path) -> dict:
    """What is to be run, checked, and whether `output` holds it already."""
    label, recipe = method_label(method), base | {"method": method}
    if isinstance(method, dict) and "lr" in method:
        recipe |= {"method": {key: value for key, value in method.items() if key != "lr"}, "lr": method["lr"]}
    title = label if seed is None else f"{label}, seed {seed}"
    if seed is not None:
        recipe["seed"] = seed
    recipes.check(recipe)
    name = _file_name(title)
    file = output / f"{name}.yaml"
    text = f"# data {digest(recipe)}\n" + yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True)
    same = file.exists() and file.read_text(encoding="utf-8") == text
    return {
        "label": label, "title": title, "method": method, "seed": seed, "recipe": recipe,
        "file": file, "text": text, "folder": output / name, "same": same, "failure": None,
    }  # fmt: skip


def digest(recipe: dict) -> str:
    """Of the data files that lie here, so that a changed file is not taken for the one trained on."""
    digest = hashlib.sha256()
    for key in ("data", "eval", "test"):
        if (source := recipe.get(key)) and Path(source).is_file():
            digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _refuse_other(run: dict, overwrite: bool) -> None:
    """Raise where the run's folder holds something else, which only a run of a comparison may be overwritten."""
    if run["same"] or not run["folder"].exists():
        return
    if not run["file"].exists():
        raise TunesmithError(f"{run['folder']} exists and is not of a comparison; choose another output")
    if not overwrite:
        before, now = yaml.safe_load(run["file"].read_text(encoding="utf-8")), run["recipe"]
        changed = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        raise TunesmithError(f"{run['folder']} holds another run ({'; '.join(changed) or 'its data have changed'}); choose another output, or overwrite it")


def _train(recipe: dict, tell: Callable[[dict], None], jobs: int, children: set) -> str | None:
    """Train in a process of its own, one of `jobs` at once, known to `children` while it runs; the reason where it failed."""
    share = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith.bench.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONIOENCODING": "utf-8"} | share,
        start_new_session=True,  # Ctrl-C ends the run here, below, and not in the middle of its own writing about it
    )
    failure = None
    children.add(process)
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            json.dump(recipe, process.stdin)
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "failure":
                failure = event["text"]
            else:
                tell(event)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        children.discard(process)
    if code and not failure:
        failure = f"the process was killed by signal {-code} (9: most often out of memory)" if code < 0 else f"the process ended with code {code}"
    if failure:
        tell({"event": "end"})
        tell({"event": "note", "text": f"failed: {failure}"})
    return failure


def train_in_child(recipe: dict) -> str | None:
    """Train in a process of its own, going on where a run of the same recipe stopped; the reason where it failed."""
    return _train(recipe, lambda event: None, 1, set())


def _measures(run: dict) -> dict:
    summary, metric = run["summary"], run["summary"]["metric"]
    value = summary["test"][metric] if summary.get("test") else summary["best"]
    return {
        "seed": run["seed"], "folder": run["folder"].name, "value": value, "loss": (summary.get("test") or summary.get("eval") or {}).get("loss"),
        **{key: summary["params"].get(key) for key in ("trainable", "total", "percent", "bytes")},
        "train_s": summary.get("train_s", summary["time_s"]),
        **{key: summary.get(key) for key in ("time_s", "peak_mb", "epochs", "steps")},
        "tokens_per_s": median_speed(read_rows(run["folder"] / "metrics.jsonl")),
    }  # fmt: skip


def _row(seeds: list[dict]) -> dict:
    """One line of the table: the means over seeds, the highest peak memory, the spread of the metric."""
    row, runs = {"label": seeds[0]["label"], "method": seeds[0]["method"]}, [_measures(run) for run in seeds]
    for key in ("value", "trainable", "total", "percent", "bytes", "train_s", "time_s", "peak_mb", "epochs", "steps", "tokens_per_s"):
        known = [run[key] for run in runs if run[key] is not None]
        if key == "peak_mb":
            row[key] = max(known, default=None)
        else:
            row[key] = None if not known else known[0] if len(set(known)) == 1 else statistics.mean(known)
    values = [run["value"] for run in runs if run["value"] is not None]
    return row | {"spread": statistics.stdev(values) if len(values) > 1 else None, "runs": runs}


def _result(base: dict, runs: list[dict]) -> dict:
    finished = [run for run in runs if "summary" in run]
    first = finished[0]["summary"] if finished else {}
    tested, metric = bool(first.get("test")), first.get("metric")
    untouched = first.get("base_test_metrics" if tested else "base_metrics") or {}
    rows = [_row([run for run in finished if run["label"] == label]) for label in dict.fromkeys(run["label"] for run in finished)]
    higher = first.get("higher_is_better", True)
    fronts = {}
    for cost in COSTS:
        shown = [row for row in rows if row["value"] is not None and row[cost]]
        front = pareto([(row[cost], row["value"] if higher else -row["value"]) for row in shown])
        fronts[cost] = [shown[i]["label"] for i in front]
    return {
        "base": base,
        "model": first.get("model"), "task": first.get("task"), "metric": metric, "higher_is_better": higher,
        "measured_on": "test" if tested else "evaluation", "untouched": untouched.get(metric),
        "rows": rows, "fronts": fronts,
        "failures": [{"label": run["title"], "reason": run["failure"]} for run in runs if run["failure"]],
    }  # fmt: skip


def _csv(result: dict) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = {"label": "method", "value": result["metric"] or "value", "spread": "standard_deviation"}
    writer.writerow([names.get(column, column) for column in COLUMNS])
    writer.writerows([row[column] for column in COLUMNS] for row in result["rows"])
    return text.getvalue()
