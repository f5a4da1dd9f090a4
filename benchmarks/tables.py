"""The tables of benchmarks/README.md from what the benchmarks wrote to results/.

python benchmarks/tables.py
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
STEPS = {
    "lora_step": "LoRA", "method_step": "other methods", "sparse_step": "selective methods", "quantised_step": "on bases in few bits",
    "dept_step": "DePT", "ist_step": "layer selection", "adapter_step": "adapters",
}  # fmt: skip


def ratios(name: str) -> dict[str, dict]:
    """{"one / other": ratios} of a benchmark of steps."""
    found = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return (
        found["ratios"]
        if "ratios" in found
        else {f"{method} / {other}": ratio for method, row in found["methods"].items() for other, ratio in row["ratios"].items()}
    )


def steps() -> str:
    lines = ["| step | of | beside | time | memory |", "|---|---|---|---|---|"]
    for name, title in STEPS.items():
        for pair, ratio in ratios(name).items() if (HERE / "results" / f"{name}.json").exists() else []:
            one, other = pair.split(" / ")
            memory = ratio.get("memory_mb", ratio["peak_above_model_mb"])
            lines.append(f"| {title} | {one} | {other} | {ratio['step_s']:.2f} | {memory:.2f} |")
    return "\n".join(lines)


def formats() -> str:
    rows = json.loads((HERE / "results" / "perplexity.json").read_text(encoding="utf-8"))["rows"]
    lines = ["| linear weights in | bits each | MB | perplexity |", "|---|---|---|---|"]
    for name, row in rows.items():
        size = f"{row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.1f}" if "bytes" in row else " | "
        lines.append(f"| {name} | {size} | {row['perplexity']:.2f} |")
    return "\n".join(lines)


def page(text: str) -> str:
    for name, content in (("steps", steps()), ("formats", formats())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{content}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
