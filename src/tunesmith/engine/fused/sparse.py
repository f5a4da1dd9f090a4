"""x W̃ᵀ + b where W̃ differs from W in a few rows, columns or single entries: no gradient exists of the others.

A change is `scale`·v added at `index`: to rows (dim 0, v (r, in)), to columns (dim 1, v (out, r)) or at flat positions, ascending
(dim None, v (K,)).
"""

import contextlib
import warnings

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, plainly, product, shaped

SAMPLED = 0.1  # the share of the matrix up to which the gradients of single entries are the faster


def changed(W, v, index, dim, scale=1.0) -> torch.Tensor:
    """W (out, in) with the change, in the wider of the two dtypes."""
    dtype = torch.promote_types(W.dtype, v.dtype)
    W, v = W.to(dtype), v.to(dtype)
    return W.index_add(dim, index, v, alpha=scale) if dim is not None else W.flatten().index_add(0, index, v, alpha=scale).view(W.shape)


def _dense(v, index, out, size) -> torch.Tensor:
    return v.new_zeros(out * size).index_add(0, index, v).view(out, size)


def sparse_change(x, v, index, dim, out: int, scale=1.0) -> torch.Tensor:
    """What a change of a matrix (out, in) adds to x Wᵀ, by a product of its own: x (..., in) → (..., out)."""
    v = v.to(x.dtype)
    if dim == 1:
        return F.linear(x[..., index], v) * scale
    if dim == 0:
        chosen = F.linear(x, v)  # under autocast of another dtype than x
        return chosen.new_zeros(*x.shape[:-1], out).index_add(-1, index, chosen, alpha=scale)
    return F.linear(x, _dense(v, index, out, x.shape[-1])) * scale


def _add_gradient(gx, g, v, index, dim, scale) -> None:
    """gx (N, in) += scale·g Δ for g (N, out)."""
    v = v.to(g.dtype)
    if dim == 1:
        gx.index_add_(1, index, g @ v, alpha=scale)
    elif dim == 0:
        gx.addmm_(g[:, index], v, alpha=scale)
    else:
        gx.addmm_(g, _dense(v, index, g.shape[1], gx.shape[1]), alpha=scale)


def sampled(g, x, index) -> torch.Tensor:
    """gᵀ x at flat positions: g (N, out), x (N, in) → (K,). Forms the whole of it where that is cheaper."""
    out, size = g.shape[1], x.shape[1]
    if g.is_cuda or g.dtype not in (torch.float32, torch.float64) or len(index) > out * size * SAMPLED:
        return (g.T @ x).flatten()[index]
    rows = torch.searchsorted(index, torch.arange(out + 1, dtype=index.dtype) * size).to(index.dtype)
    with _quiet():
        pattern = torch.sparse_csr_tensor(rows, index % size, g.new_zeros(len(index)), (out, size), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, g.T, x, beta=0).values()


@contextlib.contextmanager
def _quiet():
    """torch says once that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield


class _SparseLinear(torch.autograd.Function):
    """y = x W̃ᵀ + b. Keeps W, v, index and x (or its recipe), of which only the columns that train; makes W̃ again in backward."""

    @staticmethod
    def forward(ctx, x, W, b, v, index, dim, scale, watch, recipe, training):
        ctx.dtype = dtype = compute_dtype(x)
        ctx.formed = dtype == torch.promote_types(W.dtype, v.dtype)
        ctx.how, ctx.watch = (dim, scale), watch
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, v)]
        whole = ctx.needs_input_grad[1] or watch or (dim != 1 and ctx.needs_input_grad[3])
        with no_autocast(x):
            rows = as_rows(x, dtype)
            chosen = rows[:, index] if dim == 1 else None
            y = linear(rows, changed(W, v, index, dim, scale) if ctx.formed else W.to(dtype), None if b is None else b.to(dtype), training)
            if not ctx.formed:
                y += sparse_change(rows, v, index, dim, len(W), scale)
        ctx.recipe, inputs = recipe
        ctx.save_for_backward(W, v, index, chosen, *(inputs if whole else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, v, index, chosen, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_v = ctx.needs_input_grad[:4]
        (dim, scale), gx, gW, gb, gv = ctx.how, None, None, None, None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            if need_x:
                gx = product(g, changed(W, v, index, dim, scale) if ctx.formed else W.to(ctx.dtype))
                if not ctx.formed:
                    _add_gradient(gx, g, v, index, dim, scale)
            if need_b:
                gb = g.sum(0)
            x = as_rows(kept(ctx, inputs), ctx.dtype) if inputs else None
            if need_W or ctx.watch:
                gW = g.T @ x
            if ctx.watch:
                ctx.watch(gW)
            if need_v and dim is None:
                gv = sampled(g, x, index) if gW is None else gW.flatten()[index]
            elif need_v:
                gv = (chosen.T @ g).T if dim == 1 else g[:, index].T @ x
            if need_v and scale != 1:
                gv = gv * scale
        return *as_given((gx, gW if need_W else None, gb, gv), ctx.like), *[None] * 6


def sparse_linear(x, W, b, v, index, dim, scale=1.0, watch=None) -> torch.Tensor:
    """y = x W̃ᵀ + b, W̃ being W with a change: x (..., in), W (out, in), b (out,) or None → (..., out).

    In a lower precision than v's, the change has a product of its own, which the magnitude of W does not round away.
    `watch` is called in backward with the gradient of all of W̃ (out, in), which then exists while it is.
    """
    if not plainly(x, W):
        return _SparseLinear.apply(x, W, b, v, index, dim, scale, watch, Recipe.of(x), torch.is_grad_enabled())
    if watch and v.requires_grad:
        full = changed(torch.zeros_like(W, dtype=v.dtype), v, index, dim, scale)
        full.register_hook(watch)
        return F.linear(x, W, b) + F.linear(x, full.to(x.dtype))
    return F.linear(x, W, b) + sparse_change(x, v, index, dim, len(W), scale)
