"""x Wᵀ + b where W is no plain tensor but something that is made into one by each use."""

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, product, shaped, traced


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b. Keeps W as it is stored, and x (or its recipe) only where W has a gradient."""

    @staticmethod
    def forward(ctx, x, W, b, recipe):
        ctx.dtype = dtype = compute_dtype(x)
        with no_autocast(x):
            y = linear(as_rows(x, dtype), W.dequantize().to(dtype), None if b is None else b.to(dtype), True)
        ctx.recipe, inputs = recipe
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b)]
        ctx.save_for_backward(W, *(inputs if ctx.needs_input_grad[1] else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, *inputs = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            gx = product(g, W.dequantize().to(ctx.dtype)) if need_x else None
            gW = g.T @ as_rows(kept(ctx, inputs), ctx.dtype) if need_W else None
            gb = g.sum(0) if need_b else None
        return *as_given((gx, gW, gb), ctx.like), None


def frozen_linear(x, W, b) -> torch.Tensor:
    """y = x Wᵀ + b for a W (out, in) with a method `dequantize`, whose result lives only while it is used.

    x (..., in), b (out,) or None → (..., out).
    """
    if traced() or not torch.is_grad_enabled():
        return F.linear(x, W.dequantize().to(compute_dtype(x)), b)
    return _FrozenLinear.apply(x, W, b, Recipe.of(x))
