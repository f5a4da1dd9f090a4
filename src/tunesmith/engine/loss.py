"""Next-token cross-entropy of a Hugging Face language model without the logits of the whole batch."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .fused import linear_cross_entropy
from .lean import lean

_checked: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def causal_lm_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, count=None) -> Tensor:
    """Mean cross-entropy of `labels` (B, T), -100 where there is none, shifted by one, given `input_ids` (B, T).

    The value and gradients of `model(input_ids, attention_mask, labels=labels).loss`, in a fraction of the memory: the
    logits exist for a few positions at a time. `count` divides the sum instead of the number of labels, for a batch in
    several parts. Models whose logits are more than their head applied to their last hidden states (soft caps, scales,
    virtual tokens) are found out by trying once, and get their logits whole. Makes the model `lean`.
    """
    lean(model)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    call = {"input_ids": input_ids, "attention_mask": attention_mask}
    head = _head(model, input_ids)
    if head is None:
        logits = model(**call, use_cache=False).logits
        return _mean(F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum"), labels, count)
    hidden = model.base_model(**call, use_cache=False)[0]
    if type(head) is nn.Linear and not _hooked(head):
        return linear_cross_entropy(hidden, head.weight, labels, head.bias, count=count)

    state = vars(head.tunesmith.state) if "tunesmith" in head._modules else {}
    then = {key: state[key] for key in ("active", "rows", "enabled") if key in state}

    def part(h, target):
        now = {key: state[key] for key in then}
        state.update(then)  # backward, which computes this again, may come when other adapters are in use
        try:
            return F.cross_entropy(head(h).flatten(0, 1).float(), target.flatten(), reduction="sum")
        finally:
            state.update(now)

    step = max(1, 256 // len(hidden))  # every part has all rows, which may each have their own adapter
    parts = zip(hidden.split(step, 1), labels.split(step, 1), strict=True)
    return _mean(sum(checkpoint(part, h, target, use_reentrant=False) for h, target in parts), labels, count)


def _mean(total: Tensor, labels: Tensor, count) -> Tensor:
    return total / ((labels != -100).sum() if count is None else count)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _head(model: nn.Module, input_ids: Tensor) -> nn.Module | None:
    """The head whose output on the backbone's hidden states is the model's logits, if there is one."""
    backbone = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if backbone is model or head is None:
        return None
    # Adapters change classes: a model looked at before it got or lost one is looked at again.
    key = type(model), type(backbone), type(head)
    if _checked.get(model, (None, None))[0] != key:
        _checked[model] = key, _is_head(model, backbone, head, input_ids[:, :2])
    return head if _checked[model][1] else None


def _is_head(model: nn.Module, backbone: nn.Module, head: nn.Module, ids: Tensor) -> bool:
    hidden = []
    hook = backbone.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    cuda = [ids.device] if ids.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            logits = model(input_ids=ids, use_cache=False).logits
            return len(hidden) == 1 and hidden[0].shape[:2] == ids.shape and torch.equal(head(hidden[0]).to(logits.dtype), logits)
    finally:
        hook.remove()
