"""HUT is as good as LoRA with fewer operations.

    python benchmarks/claims/hut.py

Operations are counted, not timed: those of the adapter alone, forward and backward, for one step of TOKENS tokens, from the
shapes of MiniLM's layers. HUT forms W ∘ (1 + B A) whatever the tokens; but its gradient needs that of the whole weight, so
that over a training step it saves nothing. Both counts are given.
"""

from _common import LIMITS, about, accuracies, few_shot, percent, values

import tunesmith as ts
from tunesmith import models
from tunesmith.bench.claims import claim
from tunesmith.engine.sites import sites

SIDES = {"hut": {"method": "hut", "rank": 7}, "lora": {"method": "lora", "rank": 8}}
TOKENS = 32 * 128


def shapes(method: dict) -> list[tuple[int, int]]:
    model, _ = models.load("minilm", "classification", labels=["a", "b"])
    places = {site.path for site in ts.summary(ts.adapt(model, method)).sites}
    return [site.shape for site in sites(model) if site.path in places and site.kind == "linear"]


def operations() -> dict[str, tuple[float, float]]:
    """(forward, forward and backward) of the adapters on every layer, in multiply-adds."""
    hut, lora, places = SIDES["hut"]["rank"], SIDES["lora"]["rank"], shapes(SIDES["lora"])
    matrix, ends = sum(out * size for out, size in places), sum(out + size for out, size in places)
    affine = TOKENS * sum(out for out, _ in places)
    return {
        "hut": ((hut + 1) * matrix + affine, (3 * hut + 2) * matrix + 3 * affine + TOKENS * matrix),
        "lora": (TOKENS * lora * ends, 3 * TOKENS * lora * ends),
    }


def main():
    rows = few_shot(SIDES)
    found, count = {name: values(row) for name, row in rows.items()}, operations()
    forward, step = (count["hut"][i] / count["lora"][i] for i in (0, 1))
    measured = accuracies(rows)
    for name, (one, both) in count.items():
        measured[name] |= {"forward_gmac": one / 1e9, "step_gmac": both / 1e9}
    claim(
        "HUT (arXiv 2409.13501)",
        "HUT needs fewer operations than LoRA at equal quality",
        "on par or better on GLUE and E2E with markedly fewer training FLOPs (abstract)",
        f"test accuracy hut {percent(found['hut'])}, lora {percent(found['lora'])}; operations of the adapter over LoRA's: {forward:.2f} forward, {step:.1f} in a step",
        measured,
        3,
        about(found["hut"], found["lora"]) and step < 1,
        LIMITS + f"; {TOKENS} tokens a step, as in the paper. A training step needs gᵀx, the gradient of the whole weight, which LoRA never forms: the claim is true of the forward alone",
    )


if __name__ == "__main__":
    main()
