"""FP4 training: which techniques are worth what they cost.

    python benchmarks/claims/fp4.py

What `tunesmith lab fp4` measures: the share lost of what exact arithmetic learns, by the held-out loss, the mean of four small
tasks, with overheads counted for a layer of LLaMA-7B. The runs are kept in runs/fp4, and its page is runs/fp4/fp4.html. A seed
draws start and data alike for every technique, so that two techniques are compared seed by seed.
"""

import os

from _common import ahead

from tunesmith.bench.claims import claim
from tunesmith.lab.fp4 import FP4
from tunesmith.lab.sweep import grid, sweep

PAPER = "Design space of FP4 training (arXiv 2509.17791)"
LIMITS = (
    "networks of 10 thousand to 0.1 million weights trained for some hundred steps on diabetes, digits (classified and denoised) and tiny Shakespeare; "
    "the paper trains models up to language models. Better means that the mean difference of the seeds exceeds twice its standard error"
)
BEST = FP4(scale="e4m3", tensor_scale=True, hadamard="both", stochastic=("g",))
NAMES = {"NVFP4": FP4(scale="e4m3"), "NVFP4, tensor scale": FP4(scale="e4m3", tensor_scale=True), "UE5M3": FP4(scale="e5m3", block=16), "MXFP4": FP4()}


def main():
    found = sweep("runs/fp4", grid("small"), jobs=os.cpu_count() or 1)
    rows = {row["name"]: row for row in found["rows"]}
    measured = {name: {key: row[key] for key in ("gap", "gap_std", "overhead", "losses")} for name, row in rows.items()}

    def text(names):
        return ", ".join(f"{name} {100 * rows[name]['gap']:.2f}% ({100 * rows[name]['overhead']:.0f}% overhead)" for name in names)

    ranked = sorted(rows, key=lambda name: rows[name]["gap"])
    claim(
        PAPER,
        "a Hadamard transform, tensor scaling and stochastic rounding together give the best trade-off",
        "the paper's recommendation (abstract)",
        f"lost of what exact arithmetic learns: {text(dict.fromkeys([BEST.name, *ranked[:3]]))}; not beaten in both loss and overhead: {', '.join(found['front'])}",
        measured,
        len(found["seeds"]),
        BEST.name in found["front"],
        LIMITS + "; holds where the combination is on the Pareto front",
    )
    gaps = {name: rows[config.name]["gaps"] for name, config in NAMES.items()}
    claim(
        PAPER,
        "scales in UE5M3 are a good compromise: as good as NVFP4's with a tensor scale, without the reduction over the tensor",
        "a good compromise between range and precision (abstract)",
        "lost of what exact arithmetic learns: " + text(config.name for config in NAMES.values()),
        {name: measured[config.name] for name, config in NAMES.items()},
        len(found["seeds"]),
        not ahead(gaps["UE5M3"], gaps["NVFP4, tensor scale"]) and rows[NAMES["UE5M3"].name]["overhead"] < rows[NAMES["NVFP4, tensor scale"].name]["overhead"],
        LIMITS,
    )
    spread_of = {}
    for name, config in NAMES.items():
        same = [row["gap"] for row in found["rows"] if all(row["config"][key] == getattr(config, key) for key in ("scale", "tensor_scale", "block"))]
        spread_of[name] = (min(same), max(same))
    between = max(rows[config.name]["gap"] for config in NAMES.values()) - min(rows[config.name]["gap"] for config in NAMES.values())
    within = max(rows[config.name]["gap"] - spread_of[name][0] for name, config in NAMES.items())
    claim(
        PAPER,
        "the representation of scales matters more than any technique on top of it",
        "scale representation is the primary bottleneck (as a later note quotes the paper)",
        f"between formats {100 * between:.2f} points lost or gained, by the best technique on top of a format {100 * within:.2f}",
        {name: {"least": low, "most": high} for name, (low, high) in spread_of.items()},
        len(found["seeds"]),
        between > within,
        LIMITS,
    )


if __name__ == "__main__":
    main()
