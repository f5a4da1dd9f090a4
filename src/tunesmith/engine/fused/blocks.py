"""x Wᵀ + b with a matrix shared by the blocks of x."""

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, plainly, product, shaped


def _block_sum(x: torch.Tensor, r: int) -> torch.Tensor:
    """Σ_g x[..., g·r : (g+1)·r], (..., r), the last block filled up with zeros."""
    whole = x.shape[-1] // r * r
    total = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
    return total if whole == x.shape[-1] else total + F.pad(x[..., whole:], (0, whole + r - x.shape[-1]))


def _add_tiled(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """x (N, in) += h (N, r) repeated along the inputs, in place: the transpose of `_block_sum`."""
    r = h.shape[1]
    whole = x.shape[1] // r * r
    x[:, :whole].unflatten(1, (-1, r)).add_(h[:, None])
    x[:, whole:].add_(h[:, : x.shape[1] - whole])
    return x


def shared_block(x, D, out: int) -> torch.Tensor:
    """(Σ_g x_g) D for the r-wide blocks x_g of x (..., in), D (r, m), repeated along the outputs → (..., out)."""
    return (_block_sum(x, len(D)) @ D.to(x.dtype)).tile(out // D.shape[1])


class _BlockSumLinear(torch.autograd.Function):
    """y = x Wᵀ + b + S D, S (N, r) the sum of x's r-wide blocks, S D (N, m) repeated along the outputs.

    Keeps W, D and S; x (or its recipe) only where W has a gradient.
    """

    @staticmethod
    def forward(ctx, x, W, b, D, x_adapter, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, D, x_adapter)]
            ctx.recipe, inputs = recipe
            ctx.dtype, m = dtype, D.shape[1]
            rows, weight, bias = as_rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = linear(rows, weight, bias, training)
            S = _block_sum(rows if x_adapter is None else as_rows(x_adapter, dtype), len(D))
            y.addmm_(S, D.to(dtype)) if m == len(W) else y.unflatten(1, (-1, m)).add_((S @ D.to(dtype))[:, None])
        ctx.save_for_backward(W, D, S if ctx.needs_input_grad[3] else None, *(inputs if ctx.needs_input_grad[1] else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, D, S, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_D, need_adapter = ctx.needs_input_grad[:5]
        dtype, m, split = ctx.dtype, D.shape[1], ctx.like[4] is not None
        gx = gW = gb = gD = g_adapter = None
        with no_autocast(g):
            g = as_rows(g, dtype)
            shared = g if m == len(W) else g.unflatten(1, (-1, m)).sum(1)
            if need_b:
                gb = g.sum(0)
            if need_D:
                gD = S.T @ shared
            if need_adapter or (need_x and not split):
                g_sum = product(shared, D.T.to(dtype))
            if need_x:
                gx = product(g, W.to(dtype))
                if not split:
                    _add_tiled(gx, g_sum)
            if need_adapter:
                g_adapter = _add_tiled(g.new_zeros(len(g), W.shape[1]), g_sum)
            if need_W:
                gW = g.T @ as_rows(kept(ctx, inputs), dtype)
        grads = gx, gW, gb, gD, g_adapter
        return *as_given(grads, ctx.like), None, None


def block_sum_linear(x, W, b, D, x_adapter=None) -> torch.Tensor:
    """y = x Wᵀ + b + (Σ_g x_g) D for the r-wide blocks x_g of x, or of `x_adapter` (x after dropout) if that is given.

    x (..., in), W (out, in), b (out,) or None, D (r, m) with r ≤ in and m a divisor of out, over which the last term is
    repeated → (..., out). D may have another dtype than x. Kang & Yin 2024, MiSS, equation 6.
    """
    if plainly(x, W):
        return F.linear(x, W, b) + shared_block(x if x_adapter is None else x_adapter, D, len(W))
    return _BlockSumLinear.apply(x, W, b, D, x_adapter, Recipe.of(x), torch.is_grad_enabled())
