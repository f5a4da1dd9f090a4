"""The report of a run: one HTML file, made from the files of the run folder alone."""

import json
import math
import shlex
import statistics
from collections import Counter
from itertools import accumulate
from pathlib import Path

import yaml

from ..errors import TunesmithError
from ..files import atomic_write
from . import svg
from .folder import read_rows
from .render import model_name, number, render

HEAT_MAP_LABELS = 40
EXAMPLES = 10
LONGEST_TEXT = 1200


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TunesmithError(f"{path} is not JSON ({error}): it was changed by hand or cut short") from error


def _finite(points: list[tuple]) -> list[tuple[float, float]]:
    return [p for p in points if all(isinstance(v, int | float) and math.isfinite(v) for v in p)]


def median_speed(log: list[dict]) -> float | None:
    """Tokens per second, the median over a run's log lines."""
    speeds = [row["tokens_per_s"] for row in log if "tokens_per_s" in row]
    return statistics.median(speeds) if speeds else None


def smooth(points: list[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """The mean of the `span` points around each; at the ends, of those that there are."""
    sums, reach = [0.0, *accumulate(y for _, y in points)], span // 2
    smoothed = []
    for i, (x, _) in enumerate(points):
        start, stop = max(0, i - reach), min(len(points), i + reach + 1)
        smoothed.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return smoothed


def interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927)."""
    z = 1.96
    middle, half = correct / n + z**2 / (2 * n), z * math.sqrt(correct / n * (1 - correct / n) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def _curve(id: str, title: str, points: list[tuple], unit: str, say, raw: bool = False) -> dict | None:
    """A figure of `points` (step, value), or None where there is no curve to draw.

    say: the caption for the points as drawn. raw: the points are noisy; draw them faint below their average.
    """
    points = _finite(points)
    if len(points) < 2:
        return None
    span = max(5, len(points) // 10 | 1)
    if raw and len(points) >= span:
        drawn = smooth(points, span)
        series = [svg.Series("each log", points, "faint"), svg.Series(f"average over {span}", drawn)]
    else:
        drawn, series = points, [svg.Series(unit, points)]
    return {"id": id, "title": title, "caption": say(drawn), "svg": svg.lines(series, "step", unit, f"{id}-caption")}


def _from_to(points: list[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"From {number(float(start))} at step {first:,} to {number(float(end))} at step {last:,}."


def _peak(points: list[tuple[float, float]]) -> str:
    step, rate = max(points, key=lambda p: p[1])
    return f"Highest: {number(float(rate))} at step {step:,}."


def _eval_curve(evals: list[dict], metric: str, higher: bool, base: float | None) -> dict | None:
    points = _finite([(row["step"], row["eval"].get(metric)) for row in evals])
    if len(points) < 2:
        return None
    step, value = (max if higher else min)(points, key=lambda p: p[1])
    series = [svg.Series(metric, points), svg.Series("best", [(step, value)], "ring")]
    low, high = min(v for _, v in points), max(v for _, v in points)
    # A base far below would flatten the curve into a line: the caption and the headline say it instead.
    near = base is not None and min(abs(base - low), abs(base - high)) <= 3 * (high - low)
    caption = f"Best: {number(float(value))} at step {step:,}; last: {number(float(points[-1][1]))}."
    if base is not None:
        caption += f" Untouched model: {number(float(base))}."
    reference = (base, "untouched model") if near else None
    title = f"{metric.replace('_', ' ').capitalize()} on the evaluation data"
    drawn = svg.lines(series, "step", metric, "eval-caption", reference)
    return {"id": "eval", "title": title, "caption": caption, "svg": drawn}


def _figures(logs: list[dict], evals: list[dict], metric: str | None, higher: bool, base: float | None) -> list[dict]:
    def column(key: str) -> list[tuple]:
        return [(row["step"], row.get(key)) for row in logs]

    shown = [_curve("loss", "Training loss", column("loss"), "loss", _from_to, raw=True)]
    if metric:
        shown.append(_eval_curve(evals, metric, higher, base))
    if metric != "loss":
        eval_loss = [(row["step"], row["eval"].get("loss")) for row in evals]
        shown.append(_curve("eval-loss", "Loss on the evaluation data", eval_loss, "loss", _from_to))
    shown.append(_curve("lr", "Learning rate", column("lr"), "learning rate", _peak))
    median = f"Median: {number(median_speed(logs) or 0)} tokens per second."
    shown.append(_curve("speed", "Speed", column("tokens_per_s"), "tokens/s", lambda _: median, raw=True))
    return [figure for figure in shown if figure]


def clip(text: object) -> str:
    """The text as shown: the middle of a very long one is left out, and said to be."""
    text = text if isinstance(text, str) else "no answer" if text is None else json.dumps(text, ensure_ascii=False)
    if len(text) <= LONGEST_TEXT:
        return text
    left_out = len(text) - LONGEST_TEXT
    return f"{text[: LONGEST_TEXT * 3 // 4]} [… {left_out:,} characters left out …] {text[-LONGEST_TEXT // 4 :]}"


def _examples(predictions: list[dict]) -> list[dict]:
    """Groups of examples, wrong ones first; with answers of the untouched model, by what training changed."""
    rows = [
        {key: clip(row.get(key)) for key in ("input", "expected", "predicted")}
        | {"correct": row.get("correct"), "base": clip(row["base_predicted"]) if "base_predicted" in row else None}
        for row in predictions
    ]
    groups = [
        ("Wrong", [row for row in rows if row["correct"] is False]),
        ("Correct", [row for row in rows if row["correct"] is True]),
        ("Not graded", [row for row in rows if row["correct"] is None]),
    ]
    return [{"title": title, "total": len(found), "rows": svg.thin(found, EXAMPLES)} for title, found in groups if found]


def per_class(counts: Counter) -> list[dict]:
    """For every label of `counts[(expected, predicted)]`: n, recall, precision and F1 (None where undefined)."""
    expected, predicted = Counter(), Counter()
    for (true, guess), n in counts.items():
        expected[true] += n
        predicted[guess] += n
    rows = []
    for label in sorted(expected | predicted):
        hits = counts[label, label]
        rows.append(
            {
                "label": label,
                "n": expected[label],
                "recall": hits / expected[label] if expected[label] else None,
                "precision": hits / predicted[label] if predicted[label] else None,
                "f1": 2 * hits / (expected[label] + predicted[label]),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"] is None, row["recall"], -row["n"]))


def _classes(predictions: list[dict]) -> dict:
    counts = Counter((str(row["expected"]), str(row["predicted"])) for row in predictions)
    rows = per_class(counts)
    labels = sorted(row["label"] for row in rows)
    totals = {row["label"]: row["n"] for row in rows}
    confused = [(n, true, guess) for (true, guess), n in counts.items() if true != guess]
    return {
        "rows": rows,
        "macro_f1": sum(row["f1"] for row in rows) / len(rows),
        "heat_map": svg.heat_map(counts, labels, "confusion-caption") if len(labels) <= HEAT_MAP_LABELS else None,
        "labels": len(labels),
        "pairs": [
            {"expected": true, "predicted": guess, "n": n, "share": n / totals[true]}
            for n, true, guess in sorted(confused, key=lambda pair: (-pair[0], pair[1:]))[:15]
        ],
    }


def _value(measured: object, metric: str | None) -> float | None:
    """A metric's value, given as a number or among other metrics."""
    value = measured.get(metric) if isinstance(measured, dict) else measured
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write(run_folder: str | Path) -> Path:
    """Make `report.html` in `run_folder` from its other files and return its path.

    What the folder does not hold is left out. Raises `TunesmithError` for a folder that holds no run, or a broken file.
    """
    folder = Path(run_folder)
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8") if (folder / "recipe.yaml").exists() else ""
    try:
        recipe = yaml.safe_load(recipe_text) or {}
    except yaml.YAMLError as error:
        raise TunesmithError(f"{folder / 'recipe.yaml'} is not YAML ({str(error).splitlines()[0]})") from error
    summary = _json(folder / "summary.json")
    if not recipe and not summary:
        raise TunesmithError(f"{folder} holds no run: it has neither recipe.yaml nor summary.json")
    log = read_rows(folder / "metrics.jsonl")
    logs, evals = [row for row in log if "loss" in row], [row for row in log if "eval" in row]
    # The test data, where there is some, chose nothing: its predictions say more.
    tested = (folder / "test_predictions.jsonl").exists()
    predictions = read_rows(folder / ("test_predictions.jsonl" if tested else "predictions.jsonl"))
    graded = [row["correct"] for row in predictions if isinstance(row.get("correct"), bool)]
    method = summary.get("method") or recipe.get("method") or "?"
    task, metric = summary.get("task") or recipe.get("task"), summary.get("metric")
    higher, base = summary.get("higher_is_better", True), _value(summary.get("base_metrics"), metric)
    values = {
        "method": method["method"] if isinstance(method, dict) else method,
        "model": model_name(summary.get("model") or recipe.get("model") or "?"),
        "task": task,
        "source": recipe.get("data"),
        "metric": metric,
        "higher": higher,
        "best": _value(summary.get("best"), metric),
        "final": _value(summary.get("final"), metric),
        "test": _value(summary.get("test"), metric),
        "base": base,
        "base_test": _value(summary.get("base_test_metrics"), metric),
        "tested": tested,
        "graded": len(graded),
        "right": sum(graded),
        "interval": interval(sum(graded), len(graded)) if graded else None,
        "summary": summary,
        "params": summary.get("params") or {},
        "speed": median_speed(log),
        "figures": _figures(logs, evals, metric, higher, base),
        "evals": evals,
        "eval_keys": list(dict.fromkeys(key for row in evals for key in row["eval"])),
        "classes": _classes(predictions) if task == "classification" and predictions else None,
        "examples": _examples(predictions),
        "before_and_after": any("base_predicted" in row for row in predictions),
        "recipe": recipe_text,
        "versions": _json(folder / "versions.json"),
        "data": _json(folder / "data.json"),
        "command": f"tunesmith train {shlex.quote(f'{folder}/recipe.yaml')} {shlex.quote(f'output={folder}-again')}",
    }
    path = folder / "report.html"
    # A half of a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark.
    atomic_write(path, render(Path(__file__).with_name("report.html.j2"), **values).encode("utf-8", "replace"))
    return path
