"""x Wᵀ + b with a low-rank change: LoRA, DoRA, and a pair of factors for each part of the rows."""

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, plainly, product, shaped


def weight_norm(W, A, B, scale):
    """‖W + scale·B A‖ of each row, (out,), without forming the sum: ‖W‖² + 2s Σ B∘(W Aᵀ) + s² Σ (B (A Aᵀ))∘B."""
    dtype = torch.promote_types(B.dtype, torch.float32)
    inner = (W @ A.T.to(W.dtype)).to(dtype).mul_(2 * scale)  # (out, r)
    A, B = A.to(dtype), B.to(dtype)
    inner.addmm_(B, A @ A.T, alpha=scale * scale)
    squared = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, dtype)).square_()
    return squared.add_((inner * B).sum(1)).clamp_(min=0).sqrt_().to(dtype)


class _LowRankLinear(torch.autograd.Function):
    """y = c·(x Wᵀ + s·(x Aᵀ) Bᵀ) + b with c = m/‖W + s·B A‖, or 1 without m.

    Keeps x (or its recipe), W, A, B, the (N, r) product x Aᵀ and, with m, the output.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, m, x_adapter, scale, norm, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows = as_rows(x, dtype)
            inner = (rows if x_adapter is None else as_rows(x_adapter, dtype)) @ A.T.to(dtype)
            bias = None if b is None or m is not None else b.to(dtype)
            weight = W.to(dtype)
            y = linear(rows, weight, bias, training)
            y.addmm_(inner, B.T.to(dtype), alpha=scale)
            if m is not None:
                norm = weight_norm(W, A, B, scale) if norm is None else norm
                y.mul_((m / norm).to(dtype))
                if b is not None:
                    y.add_(b.to(dtype))
        out = shaped(y, x)
        need_W, need_A, need_m = ctx.needs_input_grad[1], ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        ctx.recipe, inputs = recipe
        ctx.scale, ctx.dtype = scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, A, B, m, x_adapter)]
        ctx.save_for_backward(
            W, b if need_m else None, A, B, m, norm, inner, out if need_m else None,
            x_adapter if need_A else None,
            *(inputs if need_W or need_m or (need_A and x_adapter is None) else ()),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, g):
        W, b, A, B, m, norm, inner, out, x_adapter, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B, need_m, need_adapter = ctx.needs_input_grad[:7]
        scale, dtype, split = ctx.scale, ctx.dtype, ctx.like[6] is not None
        gx = gW = gb = gA = gB = gm = g_adapter = None
        with no_autocast(g):
            x = as_rows(kept(ctx, inputs), dtype) if inputs else None
            g = as_rows(g, dtype)
            if need_b:
                gb = g.sum(0)
            if need_m:
                gm = _magnitude_gradient(g, as_rows(out, dtype), x, W, b, B, m, norm, inner, scale)
            if norm is not None:
                g = g * (m / norm).to(dtype)
            if need_B:
                gB = (inner.T @ g).mul_(scale).T
            if need_A or need_adapter or (need_x and not split):
                g_inner = product(g, B.to(dtype)).mul_(scale)
            if need_A:
                gA = g_inner.T @ (as_rows(x_adapter, dtype) if split else x)
            if need_x:
                gx = product(g, W.to(dtype))
                if not split:
                    gx.addmm_(g_inner, A.to(dtype))
            if need_adapter:
                g_adapter = g_inner @ A.to(dtype)
            if need_W:
                gW = g.T @ x
        grads = gx, gW, gb, gA, gB, gm, g_adapter
        return *as_given(grads, ctx.like), None, None, None, None


def _magnitude_gradient(g, y, x, W, b, B, m, norm, inner, scale):
    """Σ g∘z / ‖V‖ over the rows, where the output y = z·m/‖V‖ + b gives z but for outputs with m = 0."""
    y = y if b is None else y - b.to(y.dtype)
    gm = (g * y).sum(0).to(norm.dtype) / m
    if (dead := m == 0).any():
        z = x @ W[dead].T.to(x.dtype) + scale * (inner @ B[dead].T.to(x.dtype))
        gm[dead] = (g[:, dead] * z).sum(0).to(norm.dtype) / norm[dead]
    return gm


def lowrank_linear(x, W, b, A, B, scale: float, x_adapter=None) -> torch.Tensor:
    """y = x Wᵀ + b + scale·(x Aᵀ) Bᵀ, where the adapter reads `x_adapter` (x after dropout) if that is given.

    x (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r) → (..., out). A and B may have another dtype than
    x: they are cast to it, and their gradients back. Hu et al. 2021, LoRA, equation 3.
    """
    if plainly(x, W):
        inner = F.linear(x if x_adapter is None else x_adapter, A.to(x.dtype))
        return F.linear(x, W, b) + F.linear(inner, B.to(x.dtype)) * scale
    return _LowRankLinear.apply(x, W, b, A, B, None, x_adapter, scale, None, Recipe.of(x), torch.is_grad_enabled())


def dora_linear(x, W, b, A, B, scale: float, m, x_adapter=None, norm=None) -> torch.Tensor:
    """y = m/‖W + scale·B A‖ · (x Wᵀ + scale·(x Aᵀ) Bᵀ) + b, the norm of each row being a constant in backward.

    Shapes as in `lowrank_linear`, m (out,), `norm` (out,) if it is known. Liu et al. 2024, DoRA, equations 5 and 11.
    The output is kept for backward, so changing it in place raises torch's error about that.
    """
    if plainly(x, W):
        with torch.no_grad():
            norm = weight_norm(W, A, B, scale) if norm is None else norm
        inner = F.linear(x if x_adapter is None else x_adapter, A.to(x.dtype))
        y = (m / norm).to(x.dtype) * (F.linear(x, W) + F.linear(inner, B.to(x.dtype)) * scale)
        return y if b is None else y + b
    return _LowRankLinear.apply(x, W, b, A, B, m, x_adapter, scale, norm, Recipe.of(x), torch.is_grad_enabled())


class _GroupedLowRankLinear(torch.autograd.Function):
    """y_i = x_i Wᵀ + b + s·(x_i A_iᵀ) B_iᵀ for x_i the i-th of g equal parts of the rows.

    Keeps x (or its recipe), W, A, B and the (N, r) products x_i A_iᵀ.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, scale, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows, weight, bias = as_rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = linear(rows, weight, bias, training)
            inner = rows.unflatten(0, (len(A), -1)) @ A.mT.to(dtype)  # (g, n, r)
            y.unflatten(0, (len(A), -1)).baddbmm_(inner, B.mT.to(dtype), alpha=scale)
        ctx.recipe, inputs = recipe
        ctx.scale, ctx.dtype = scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, A, B)]
        ctx.save_for_backward(W, A, B, inner, *(inputs if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, A, B, inner, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B = ctx.needs_input_grad[:5]
        dtype, groups = ctx.dtype, (len(A), -1)
        gx = gW = gb = gA = gB = None
        with no_autocast(g):
            x = as_rows(kept(ctx, inputs), dtype) if inputs else None
            g = as_rows(g, dtype)
            parts = g.unflatten(0, groups)
            if need_B:
                gB = (inner.mT @ parts).mul_(ctx.scale).mT
            if need_A or need_x:
                g_inner = (parts @ B.to(dtype)).mul_(ctx.scale)
            if need_A:
                gA = g_inner.mT @ x.unflatten(0, groups)
            if need_x:
                gx = product(g, W.to(dtype))
                gx.unflatten(0, groups).baddbmm_(g_inner, A.to(dtype))
            if need_W:
                gW = g.T @ x
            if need_b:
                gb = g.sum(0)
        grads = gx, gW, gb, gA, gB
        return *as_given(grads, ctx.like), None, None, None


def grouped_change(x, A, B, scale: float) -> torch.Tensor:
    """scale·(x_i A_iᵀ) B_iᵀ: what `grouped_lowrank_linear` adds to x Wᵀ + b, as a plain expression."""
    parts = x.reshape(len(A), -1, x.shape[-1])
    return ((parts @ A.mT.to(x.dtype)) @ B.mT.to(x.dtype) * scale).reshape(*x.shape[:-1], B.shape[1])


def grouped_lowrank_linear(x, W, b, A, B, scale: float) -> torch.Tensor:
    """y = x Wᵀ + b + scale·(x A_iᵀ) B_iᵀ, where the i-th of g equal parts of x's first dimension has its own factors.

    x (rows, ..., in) with g a divisor of rows, W (out, in), b (out,) or None, A (g, r, in), B (g, out, r) → (rows, ..., out).
    """
    if plainly(x, W):
        return F.linear(x, W, b) + grouped_change(x, A, B, scale)
    return _GroupedLowRankLinear.apply(x, W, b, A, B, scale, Recipe.of(x), torch.is_grad_enabled())
