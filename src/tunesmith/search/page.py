"""The page of a search: the front, and every trial."""

from pathlib import Path

import yaml

from ..train import svg
from ..train.render import number, render

TITLES = {"trainable": "trained parameters", "train_s": "training time in s", "peak_mb": "peak memory in MB"}


def html(result: dict) -> str:
    """The page of what `search` found."""
    rows, cost, metric = result["trials"], result["cost"], result["metric"]
    front = sorted((i for i, row in enumerate(rows) if row["front"]), key=lambda i: rows[i][cost])
    points = [svg.Point(row[cost], row["value"], row["text"], labelled=row["front"]) for row in rows]
    figure = {
        "id": "front", "title": f"{metric.capitalize()} against {TITLES[cost]}", "caption": f"{len(front)} of {len(rows)} configurations are not beaten in both.",
        "svg": svg.scatter(points, front, TITLES[cost], metric, "front-caption", cost != "peak_mb"),
    } if len(rows) > 1 else None  # fmt: skip
    return render(
        Path(__file__).with_name("search.html.j2"), result=result, figure=figure, title=TITLES[cost], number=number,
        front=[rows[i] for i in front], others=[row for row in rows if not row["front"]], base=yaml.safe_dump(result["recipe"], sort_keys=False, allow_unicode=True),
    )  # fmt: skip
