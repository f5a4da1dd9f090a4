"""x W̃ᵀ + b where W̃ differs from W in a few places: nothing is kept or computed for the others."""

import contextlib
import warnings

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, plainly, product, shaped


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


def _with(W, v, index, dtype):
    """(W + v at the flat positions, None) in `dtype`, or (W, v there and 0 elsewhere) where that would round v away."""
    wide = torch.promote_types(W.dtype, v.dtype)
    if dtype == wide:
        return W.to(wide).flatten().index_add(0, index, v.to(wide)).view(W.shape), None
    return W.to(dtype), torch.zeros(W.numel(), dtype=dtype, device=W.device).index_add_(0, index, v.to(dtype)).view(W.shape)


def sampled(g, x, index):
    """gᵀ x at flat positions, ascending: g (N, out), x (N, in) → (K,). Forms the whole of it where that is cheaper."""
    out, size = g.shape[1], x.shape[1]
    if g.is_cuda or g.dtype not in (torch.float32, torch.float64) or len(index) > out * size * SAMPLED:
        return (g.T @ x).flatten()[index]
    rows = torch.searchsorted(index, torch.arange(out + 1, dtype=index.dtype, device=g.device) * size).to(index.dtype)
    with _quiet():
        pattern = torch.sparse_csr_tensor(rows, index % size, g.new_zeros(len(index)), (out, size), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, g.T, x, beta=0).values()


SAMPLED = 0.1  # the share of the matrix up to which single entries are the faster


@contextlib.contextmanager
def _quiet():
    """torch says once that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield


class _EntriesLinear(torch.autograd.Function):
    """y = x (W + v at index)ᵀ + b. Keeps x (or its recipe), W, v and index; makes the sum again in backward."""

    @staticmethod
    def forward(ctx, x, W, b, v, index, watch, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows = as_rows(x, dtype)
            V, change = _with(W, v, index, dtype)
            y = linear(rows, V, None if b is None else b.to(dtype), training)
            if change is not None:
                y.addmm_(rows, change.T)
        ctx.recipe, inputs = recipe
        ctx.dtype, ctx.watch = dtype, watch
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, v)]
        ctx.save_for_backward(W, v, index, *(inputs if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, v, index, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_v = ctx.needs_input_grad[:4]
        gx = gW = gb = gv = None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            if need_x:
                V, change = _with(W, v, index, ctx.dtype)
                gx = product(g, V)
                if change is not None:
                    gx.addmm_(g, change)
            if need_b:
                gb = g.sum(0)
            if inputs:
                x = as_rows(kept(ctx, inputs), ctx.dtype)
            if need_W or ctx.watch:
                gW = g.T @ x
            if ctx.watch:
                ctx.watch(gW)
            if need_v:
                gv = sampled(g, x, index) if gW is None else gW.flatten()[index]
        return *as_given((gx, gW if need_W else None, gb, gv), ctx.like), None, None, None, None


def entries_change(x, v, index, out: int) -> torch.Tensor:
    """What v at the flat positions index of a matrix (out, in) adds to x Wᵀ: x (..., in), v (K,) → (..., out)."""
    v = v.to(x.dtype)
    return F.linear(x, v.new_zeros(out * x.shape[-1]).index_add(0, index, v).view(out, -1))


def entries_linear(x, W, b, v, index, watch=None) -> torch.Tensor:
    """y = x W̃ᵀ + b for W̃ = W with v (K,) added at the flat positions index (K,), ascending.

    x (..., in), W (out, in), b (out,) or None → (..., out). In a lower precision than v's, v is applied by a product of
    its own, which the magnitude of W does not round away. `watch` is called in backward with the gradient of all of W̃.
    """
    if plainly(x, W):
        V, change = _with(W, v, index, compute_dtype(x))
        if watch and v.requires_grad:
            (V if change is None else change).register_hook(watch)
        y = F.linear(x, V.to(x.dtype), b)
        return y if change is None else y + F.linear(x, change)
    return _EntriesLinear.apply(x, W, b, v, index, watch, Recipe.of(x), torch.is_grad_enabled())


class _RowsLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with x Dᵀ added to the outputs S. Keeps x (or its recipe), W, D and S; needs of g the outputs S."""

    @staticmethod
    def forward(ctx, x, W, b, D, S, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows = as_rows(x, dtype)
            y = linear(rows, W.to(dtype), None if b is None else b.to(dtype), training)
            y.index_add_(1, S, rows @ D.T.to(dtype))
        ctx.recipe, inputs = recipe
        ctx.dtype = dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, D)]
        ctx.save_for_backward(W, D, S, *(inputs if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, D, S, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_D = ctx.needs_input_grad[:4]
        gx = gW = gb = gD = None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            chosen = g[:, S]
            if need_x:
                gx = product(g, W.to(ctx.dtype)).addmm_(chosen, D.to(ctx.dtype))
            if need_b:
                gb = g.sum(0)
            if inputs:
                x = as_rows(kept(ctx, inputs), ctx.dtype)
            if need_W:
                gW = g.T @ x
            if need_D:
                gD = chosen.T @ x
        return *as_given((gx, gW, gb, gD), ctx.like), None, None, None


def rows_change(x, D, S, out: int) -> torch.Tensor:
    """x Dᵀ at the outputs S of `out`, 0 elsewhere: x (..., in), D (r, in), S (r,) → (..., out)."""
    return x.new_zeros(*x.shape[:-1], out).index_add(-1, S, F.linear(x, D.to(x.dtype)))


def rows_linear(x, W, b, D, S) -> torch.Tensor:
    """y = x Wᵀ + b with x Dᵀ added to the outputs S: the rows S of W, plus D.

    x (..., in), W (out, in), b (out,) or None, D (r, in), S (r,) distinct indices → (..., out).
    """
    if plainly(x, W):
        return F.linear(x, W, b) + rows_change(x, D, S, len(W))
    return _RowsLinear.apply(x, W, b, D, S, Recipe.of(x), torch.is_grad_enabled())
