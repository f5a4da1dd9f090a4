"""The page of a comparison: one table, and what each method's result costs."""

from pathlib import Path

import yaml

from ..train import svg
from ..train.render import duration, number, percent, render, size

# (title, key, how it is written, which is best)
COLUMNS = (
    ("trained parameters", "trainable", number, min),
    ("of the model", "percent", percent, min),
    ("adapter", "bytes", size, min),
    ("training time", "train_s", duration, min),
    ("peak memory", "peak_mb", lambda mb: f"{mb:,.0f} MB", min),
    ("tokens/s", "tokens_per_s", lambda speed: number(float(speed)), max),
    ("epochs", "epochs", lambda epochs: f"{epochs:.3g}", None),
)
FIGURES = (
    ("trainable", "trained parameters", True, "parameters"),
    ("train_s", "training time in s", False, "training time"),
    ("peak_mb", "peak memory in MB", False, "peak memory"),
)


def _cells(row: dict, best: dict) -> list[dict]:
    return [
        {"value": row[key], "text": "" if row[key] is None else write(row[key]), "best": row[key] is not None and row[key] == best.get(key)}
        for _, key, write, _ in COLUMNS
    ]


def _figure(result: dict, key: str, label: str, log: bool, cost: str) -> dict | None:
    rows = [row for row in result["rows"] if row["value"] is not None and row[key]]
    if not rows:
        return None
    metric, front = result["metric"], result["fronts"][key]
    points = [svg.Point(row[key], row["value"], row["label"], f"{row['runs'][0]['folder']}/report.html", row["spread"] or 0.0) for row in rows]
    members = [[row["label"] for row in rows].index(name) for name in front]
    values = [row["value"] for row in rows]
    base, room = result["untouched"], 1.5 * (max(values) - min(values))
    # Drawn only where it does not flatten everything else.
    reference = (base, "untouched model") if base is not None and min(values) - room <= base <= max(values) + room else None
    return {
        "id": key,
        "title": f"{metric.capitalize()} against {cost}",
        "caption": f"Not beaten in both {metric} and {cost}: {', '.join(front)}.",
        "svg": svg.scatter(points, members, label, metric, f"{key}-caption", log, reference),
    }


def _advice(result: dict) -> str | None:
    """Which method is best, and which is nearly as good for the fewest parameters."""
    rows = [row for row in result["rows"] if row["value"] is not None]
    if len(rows) < 2:
        return None
    best = (max if result["higher_is_better"] else min)(rows, key=lambda row: row["value"])
    near = [row for row in rows if abs(row["value"] - best["value"]) <= 0.01 * abs(best["value"])]
    small = min(near, key=lambda row: row["trainable"])
    text = f"Best {result['metric']}: {best['label']}, {number(float(best['value']))}."
    if small is best:
        return f"{text} No smaller method comes within 1 % of it."
    share = f", {percent(small['percent'])} of the model trained" if small["percent"] is not None else ""
    return f"{text} Within 1 % of it with the fewest parameters: {small['label']}, {number(float(small['value']))}{share}."


def html(result: dict) -> str:
    """The page of what `compare` measured."""
    rows, higher = result["rows"], result["higher_is_better"]
    best = {}
    for key, choose in [("value", max if higher else min), *((key, choose) for _, key, _, choose in COLUMNS if choose)]:
        known = {row[key] for row in rows if row[key] is not None}
        best[key] = choose(known) if len(known) > 1 else None
    front = {name for names in result["fronts"].values() for name in names}
    return render(
        Path(__file__).with_name("compare.html.j2"),
        result=result,
        titles=[title for title, *_ in COLUMNS],
        rows=[
            row | {"cells": _cells(row, best), "best": row["value"] is not None and row["value"] == best["value"], "member": row["label"] in front}
            for row in sorted(rows, key=lambda row: (row["value"] is None, -(row["value"] or 0) if higher else row["value"] or 0))
        ],
        figures=[shown for shown in (_figure(result, *figure) for figure in FIGURES) if shown],
        failures=[(failure["label"], failure["reason"]) for failure in result["failures"]],
        advice=_advice(result),
        base=yaml.safe_dump(result["base"], sort_keys=False, allow_unicode=True),
    )
