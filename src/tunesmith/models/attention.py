"""Attention whose gradients on a CPU are computed in float32: torch's kernel for them in lower precisions is many times as slow."""

from contextlib import contextmanager

import torch
from torch import Tensor


class _Attention(torch.autograd.Function):
    """call(q, k, v), with the gradients of the same in float32. Keeps q, k and v alone."""

    @staticmethod
    def forward(ctx, call, *qkv):
        ctx.call = call
        ctx.save_for_backward(*qkv)
        return call(*qkv)

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors
        qkv = [t.detach().float().requires_grad_() for t in saved]
        with torch.enable_grad():
            y = ctx.call(*qkv)
        return None, *(new.to(t.dtype) for new, t in zip(torch.autograd.grad(y, qkv, g.to(y.dtype)), saved, strict=True))


@contextmanager
def quick_attention():
    """Within the block, Hugging Face models in bfloat16 or float16 on a CPU go backward through attention several times as fast.

    Outputs are the same bit for bit, gradients those of attention in float32; attention with dropout is left alone.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
        others = [t for t in (attention_mask, *kwargs.values()) if isinstance(t, Tensor)]
        recording = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if not recording or query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16) or dropout or any(t.requires_grad for t in others):
            return plain(module, query, key, value, attention_mask, dropout=dropout, **kwargs)

        def call(q, k, v):
            mask = attention_mask.to(q.dtype) if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
            return plain(module, q, k, v, mask, **kwargs)[0]

        return _Attention.apply(call, query, key, value), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
