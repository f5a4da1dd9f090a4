"""SoKA is as good as LoRA and PiSSA with a quarter fewer parameters, and its gradients are steadier.

    python benchmarks/claims/soka.py

Steadiness is the standard deviation of the gradient's norm over its mean, after the first tenth of the steps.
"""

import statistics

from _common import LIMITS, about, accuracies, few_shot, logged, parameters, percent, spread, values
from _common import above as larger

from tunesmith.bench.claims import claim

SIDES = {"soka": {"method": "soka", "rank": 6}, "lora": {"method": "lora", "rank": 8}, "pissa": {"method": "pissa", "rank": 8}}
PAPER = "SoKA (arXiv 2506.15251)"


def unsteadiness(norms: list[float]) -> float:
    norms = norms[len(norms) // 10 :]
    return statistics.stdev(norms) / statistics.mean(norms)


def main():
    rows = few_shot(SIDES, runs=True)
    found, others = {name: values(row) for name, row in rows.items()}, ("lora", "pissa")
    share = parameters(SIDES["soka"]) / parameters(SIDES["lora"])
    claim(
        PAPER,
        "SoKA matches or exceeds LoRA and PiSSA with 25% fewer parameters",
        "0.99M parameters against 1.32M, accuracy on GSM8K, MATH and MBPP at least as high (LLaMA2-7B; abstract)",
        f"test accuracy with {share:.2f} of the parameters: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows),
        3,
        share <= 0.75 and all(about(found["soka"], found[other]) for other in others),
        LIMITS + "; as good means no more than one point below",
    )
    steady = {name: [unsteadiness(run) for run in logged(row, "grad_norm")] for name, row in rows.items()}
    claim(
        PAPER,
        "SoKA's gradients are steadier than LoRA's and PiSSA's",
        "more stable gradients (abstract)",
        "standard deviation of the gradient's norm over its mean: " + ", ".join(f"{name} {statistics.mean(each):.2f}" for name, each in steady.items()),
        {name: spread(each) for name, each in steady.items()},
        3,
        all(larger(steady[other], steady["soka"]) for other in others),
        LIMITS,
    )


if __name__ == "__main__":
    main()
