"""WaRA, low rank in the wavelet domain, is better than LoRA with as many parameters.

    python benchmarks/claims/wara.py

Beside the task, the paper's reason: a change that is of low rank in each band of a weight is fitted by WaRA and not by LoRA,
and a change that is of low rank is fitted by LoRA and not by WaRA. Both are made here, with random factors.
"""

import copy

import torch
from _common import LIMITS, above, accuracies, few_shot, percent, spread, values

import tunesmith as ts
from tunesmith.bench.claims import claim

SIDES = {"wara": {"method": "wara", "rank": 16}, "lora": {"method": "lora", "rank": 8}}
PAPER = "WaRA (arXiv 2506.24092)"


def misfit(target: dict, fitted: dict, seed: int, size: int = 64) -> float:
    """‖ΔW − ΔW*‖²/‖ΔW*‖² after Adam has fitted the change that `target` makes with random parameters."""
    torch.manual_seed(seed)
    x, plain = torch.eye(size), torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    base, goal = plain(x).detach(), ts.adapt(copy.deepcopy(plain), target | {"targets": ["0"]})
    with torch.no_grad():
        for p in ts.trainable(goal).values():
            p.normal_()
        wanted = goal(x)
    model = ts.adapt(plain, fitted | {"targets": ["0"]})
    optimizer = torch.optim.Adam(ts.trainable(model).values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        loss = (model(x) - wanted).square().sum() / (wanted - base).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def main():
    rows = few_shot(SIDES)
    found = {name: values(row) for name, row in rows.items()}
    claim(
        PAPER,
        "WaRA is better than LoRA with as many parameters",
        "better than LoRA variants on image generation, classification and segmentation (abstract)",
        f"test accuracy wara {percent(found['wara'])}, lora {percent(found['lora'])}",
        accuracies(rows),
        3,
        above(found["wara"], found["lora"]),
        LIMITS + "; the paper's tasks are of images",
    )
    targets = {"wara": 2, "lora": 2}
    fits = {
        f"{method} of a change made by {target}": [misfit({"method": target, "rank": targets[target]}, {"method": method, "rank": rank}, seed) for seed in range(3)]
        for target, method, rank in (("wara", "wara", 2), ("wara", "lora", 1), ("lora", "lora", 2), ("lora", "wara", 4))
    }
    claim(
        PAPER,
        "a change of low rank in the wavelet domain is fitted better than by LoRA with as many parameters",
        "the method's motivation; no figure",
        ", ".join(f"{name}: {sum(each) / 3:.2g}" for name, each in fits.items()),
        {name: spread(each) for name, each in fits.items()},
        3,
        above(fits["lora of a change made by wara"], fits["wara of a change made by wara"]),
        "64 × 64 weights, relative squared error after 800 steps of Adam",
    )


if __name__ == "__main__":
    main()
