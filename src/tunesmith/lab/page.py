"""The page of a sweep: what each combination loses against what it costs."""

from pathlib import Path

from ..train import svg
from ..train.render import render


def html(result: dict) -> str:
    """The page of what `sweep` measured."""
    rows, members = sorted(result["rows"], key=lambda row: row["gap"]), result["front"]
    points = [svg.Point(100 * row["overhead"], 100 * row["gap"], row["name"], None, 100 * row["gap_std"]) for row in rows]
    front = [[row["name"] for row in rows].index(name) for name in members]
    figure = {
        "id": "front",
        "title": "Loss against overhead",
        "caption": f"Not beaten in both: {', '.join(members)}.",
        "svg": svg.scatter(points, front, "overhead in % of the products' time", "lost, %", "front-caption"),
    } if len(rows) > 1 else None  # fmt: skip
    return render(Path(__file__).with_name("fp4.html.j2"), result=result, rows=[row | {"best": row is rows[0], "member": row["name"] in members} for row in rows], figure=figure)
