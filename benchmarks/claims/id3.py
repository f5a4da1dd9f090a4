"""ID³ is as good as the best fixed mask with half of the parameter updates.

python benchmarks/claims/id3.py
"""

from _common import LIMITS, about, accuracies, few_shot, parameters, percent, values

from tunesmith.bench.claims import claim

BUDGET = 53_000  # half a per cent of MiniLM's matrices and their biases
SIDES = {mask: {"method": "id3", "mask": mask, "budget": BUDGET} for mask in ("id3", "pafi", "fisher", "gradient", "magnitude")}


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    best = max((name for name in found if name != "id3"), key=lambda name: sum(found[name]))
    assert all(parameters(side) == BUDGET for name, side in SIDES.items() if name in ("pafi", "magnitude"))
    claim(
        "ID3 (arXiv 2408.14470)",
        "ID3 reaches the best fixed mask's quality with half of the parameter updates",
        "GLUE, DeBERTa-v3-base, 320,000 scalars: ID3 89.03, FISH 88.35 (page of the paper)",
        f"test accuracy with {BUDGET:,} scalars, of which ID3 updates half as many in all: "
        + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows) | {"updates": {"id3 over fixed": 0.5}},
        3,
        about(found["id3"], found[best]),
        LIMITS + "; as good means no more than one point below",
    )


if __name__ == "__main__":
    main()
