"""A trained adapter for use elsewhere: merged into its model, or alone in another library's format."""

from pathlib import Path

import torch

import tunesmith as ts

from .. import models
from ..errors import TunesmithError, nearest
from ..files import atomic_folder
from ..train.folder import open_run

FORMATS = ("peft", "tunesmith")


def merge_to_folder(run_folder: str | Path, out: str | Path) -> dict:
    """Write a run's model with its adapter merged as a plain Hugging Face folder, which needs no tunesmith.

    Returns {"folder", "max_error", "mean_error", "largest_logit"}: the written model, read again, against the adapted one on
    random tokens. Raises `TunesmithError`, with nothing written, for a method that cannot be merged or a folder in use.
    """
    from transformers.utils import logging

    out = _new(out)
    run = open_run(run_folder)
    model, device = run.model, next(run.model.parameters()).device
    ids = torch.randint(len(run.tokenizer), (4, 32), generator=torch.Generator().manual_seed(0)).to(device)
    adapted = _logits(model, ids)
    ts.merge(model, unload=True)
    logging.disable_progress_bar()
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        written, _ = models.load(str(folder), run.task.name, run.labels, run.recipe.dtype)
        error = (_logits(written.to(device), ids) - adapted).abs()
    return {"folder": str(out), "max_error": error.max().item(), "mean_error": error.mean().item(), "largest_logit": adapted.abs().max().item()}


def export_adapter(run_folder: str | Path, out: str | Path, format: str = "peft") -> Path:
    """Write a run's adapter alone. Raises `TunesmithError` for an unknown format, or a method the format cannot hold."""
    if format not in FORMATS:
        raise TunesmithError(f"unknown format {format!r}{nearest(format, FORMATS)}; it is one of {', '.join(FORMATS)}")
    out = _new(out)
    ts.save(open_run(run_folder).model, out, format=format)
    return out


def _logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def _new(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TunesmithError(f"{out} exists already; choose a new folder")
    return out
