"""What the claims about images share: a small ViT that knows five alphabets of Omniglot, moved to three it has never seen.

The images are `images/omniglot_small1.zip` and `omniglot_small2.zip` in $TUNESMITH_DATA. The ViT is trained on the 136
characters of the first, once, and kept in runs/omniglot. Then, for each of Japanese katakana, Sanskrit and Tagalog, an adapter
and a new head are trained on five drawers' characters; five other drawers choose a method's rate, among RATES and, where the first or
the last of these is the best, beyond it; and ten drawers score.
"""

import copy
import io
import json
import os
import statistics
import zipfile
from pathlib import Path

import torch
from _common import kept
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import tunesmith as ts
from tunesmith.bench.claims import spread
from tunesmith.files import atomic_write

OLD, NEW = ["Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"], ["Japanese_(katakana)", "Sanskrit", "Tagalog"]
SHOTS, EPOCHS, BATCH, RATES, SEEDS = 5, 30, 32, [1e-3, 3e-3, 1e-2], range(3)
FOLDER, MEASURED = Path("runs/omniglot"), Path("benchmarks/results/omniglot.json")
LIMITS = "a ViT of 1.2M weights that knows 136 characters, five examples of each new one; the papers adapt ViT-B of 86M"


def alphabets(part: int, names: list[str]) -> dict[str, torch.Tensor]:
    """Each alphabet's images, (characters, 20 drawers, 1, 28, 28), ink being 1."""
    data = Path(os.environ.get("TUNESMITH_DATA", "../shared/data")) / "images" / f"omniglot_small{part}.zip"
    found: dict[str, dict[str, list]] = {name: {} for name in names}
    with zipfile.ZipFile(data) as files:
        for file in sorted(files.namelist()):
            _, alphabet, *rest = file.split("/")
            if file.endswith(".png") and alphabet in found:
                image = Image.open(io.BytesIO(files.read(file))).convert("L").resize((28, 28), Image.Resampling.BOX)
                found[alphabet].setdefault(rest[0], []).append(1 - torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 28, 28) / 255)
    return {name: torch.stack([torch.stack(images) for images in characters.values()]) for name, characters in found.items()}


def shaken(x: torch.Tensor) -> torch.Tensor:
    """Images turned by up to 15°, scaled by up to a tenth and moved by up to 2 pixels."""
    turn, size = (torch.rand(len(x)) - 0.5) * torch.pi / 6, 0.9 + 0.2 * torch.rand(len(x))
    rows = torch.stack(
        [size * turn.cos(), -size * turn.sin(), (torch.rand(len(x)) - 0.5) * 0.3, size * turn.sin(), size * turn.cos(), (torch.rand(len(x)) - 0.5) * 0.3], 1
    )
    return F.grid_sample(x, F.affine_grid(rows.view(-1, 2, 3), x.shape, align_corners=False), align_corners=False)


def vit() -> ViTModel:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 1,
    }
    return ViTModel(ViTConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False)


def logits(backbone: nn.Module, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return head(backbone(pixel_values=x).last_hidden_state[:, 0])


def fit(backbone, head, optimizer, x, y, epochs: int, stages=None) -> None:
    """Cosine decay after a tenth of warm-up."""
    steps = epochs * -(-len(x) // BATCH)
    shape = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(epochs):
        for pick in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(logits(backbone, head, shaken(x[pick])), y[pick]).backward()
            if stages:
                stages.before_step(optimizer)
            optimizer.step()
            if stages:
                stages.step()
            shape.step()


@torch.no_grad()
def accuracy(backbone, head, x, y) -> float:
    return float((torch.cat([logits(backbone, head, part) for part in x.split(256)]).argmax(1) == y).double().mean())


def pretrained(epochs: int = 40) -> tuple[ViTModel, nn.Linear]:
    """The ViT that knows OLD, and its head; trained here the first time."""
    file, model, head = FOLDER / "vit.safetensors", vit(), nn.Linear(128, 136)
    if not file.exists():
        torch.manual_seed(0)
        model, head = vit(), nn.Linear(128, 136)
        x, y = known()
        fit(model, head, torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05), x, y, epochs)
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file({f"{part}.{k}": v.contiguous() for part, m in (("vit", model), ("head", head)) for k, v in m.state_dict().items()}, file)
    for part, m in (("vit", model), ("head", head)):
        m.load_state_dict({k.removeprefix(f"{part}."): v for k, v in load_file(file).items() if k.startswith(f"{part}.")})
    return model.eval(), head


def known() -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of the characters of OLD."""
    x = torch.cat(list(alphabets(1, OLD).values()))
    return x.flatten(0, 1), torch.arange(len(x))[:, None].expand(x.shape[:2]).flatten()


def split(images: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, y) of five drawers to learn from, five to choose a rate on, ten to score on."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    parts = [images[:, order[a:b]] for a, b in ((0, SHOTS), (SHOTS, 10), (10, 20))]
    return [(part.flatten(0, 1), torch.arange(len(images))[:, None].expand(part.shape[:2]).flatten()) for part in parts]


def adapted(base: ViTModel, method: dict | None, learn: tuple, classes: int, lr: float, seed: int, name: str = "default"):
    """(a copy of the base with the trained adapter, head); without a method the head alone learns."""
    x, y = learn
    torch.manual_seed(seed)
    head, backbone = nn.Linear(128, classes), copy.deepcopy(base)
    group = {"params": list(head.parameters()), "lr": 1e-2}
    if method is None:
        fit(backbone.requires_grad_(False), head, torch.optim.AdamW([group]), x, y, EPOCHS)
        return backbone, head

    def calibrate(model):
        for part in torch.arange(len(x)).split(BATCH):
            F.cross_entropy(logits(model, head, x[part]), y[part]).backward()

    ts.adapt(backbone, method, name=name, calibrate=calibrate)
    optimizer = torch.optim.AdamW(ts.trainable(backbone).values(), lr=lr, weight_decay=0.0)
    optimizer.add_param_group(group)
    fit(backbone, head, optimizer, x, y, EPOCHS, ts.stages(backbone, EPOCHS * -(-len(x) // BATCH)))
    return backbone, head


def moved(sides: dict[str, dict | None]) -> dict[str, dict]:
    """`measured` of each side at its best rate, means over the new alphabets by seed: test accuracy, and under `known` what is
    left of the accuracy on OLD. What MEASURED holds already is not done again."""
    return {name: _kept(method, lambda method=method: _moved(method)) for name, method in sides.items()}


def fused(sides: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
    """`measured` of each side for the adapters of two alphabets: test accuracy alone, of both added up, and what that loses."""
    return {name: _kept({"fused": method, "lr": rates[name]}, lambda name=name, method=method: _fused(method, rates[name])) for name, method in sides.items()}


def _kept(what, find) -> dict:
    row = next((row for row in kept(MEASURED) if row["of"] == what), None)
    if row is None:
        row = {"of": what, "found": find()}
        atomic_write(MEASURED, json.dumps([*kept(MEASURED), row], indent=1) + "\n")
    return row["found"]


def _moved(method: dict | None) -> dict:
    (base, old_head), old, new = pretrained(), known(), alphabets(2, NEW)

    def run(alphabet: str, lr: float, seed: int, part: int):
        learn, *others = split(new[alphabet], seed)
        backbone, head = adapted(base, method, learn, len(new[alphabet]), lr, seed)
        return accuracy(backbone, head, *others[part]), backbone

    def tried(lr: float) -> float:
        return statistics.mean(run(alphabet, lr, 100, 0)[0] for alphabet in NEW)

    chosen = {lr: tried(lr) for lr in (RATES if method else RATES[:1])}
    while method and (lr := max(chosen, key=chosen.get)) in (edges := {min(chosen): 1 / 3, max(chosen): 3}):
        chosen[lr * edges[lr]] = tried(lr * edges[lr])
    lr = max(chosen, key=chosen.get)
    runs = [[run(alphabet, lr, seed, 1) for alphabet in NEW] for seed in SEEDS]
    count = statistics.mean(ts.summary(backbone).trainable for _, backbone in runs[0]) if method else 0
    return spread([statistics.mean(score for score, _ in each) for each in runs]) | {
        "parameters": round(count), "lr": lr, "validation": {f"{rate:.2g}": score for rate, score in sorted(chosen.items())}, "known_before": accuracy(base, old_head, *old),
        "known": spread([statistics.mean(accuracy(backbone, old_head, *old) for _, backbone in each) for each in runs]),
    }  # fmt: skip


def _fused(method: dict, lr: float) -> dict:
    (base, _), new, pair = pretrained(), alphabets(2, NEW), NEW[:2]
    alone, both = [], []
    for seed in SEEDS:
        backbone, heads, tests = copy.deepcopy(base), [], []
        for i, alphabet in enumerate(pair):
            learn, _, test = split(new[alphabet], seed)
            backbone, head = adapted(backbone, method, learn, len(new[alphabet]), lr, seed, name=f"task{i}")
            heads, tests = [*heads, head], [*tests, test]
        scores = []
        for chosen in ("task0", "task1", ["task0", "task1"]):
            ts.activate(backbone, chosen)
            scores.append([accuracy(backbone, head, *test) for head, test in zip(heads, tests, strict=True)])
        alone.append((scores[0][0] + scores[1][1]) / 2)
        both.append(statistics.mean(scores[2]))
    return {"alone": spread(alone), "fused": spread(both), "lost": spread([a - b for a, b in zip(alone, both, strict=True)])}
