"""The page of a sweep: what each combination loses against what it costs."""

import math
from pathlib import Path

from ..train import svg
from ..train.render import render


def html(result: dict) -> str:
    """The page of what `sweep` measured."""
    rows = sorted(result["rows"], key=lambda row: row["gap"])
    shown = [row for row in rows if math.isfinite(row["gap"])]
    best, members = min((row["gap"] for row in shown), default=None), set(result["front"])
    points = [svg.Point(100 * row["overhead"], 100 * row["gap"], row["name"], None, 100 * row["gap_std"]) for row in shown]
    figure = {
        "id": "front",
        "title": "Loss against overhead",
        "caption": f"Not beaten in both: {', '.join(result['front'])}.",
        "svg": svg.scatter(points, [i for i, row in enumerate(shown) if row["name"] in members], "overhead in % of the products' time", "loss above exact, %", "front-caption", False, None),
    } if len(shown) > 1 else None  # fmt: skip
    return render(Path(__file__).with_name("fp4.html.j2"), result=result, rows=[row | {"best": row["gap"] == best, "member": row["name"] in members} for row in rows], figure=figure)
