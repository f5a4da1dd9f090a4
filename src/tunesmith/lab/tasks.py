"""Small real tasks that train in seconds: what a loss is worth against exact arithmetic."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TunesmithError
from .fp4 import FP4, convert


def _mlp(*widths: int) -> nn.Sequential:
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], rows: int, steps: int, batch: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rise = 0.11 if steps == 10 else 0.1  # torch divides by the steps of the rise less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=rise, cycle_momentum=False)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(rows, (batch,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _split(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out rows, a quarter."""
    order = np.random.default_rng(0).permutation(len(x))
    cut = len(x) // 4
    held, learned = order[:cut], order[cut:]
    return tuple(torch.tensor(t).float() for t in (x[learned], y[learned], x[held], y[held]))


def regression(config: FP4 | None, seed: int, steps: int) -> float:
    """Progression of diabetes from ten measurements (scikit-learn), in standard deviations: mean squared error on held-out patients."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import scale

    data = load_diabetes()
    x, y, x_held, y_held = _split(scale(data.data), scale(data.target))
    torch.manual_seed(seed)
    model = convert(_mlp(10, 64, 64, 1), config, seed)
    _train(model, lambda pick: F.mse_loss(model(x[pick])[:, 0], y[pick]), len(x), steps, 64, 2e-3)
    with torch.no_grad():
        return F.mse_loss(model(x_held)[:, 0], y_held).item()


def classification(config: FP4 | None, seed: int, steps: int) -> float:
    """Handwritten digits (scikit-learn): cross-entropy on held-out images."""
    from sklearn.datasets import load_digits

    x, y, x_held, y_held = _split(*load_digits(return_X_y=True))
    x, x_held, y, y_held = x / 8 - 1, x_held / 8 - 1, y.long(), y_held.long()
    torch.manual_seed(seed)
    model = convert(_mlp(64, 128, 128, 10), config, seed)
    _train(model, lambda pick: F.cross_entropy(model(x[pick] + 0.2 * torch.randn(len(pick), 64)), y[pick]), len(x), steps, 64, 2e-3)
    with torch.no_grad():
        return F.cross_entropy(model(x_held), y_held).item()


def diffusion(config: FP4 | None, seed: int, steps: int) -> float:
    """Denoising handwritten digits (scikit-learn): mean squared error of the noise on held-out images, at times that are the same for all."""
    from sklearn.datasets import load_digits

    x, _, x_held, _ = _split(*load_digits(return_X_y=True))
    x, x_held = x / 8 - 1, (x_held / 8 - 1).repeat(4, 1)
    torch.manual_seed(seed)
    model = convert(_mlp(64 + 16, 192, 192, 64), config, seed)

    def loss(x, t, noise):
        angle = (t * torch.pi / 2)[:, None]
        waves = t[:, None] * 2.0 ** torch.arange(8)
        return F.mse_loss(model(torch.cat([angle.cos() * x + angle.sin() * noise, waves.sin(), waves.cos()], 1)), noise)

    _train(model, lambda pick: loss(x[pick], torch.rand(len(pick)), torch.randn(len(pick), 64)), len(x), steps, 128, 2e-3)
    with torch.no_grad():
        return loss(x_held, torch.linspace(0, 1, len(x_held)), torch.randn(x_held.shape, generator=torch.Generator().manual_seed(0))).item()


class _Writer(nn.Module):
    """A transformer over characters with two blocks."""

    def __init__(self, size: int, width: int = 64, length: int = 64):
        super().__init__()
        self.token, self.place = nn.Embedding(size, width), nn.Parameter(torch.randn(length, width) / 10)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
            "mlp": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        }) for _ in range(2))  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, ids):
        h = self.token(ids) + self.place
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](h)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            h = h + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + block["mlp"](h)
        return self.head(h)


def shakespeare() -> Path:
    """tiny Shakespeare, in $TUNESMITH_DATA or ../shared/data. Raises `TunesmithError` where it is not."""
    file = Path(os.environ.get("TUNESMITH_DATA", "../shared/data")) / "text" / "tinyshakespeare.txt"
    if not file.is_file():
        raise TunesmithError(f"the task language needs tiny Shakespeare at {file}; set TUNESMITH_DATA, or leave the task out")
    return file


def language(config: FP4 | None, seed: int, steps: int) -> float:
    """Characters of tiny Shakespeare: cross-entropy on the last tenth. Embedding, norms, attention and head stay exact."""
    text = shakespeare().read_text(encoding="utf-8")
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    learned, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    torch.manual_seed(seed)
    model = _Writer(len(letters))
    convert(model, config, seed, keep=("head.1",))

    def loss(ids, starts):
        rows = ids[starts[:, None] + torch.arange(65)]
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    _train(model, lambda pick: loss(learned, pick), len(learned) - 65, steps, 16, 3e-3)
    with torch.no_grad():
        return loss(held, torch.arange(0, len(held) - 65, len(held) // 256)).item()


TASKS = {  # name: (run, steps, loss of knowing nothing)
    "regression": (regression, 400, 1.0),
    "classification": (classification, 600, math.log(10)),
    "diffusion": (diffusion, 800, 1.0),
    "language": (language, 300, math.log(65)),
}


def run(task: str, config: FP4 | None, seed: int, share: float = 1.0) -> float:
    """The held-out loss after training on `task` for `share` of its steps; where training breaks down, that of knowing nothing."""
    train, steps, nothing = TASKS[task]
    loss = train(config, seed, max(1, round(share * steps)))
    return loss if loss < nothing else nothing
