"""A trained adapter for use elsewhere: merged into its model, or alone in another library's format."""

from pathlib import Path
from typing import Any

import torch

import tunesmith as ts

from .. import pruning
from ..engine.store import pruned_units
from ..errors import TunesmithError, nearest
from ..files import atomic_folder
from ..quantize import dequantize, formats, packed_weights, quantize, save
from ..train import base
from ..train.folder import open_run

FORMATS = ("peft", "tunesmith")


LOST = 0.3  # of what an adapter does, that rounding the merged weights may undo


def merge_to_folder(run_folder: str | Path, out: str | Path, format: Any = None, force: bool = False) -> dict:
    """Write a run's model with its adapter merged as a plain Hugging Face folder, which needs no tunesmith.

    On a quantised base the adapter is merged into the matrices it was trained on, and all weights are written as floating
    point; where the method leaves packed weights (PEQA, SketchTune, L4Q) they are written as such. `format`: round the merged
    weights to this number format. Returns {"folder", "max_error", "mean_error", "largest_logit", "lost"}: the written model,
    read again, against the adapted one on random tokens, and that mean error over the adapter's own effect on the logits.
    Raises `TunesmithError`, with nothing written, for a method that cannot be merged, a folder in use, and weights whose
    rounding undoes more than LOST of what the adapter does, unless `force`.
    """
    from transformers.utils import logging

    out = new_folder(out)
    run = open_run(run_folder)
    model, device = run.model, next(run.model.parameters()).device
    ids = torch.randint(len(run.tokenizer), (4, 32), generator=torch.Generator().manual_seed(0)).to(device)
    adapted = _logits(model, ids)
    with ts.disabled(model):
        effect = (_logits(model, ids) - adapted).abs().mean().item()
    packed_before = set(packed_weights(model))
    ts.merge(model, unload=True)
    if pruned_units(model) and (format is not None or (packed_before and packed_before <= set(packed_weights(model)))):
        raise TunesmithError("a model that is both pruned and packed has no file format; merge the run without rounding")
    if format is not None:
        quantize(dequantize(model), format)
    elif not packed_before <= set(packed_weights(model)):  # the method leaves matrices
        dequantize(model)
    logging.disable_progress_bar()
    with atomic_folder(out) as folder:
        if packed_weights(model):
            save(model, folder, None)
        elif pruned_units(model):
            pruning.save(model, folder, run.recipe.model)
        else:
            model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        written, _ = base.load(str(folder), run.task.name, run.labels, run.recipe.dtype)
        error = (_logits(written.to(device), ids) - adapted).abs()
        lost = error.mean().item() / max(effect, 1e-12)
        if format is not None and lost > LOST and not force:
            raise TunesmithError(
                f"rounding the merged weights to {formats.parse(format).format} undoes {lost:.0%} of what the adapter does (mean error of the logits {error.mean():.2g}, "
                f"largest {error.max():.2g}); merge without rounding, take more bits, or force it"
            )
    return {
        "folder": str(out), "max_error": error.max().item(), "mean_error": error.mean().item(), "largest_logit": adapted.abs().max().item(), "lost": lost,
    }  # fmt: skip


def export_adapter(run_folder: str | Path, out: str | Path, format: str = "peft") -> Path:
    """Write a run's adapter alone. Raises `TunesmithError` for an unknown format, or a method the format cannot hold."""
    if format not in FORMATS:
        raise TunesmithError(f"unknown format {format!r}{nearest(format, FORMATS)}; it is one of {', '.join(FORMATS)}")
    out = new_folder(out)
    ts.save(open_run(run_folder).model, out, format=format)
    return out


def _logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def new_folder(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TunesmithError(f"{out} exists already; choose a new folder")
    return out
