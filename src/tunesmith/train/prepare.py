"""A model made ready for training, and the proof that every adapter learns."""

from typing import Any

from torch import nn

import tunesmith as ts

from ..engine.model import check_gradients
from ..engine.sites import backbone, head_paths
from ..engine.tokens import positions
from ..errors import TunesmithError


def with_head(method: Any, model: nn.Module) -> Any:
    """The method's config with the model's head, which is new, among the modules trained and saved in full."""
    return method.model_copy(update={"modules_to_save": list(dict.fromkeys([*method.modules_to_save, *head_paths(model)]))})


def room(model: nn.Module, method: Any, most: int) -> int:
    """Tokens of the longest text, up to `most`: a table of positions has to hold the method's virtual tokens too.

    Raises `TunesmithError` where these leave no position for the text.
    """
    size = positions(backbone(model))
    if size is None:
        return most
    if size - method.front < 2:
        raise TunesmithError(f"{method.front} virtual tokens do not fit before a text: {type(model).__name__} has {size} positions; choose fewer")
    return min(most, size - method.front)


def prepare(model: nn.Module, gradient_checkpointing: bool = False) -> nn.Module:
    """Make an adapted model ready for training, in place: training mode, and activation recomputation where asked.

    Recomputation is the non-reentrant kind: the reentrant one drops the gradient of every adapter whose input needs none.
    Raises `TunesmithError` when nothing is trained, or when the model cannot recompute.
    """
    if not ts.trainable(model):
        raise TunesmithError("nothing to train: call adapt(model, method) before prepare(model)")
    if gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise TunesmithError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing=false")
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def assert_learning(model: nn.Module) -> str | None:
    """After a backward pass: a warning naming adapted modules that got no gradient (an unused module), or None.

    Raises `TunesmithError` when none got any.
    """
    dead, sites = check_gradients(model), ts.summary(model).sites
    if not dead:
        return None
    if len(dead) >= len(sites):
        raise TunesmithError(
            "no adapter got a gradient in the first step, so nothing would be learned; if gradient checkpointing was switched on "
            "by hand, use tunesmith.train.prepare(model, gradient_checkpointing=True) instead"
        )
    some = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
    return f"warning: {len(dead)} of {len(sites)} adapted modules got no gradient in the first step: {some}"


def preview(model_name: str, method: Any, targets: list[str] | None = None) -> list[dict]:
    """What a method would adapt in a model: [{"path", "type", "shape", "method", "trainable"}], one for each module."""
    from .. import models
    from ..engine.model import hubs

    try:
        model, _ = models.load(model_name, "lm")
    except TunesmithError:
        model, _ = models.load(model_name, "classification", labels=["a", "b"])  # an encoder
    ts.adapt(model, method, targets=targets)
    places = {path: hub.site for path, hub in hubs(model).items()}
    return [
        {
            "path": site.path or type(model).__name__,
            "type": type(places[site.path].holder).__name__,
            "shape": list(places[site.path].parameter.shape) if places[site.path].names else [],
            "method": site.method,
            "trainable": site.trainable,
        }
        for site in ts.summary(model).sites
    ]
