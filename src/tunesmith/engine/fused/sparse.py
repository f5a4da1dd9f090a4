"""x W̃ᵀ + b where W̃ differs from W in a few places: nothing is kept or computed for the others."""

import torch
import torch.nn.functional as F

from .common import as_given, as_rows, compute_dtype, linear, no_autocast, plainly, product, shaped


class _ColumnsLinear(torch.autograd.Function):
    """y = x Wᵀ + s·x_S Dᵀ + b. Keeps W, D, S and x_S, the columns S of x."""

    @staticmethod
    def forward(ctx, x, W, b, D, S, scale, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows = as_rows(x, dtype)
            chosen = rows[:, S]
            y = linear(rows, W.to(dtype), None if b is None else b.to(dtype), training)
            y.addmm_(chosen, D.T.to(dtype), alpha=scale)
        ctx.scale, ctx.dtype = scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, D)]
        ctx.save_for_backward(W, D, S, chosen, x if ctx.needs_input_grad[1] else None)
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, D, S, chosen, x = ctx.saved_tensors
        need_x, need_W, need_b, need_D = ctx.needs_input_grad[:4]
        gx = gW = gb = gD = None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            if need_x:
                gx = product(g, W.to(ctx.dtype))
                gx.index_add_(1, S, product(g, D.to(ctx.dtype)), alpha=ctx.scale)
            if need_W:
                gW = g.T @ as_rows(x, ctx.dtype)
            if need_b:
                gb = g.sum(0)
            if need_D:
                gD = (g.T @ chosen).mul_(ctx.scale)
        return *as_given((gx, gW, gb, gD), ctx.like), None, None, None


def columns_change(x, D, S, scale: float) -> torch.Tensor:
    """scale·x_S Dᵀ, what D at the columns S adds to x Wᵀ: x (..., in), D (out, r), S (r,) → (..., out)."""
    return F.linear(x[..., S], D.to(x.dtype)) * scale


def columns_linear(x, W, b, D, S, scale: float) -> torch.Tensor:
    """y = x Wᵀ + scale·x_S Dᵀ + b: the columns S of W, plus scale·D.

    x (..., in), W (out, in), b (out,) or None, D (out, r), S (r,) distinct indices → (..., out).
    """
    if plainly(x, W):
        return F.linear(x, W, b) + columns_change(x, D, S, scale)
    return _ColumnsLinear.apply(x, W, b, D, S, scale, torch.is_grad_enabled())
