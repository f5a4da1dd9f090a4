"""HUT is as good as LoRA with fewer operations.

    python benchmarks/claims/hut.py

Operations are counted, not timed: those of the adapter alone, forward and backward, for one step of BATCH tokens, from the
shapes of MiniLM's layers. HUT forms W ∘ (1 + B A) whatever the tokens; but its gradient needs that of the whole weight, so
that over a training step it saves nothing. Both counts are given.
"""

from _common import LIMITS, about, accuracies, few_shot, percent, values

import tunesmith as ts
from tunesmith import models
from tunesmith.bench.claims import claim
from tunesmith.engine.sites import sites

SIDES = {"hut": {"method": "hut", "rank": 8}, "lora": {"method": "lora", "rank": 8}}
TOKENS = 32 * 128


def shapes(method: dict) -> list[tuple[int, int]]:
    model, _ = models.load("minilm", "classification", labels=["a", "b"])
    places = {site.path for site in ts.summary(ts.adapt(model, method)).sites}
    return [site.shape for site in sites(model) if site.path in places and site.kind == "linear"]


def operations(r: int) -> dict[str, tuple[float, float]]:
    """(forward, forward and backward) of the adapters on every layer, in multiply-adds."""
    hut, lora = [0, 0], [0, 0]
    for out, size in shapes(SIDES["lora"]):
        hut[0] += r * out * size + 2 * out * size + TOKENS * out
        hut[1] += 3 * r * out * size + 5 * out * size + 3 * TOKENS * out + TOKENS * out * size
        lora[0] += TOKENS * r * (out + size)
        lora[1] += 3 * TOKENS * r * (out + size)
    return {"hut": tuple(hut), "lora": tuple(lora)}


def main():
    rows = dict(zip(SIDES, few_shot(*SIDES.values()), strict=True))
    found, count = {name: values(row) for name, row in rows.items()}, operations(8)
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
