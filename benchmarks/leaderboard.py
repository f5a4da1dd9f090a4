"""The tables of docs/leaderboard from what `tunesmith compare` measured.

    python benchmarks/leaderboard.py runs/few-shot/compare.json few-shot
    python benchmarks/leaderboard.py runs/whole/compare.json whole

Writes docs/leaderboard/NAME.json and NAME.csv without the paths of runs, and the table between the marks NAME in README.md.
Rows that are there already and were not measured again are kept; both comparisons must have the same recipe, but for the
number format of the base, which is part of a row.
"""

import csv
import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "leaderboard"
KEPT = ("label", "method", "value", "spread", "trainable", "percent", "bytes", "train_s", "peak_mb")


def plain(row: dict) -> tuple[dict, object]:
    """A row's method without the rate that was chosen for it, and the base's number format."""
    return {key: value for key, value in row["method"].items() if key != "lr"}, row.get("quantize")


def main(source: str, name: str) -> None:
    result = json.loads(Path(source).read_text(encoding="utf-8"))
    quantize = result["base"].pop("quantize", None)
    about = {key: result[key] for key in ("base", "model", "task", "metric", "measured_on", "failures")}
    rows = [{key: row[key] for key in KEPT} | {"values": [run["value"] for run in row["runs"]]} for row in result["rows"]]
    for row in rows if quantize else []:
        row |= {"quantize": quantize, "label": f"{row['label']} on {quantize}"}
    if (FOLDER / f"{name}.json").exists():
        before = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        if before["base"] != result["base"]:
            raise SystemExit(f"{source} was measured with another recipe than docs/leaderboard/{name}.json: {result['base']} and {before['base']}")
        rows += [row for row in before["rows"] if plain(row) not in map(plain, rows)]
    falling = result["metric"] == "perplexity"
    rows.sort(key=lambda row: row["value"] if falling else -row["value"])
    (FOLDER / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with (FOLDER / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", result["metric"], "standard_deviation", "trainable", "train_s", "peak_mb"])
        table.writerows([row["label"], row["value"], row["spread"], row["trainable"], row["train_s"], row["peak_mb"]] for row in rows)
    loras = [row for row in rows if row["method"].get("method") == "lora" and "init" not in row["method"]]
    lora = {row.get("quantize"): row["value"] for row in sorted(loras, key=lambda row: row["trainable"])}  # of each format
    scale, digits = (1, 2) if falling else (100, 1)
    lines = [f"| method | {result['metric']} | over LoRA | trained | training |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {scale * row['spread']:.{digits}f}" if row["spread"] is not None else ""
        value, against = scale * row["value"], lora.get(row.get("quantize"))
        gap = "" if against is None else f"{value - scale * against:+.{digits}f}"
        lines.append(f"| {row['label']} | {value:.{digits}f}{spread} | {gap} | {row['trainable']:,.0f} | {row['train_s']:.0f} s |")
    page = FOLDER / "README.md"
    text = page.read_text(encoding="utf-8")
    block = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end of {name} -->"
    page.write_text(re.sub(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _: block, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
