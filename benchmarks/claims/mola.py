"""MoLA: more experts in the higher layers beat a uniform and an inverted allocation of as many.

    python benchmarks/claims/mola.py

MiniLM has six layers, so an allocation is a list of six; all of them have 30 experts. The later version of the paper favours
the middle layers: that allocation is there too. All sides have one learning rate, the method's default.
"""

from _common import BASE, FOLDER, LIMITS, SEEDS, above, parameters, percent, spread

from tunesmith.bench.claims import claim
from tunesmith.bench.compare import compare

ALLOCATIONS = {
    "higher": [2, 3, 4, 6, 7, 8],
    "lower": [8, 7, 6, 4, 3, 2],
    "uniform": [5, 5, 5, 5, 5, 5],
    "ends": [8, 5, 2, 2, 5, 8],
    "middle": [2, 5, 8, 8, 5, 2],
}
PAPER = "MoLA (arXiv 2402.08562)"


def main():
    sides = {name: {"method": "mola", "experts": experts, "rank": 4} for name, experts in ALLOCATIONS.items()}
    result = compare([side | {"lr": 1e-3} for side in sides.values()], BASE, FOLDER, SEEDS, jobs=2)
    if result["failures"]:
        raise SystemExit(result["failures"][0]["reason"])
    found = {name: [run["value"] for run in row["runs"]] for name, row in zip(sides, result["rows"], strict=True)}
    summary = "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items())
    measured = {name: spread(each) | {"experts": ALLOCATIONS[name], "parameters": parameters(sides[name])} for name, each in found.items()}
    for best, others, reported in (
        ("higher", ("uniform", "lower"), "CommonsenseQA 77.2 for 2468, 75.9 for 5555, 76.3 for 8642 (LLaMA-2-7B, direct fine-tuning)"),
        ("middle", ("uniform", "lower", "higher", "ends"), "the paper's later version: experts matter most in the middle layers; no figure at hand"),
    ):
        claim(
            PAPER,
            f"most experts in the {best} layers beat the other allocations of as many",
            reported,
            summary,
            measured,
            len(SEEDS),
            all(above(found[best], found[other]) for other in others),
            LIMITS.replace("the adapter's chosen among four on held-out data after three epochs", "one for all adapters"),
        )


if __name__ == "__main__":
    main()
