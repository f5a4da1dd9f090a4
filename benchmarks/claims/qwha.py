"""QWHA undoes more of a quantisation's error than LoftQ and than Fourier-type adapters with as many parameters, and trains faster.

    python benchmarks/claims/qwha.py

The error is that of SmolLM2-135M's own layers: ‖X(W − Q − ΔW)ᵀ‖² over ‖X(W − Q)ᵀ‖², the mean over its 210 linear layers, for
inputs X of texts that no adapter was started on; a seed draws the texts for the start. A Fourier-type adapter has its
entries, as many, where AdaAlloc would have them in the basis of the discrete cosine transform, and their values refined alike.
Time is that of benchmarks/results/quantised_step.json.
"""

import json
import os
import statistics
from pathlib import Path

import torch
from _common import LIMITS, above, accuracies, few_shot, percent, values

from tunesmith import models
from tunesmith.bench.claims import claim, spread
from tunesmith.engine.calls import score
from tunesmith.engine.sites import find
from tunesmith.methods import qwha
from tunesmith.methods.lora import pissa
from tunesmith.quantize import PackedWeight, formats

PAPER = "QWHA (arXiv 2509.17428)"
RANK, LAYERS, TEXTS = 8, 30, 12  # rank of the LoRA with as many parameters; layers of the model; texts of 256 tokens for a start


def moments(model, tokenizer, texts):
    """{path: the mean of x xᵀ of its inputs} on some texts."""
    chosen = {path: site for path, (site, _) in find(model, "all-linear", ("linear",)).items()}

    def run(model):
        with torch.no_grad():
            for text in texts:
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:256]]))

    score(model, chosen, run, ("moments",))
    return {path: (site.parameter.detach(), site.moments.double()) for path, site in chosen.items()}


def started(error, M, basis):
    """ΔW of an adapter in a basis with as many entries as LoRA trains."""
    index, c = qwha.start(error, qwha.damped(M), RANK * sum(error.shape), 1.0, basis)
    F = torch.zeros(error.numel(), dtype=error.dtype).index_put((index,), c).view(error.shape)
    return qwha.BASES[basis](F, transpose=True)


def main():
    model, tokenizer = models.load("smollm2-135m", "lm")
    lines = (Path(os.environ.get("TUNESMITH_DATA", "../shared/data")) / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    pieces = [lines[i : i + 1200] for i in range(0, len(lines) - 1200, 1200)]
    judged = moments(model, tokenizer, pieces[-TEXTS:])
    for bits in (2, 3, 4):
        format, left = formats.parse(f"int{bits}"), {"qwha": [], "dct": [], "loftq": [], "qwha without data": []}
        for seed in range(3):
            known = moments(model, tokenizer, pieces[seed * TEXTS : (seed + 1) * TEXTS])
            ratios = {name: [] for name in left}
            for path, (W, M) in known.items():
                error = W.double() - PackedWeight.of(W, format).dequantize().double()
                A, B = pissa(error, RANK, 1.0)
                changes = {
                    "qwha": started(error, M, "hadamard"), "dct": started(error, M, "cosine"), "loftq": B @ A,
                    "qwha without data": started(error, torch.eye(len(M), dtype=M.dtype), "hadamard"),
                }  # fmt: skip
                J = judged[path][1]
                for name, change in changes.items():
                    rest = error - change
                    ratios[name].append(((rest @ J) * rest).sum().item() / ((error @ J) * error).sum().item())
            for name, each in ratios.items():
                left[name].append(statistics.mean(each))
        for other, called in (("loftq", "LoftQ"), ("dct", "a cosine basis")):
            claim(
                PAPER,
                f"at {bits} bits QWHA starts with less of the quantisation's error than {called} with as many parameters",
                "reconstruction error below LoRA-based and other Fourier-type adapters at 2 to 4 bits (abstract)",
                "error left: " + ", ".join(f"{name} {statistics.mean(left[name]):.3f}" for name in ("qwha", other, "qwha without data")),
                {name: spread(left[name]) for name in ("qwha", other, "qwha without data")},
                3,
                above(left[other], left["qwha"]),
                "SmolLM2-135M, groups of 64, rounded to nearest, as many entries as LoRA of rank 8; LoftQ does not look at the inputs, and neither does QWHA without data; the cosine basis has the same selection and refinement",
            )
    sides = {"qwha": {"method": "qwha", "rank": 8}, "loftq": {"method": "loftq", "rank": 8}, "lora": {"method": "lora", "rank": 8}}
    rows = few_shot(sides, "int2")
    found = {name: values(row) for name, row in rows.items()}
    claim(
        PAPER,
        "on a base in 2 bits QWHA is more accurate than LoftQ and LoRA with as many parameters",
        "better than LoRA-based adapters at 2 to 4 bits (abstract)",
        "test accuracy: " + ", ".join(f"{name} {percent(each)}" for name, each in found.items()),
        accuracies(rows, "int2"),
        3,
        all(above(found["qwha"], found[other]) for other in ("loftq", "lora")),
        LIMITS,
    )
    steps = json.loads(Path("benchmarks/results/quantised_step.json").read_text())["ratios"]
    step = {other: steps[f"qwha@int4 / {other}@int4"]["step_s"] for other in ("dct", "fourierft", "lora")}
    claim(
        PAPER,
        "QWHA's step takes at most half of the time of Fourier-type adapters of the same size",
        "several times faster (abstract)",
        ", ".join(f"{ratio:.2f} of {other}'s" for other, ratio in step.items()),
        step,
        1,
        step["dct"] <= 0.5 and step["fourierft"] <= 0.5,
        "SmolLM2-135M's shape on two CPU cores, 4 x 256 tokens",
    )


if __name__ == "__main__":
    main()
