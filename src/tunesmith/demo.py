"""`make demo`: the main job on the sample data set, a few minutes on two cores. Ends by naming the report to open."""

import sys
import time
from pathlib import Path

from .bench.compare import compare
from .errors import TunesmithError
from .files import atomic_write
from .train.display import Display
from .train.folder import read_rows
from .train.loop import run
from .train.recipe import check
from .train.render import render

OUTPUT = Path("demo-report")

# One budget for all; the learning rates suit a small encoder and few steps.
METHODS = [{"method": "full", "lr": 3e-4}, {"method": "lora", "lr": 2e-3}, {"method": "bitfit", "lr": 4e-3}, {"method": "linear-probe", "lr": 1e-2}]
INTENTS = {"model": "minilm", "data": "contact-centre", "eval": "contact-centre", "per_label": 20, "epochs": 3, "batch_size": 8, "eval_every": 1000}
ANSWERS = {
    "model": "smollm2-135m", "method": {"method": "lora", "rank": 8}, "data": "contact-centre-answers", "limit": 64, "eval": "contact-centre-answers",
    "eval_limit": 8, "epochs": 1, "batch_size": 2, "lr": 1.5e-3, "max_new_tokens": 80, "baseline": True, "output": str(OUTPUT / "smollm2-answers"),
}  # fmt: skip


def main() -> None:
    began = time.monotonic()
    with Display() as display:
        display.note("1 of 2: which intent does a message have? MiniLM, four methods, one budget")
        table = compare(METHODS, INTENTS, OUTPUT / "minilm-intents", overwrite=True, progress=display, jobs=2)
        display.note("2 of 2: SmolLM2-135M learns to answer with JSON {intent, urgency, entities}")
        result = run(check(ANSWERS), display, overwrite=True)
    examples = answers(result.folder)
    for message, before, after in examples[:3]:
        print(f"\nmessage  {message}\nbefore   {' '.join(before.split())[:160]}\nafter    {after}")
    print()
    for row in sorted(table["rows"], key=lambda row: -row["value"]):
        print(f"{row['label']:<24} accuracy {row['value']:.1%}  {row['trainable']:>12,} parameters trained  {row['train_s']:.0f} s  {row['peak_mb']:,.0f} MB")
    page = OUTPUT / "index.html"
    atomic_write(page, render(Path(__file__).with_name("demo.html.j2"), table=table, answers=result.summary, examples=examples, minutes=(time.monotonic() - began) / 60))
    print(f"\ndone in {(time.monotonic() - began) / 60:.1f} minutes. Open {page}")


def answers(folder: Path) -> list[tuple[str, str, str]]:
    """(message, answer of the untouched model, answer of the adapted one), from the run's files."""
    before = {row["input"]: row["predicted"] for row in read_rows(folder / "eval_base.jsonl")}
    return [(row["input"], before.get(row["input"], ""), row["predicted"]) for row in read_rows(folder / "predictions.jsonl")]


if __name__ == "__main__":
    try:
        main()
    except TunesmithError as error:
        sys.exit(f"error: {error}")
