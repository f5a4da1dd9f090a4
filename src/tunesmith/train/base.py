"""The base model of a run, its weights packed where the recipe or the model's own folder says so."""

from typing import Any

from .. import models, pruning
from ..errors import TunesmithError
from ..methods import Method
from ..quantize.model import footprint, is_quantized, original_of, quantize, restore
from ..quantize.packed import PackedWeight


def load(name: str, task: str, labels: list[str] | None = None, dtype: str = "float32", seed: int = 0, format: Any = None, method: Method | None = None, units: pruning.Units | None = None, keep: bool = True):
    """`models.load`, with weights rounded to the number format `format`, or packed as the folder `name` holds them.

    `units`: which units of the whole model a pruned one keeps; a folder that holds a pruned model says so itself. `method`: what is
    to be attached to the model; with `keep`, the packed weights know what they were made from where it starts from that.
    Raises `TunesmithError` for a format on top of a folder that is quantised already, for pruning such a model, and for a method
    that starts from the original of weights that have none.
    """
    model, tokenizer = models.load(name, task, labels, dtype, seed)
    if pruning.is_pruned(name):
        pruning.restore(model, name)
    if units:
        if is_quantized(name):
            raise TunesmithError(f"{name} is quantised, and packed weights lose no rows; prune the original model with quantize in the recipe")
        pruning.prune(model, pruning.left(model, units))
    if is_quantized(name):
        if format:
            raise TunesmithError(f"{name} is quantised already; leave quantize out of the recipe, or name the original model")
        restore(model, name)
        if keep and method and method.starts_from_original:
            if (source := original_of(name)) is None:
                raise TunesmithError(f"{method.method} starts from what rounding took from the original weights, and {name} holds those that training ended with; take lora, or another base")
            original = dict(models.load(source, task, labels, dtype, seed)[0].named_parameters())
            for path, weight in model.named_parameters():
                if isinstance(weight, PackedWeight):
                    weight.original = original[path].detach()
    elif format:
        quantize(model, format, **({"keep": keep and method.starts_from_original, "rounding": method.rounding} if method else {}))
    return model, tokenizer


def described(model) -> list[str]:
    """A line about what was cut out of the model, and one about packed weights."""
    lines, found = [pruning.described(model)] if pruning.pruned_units(model) else [], footprint(model)
    if found["layers"]:
        lines.append(f"{found['layers']} layers in {found['bits_per_weight']:.2f} bits per weight: {found['bytes'] / 2**20:.1f} MiB; the whole model {found['total_bytes'] / 2**20:.1f} MiB")
    return lines
