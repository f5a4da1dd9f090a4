"""A model with its weights in few bits, as a folder that recipes and commands take in place of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data
from ..data import tasks
from ..files import atomic_folder
from ..quantize import footprint, formats, quantize, save
from ..train import base
from ..train.evaluate import evaluate
from .export import new_folder

ROWS, LENGTH = 32, 512  # of the calibration: texts of so many tokens


def quantize_to_folder(
    name: str,
    out: str | Path,
    format: Any = "nf4",
    calibration: str | None = None,
    text: str | None = None,
    limit: int | None = 2000,
    dtype: str = "float32",
) -> dict:
    """Write the model `name` with its linear layers in the number format `format`.

    calibration: data whose first tokens the layers' outputs are kept for (GPTQ); without it weights are rounded to nearest.
    text: data, held out from the model's training, to measure the perplexity on before and after, on at most `limit` rows or lines.
    Returns {"folder", "layers", "bytes", "closed_form", "bits_per_weight", "total_bytes", "original_bytes", "before", "after"}.
    Raises `TunesmithError`, with nothing written, for a format, a model or data that is wrong, or a folder in use.
    """
    out, format = new_folder(out), formats.parse(format)
    lm = tasks.get("lm")
    scored = data.load(text, "test") if text else None
    columns = lm.columns(scored) if scored is not None else None
    rows = data.load(calibration, "train") if calibration else None
    model, tokenizer = base.load(name, "lm", dtype=dtype)

    def perplexity() -> float | None:
        if scored is not None:
            return evaluate(model, tokenizer, lm, scored, columns, batch_size=8, limit=limit, max_length=LENGTH).metrics["perplexity"]

    original, before = sum(p.nbytes for p in model.parameters()), perplexity()
    quantize(model, format, calibrate=_calibration(lm.encode(rows, lm.columns(rows), tokenizer, None, LENGTH)[:ROWS]) if rows is not None else None)
    after, found = perplexity(), footprint(model)
    with atomic_folder(out) as folder:
        save(model, folder, name)
        tokenizer.save_pretrained(folder)
    return {"folder": str(out), **found, "original_bytes": original, "before": before, "after": after}


def _calibration(examples: list[dict]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for example in examples:
                model(input_ids=torch.tensor([example["input_ids"]]))

    return run
