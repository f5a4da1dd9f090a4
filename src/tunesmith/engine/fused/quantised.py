"""x W_qᵀ + bias where W_q is the point of an integer grid that is nearest to W + α·B A: training a weight that ends in few bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Recipe, as_given, as_rows, compute_dtype, forms, kept, linear, no_autocast, product, shaped, traced

FLOOR = 1e-8  # a step size is read as at least this, since an optimiser may step across 0


def limits(bits: int) -> tuple[int, int]:
    """(Qn, Qp): the codes of signed integers."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def summed(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale·B A (out, in), in float32 at least: bfloat16 would drop changes below 2⁻⁹·|W|."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    with no_autocast(A):
        return torch.addmm(W.to(dtype), B.to(dtype), A.to(dtype), alpha=scale)


def columns(V: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """s and b (groups,) as `grid` takes them for V."""
    return s.to(V.dtype).clamp(min=FLOOR)[:, None], b.to(V.dtype)[:, None]


def grid(V: Tensor, s: Tensor, b: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """v = (V − b)/s and clamp(v, Qn, Qp), which is rounded to the codes q, (groups, k), for s > 0 and b (groups, 1)."""
    v = (V.reshape(len(s), -1) - b) / s
    return v, v.clamp(*limits(bits))


def quantised(V: Tensor, s: Tensor, b: Tensor, bits: int, g: float = 1.0) -> Tensor:
    """W_q = s·q + b (out, in) for V (out, in) and s, b (groups,): each group of consecutive entries of a row has its own.

    Rounding and the floor of s pass gradients on as they are; those of s and b are multiplied by `g`.
    """
    s, b = (passed(value, t[:, None], g) for value, t in zip(columns(V, s, b), (s, b), strict=True))
    v = grid(V, s, b, bits)[1]
    return (s * passed(v.round(), v) + b).view_as(V)


def passed(value: Tensor, t: Tensor, g: float = 1.0) -> Tensor:
    """`value`, exactly, with g times the gradient of t."""
    return value.detach() + g * (t - t.detach()) if torch.is_grad_enabled() else value


class _QuantisedLinear(torch.autograd.Function):
    """y = x W_qᵀ + bias. Keeps x (or its recipe), W, A, B, s and b; makes v, q and W_q again in backward."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, s, b, scale, bits, g, recipe):
        dtype = compute_dtype(x)
        with no_autocast(x):
            V = quantised(summed(W, A, B, scale), s, b, bits)
            y = linear(as_rows(x, dtype), V.to(dtype), None if bias is None else bias.to(dtype), True)
        ctx.recipe, inputs = recipe
        ctx.scale, ctx.bits, ctx.g, ctx.dtype = scale, bits, g, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, bias, A, B, s, b)]
        need_x, need_W, need_bias, *need = ctx.needs_input_grad[:7]
        ctx.save_for_backward(W, A, B, s, b, *(inputs if need_W or any(need) else ()))
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, A, B, s, b, *inputs = ctx.saved_tensors
        need_x, need_W, need_bias, need_A, need_B, need_s, need_b = ctx.needs_input_grad[:7]
        gx = gW = g_bias = gA = gB = gs = gb = None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            V = summed(W, A, B, ctx.scale)
            s, b = columns(V, s, b)
            v, q = grid(V, s, b, ctx.bits)
            q.round_()
            if need_x:
                gx = product(g, (s * q + b).view_as(V).to(ctx.dtype))
            if need_bias:
                g_bias = g.sum(0)
            if inputs:
                G = (g.T @ as_rows(kept(ctx, inputs), ctx.dtype)).to(V.dtype).view_as(v)
                low, high = limits(ctx.bits)
                clipped = (v < low) | (v > high)
                if need_s:
                    gs = ctx.g * q.sub_(v.masked_fill_(clipped, 0)).mul_(G).sum(1)
                if need_b:
                    gb = ctx.g * (clipped * G).sum(1)
                gW = G.masked_fill_(clipped, 0).view_as(V)
                gA = ctx.scale * (B.to(V.dtype).T @ gW) if need_A else None
                gB = ctx.scale * (gW @ A.to(V.dtype).T) if need_B else None
        return *as_given((gx, gW if need_W else None, g_bias, gA, gB, gs, gb), ctx.like), None, None, None, None


def quantised_linear(x, W, bias, A, B, s, b, scale: float, bits: int, g: float = 1.0) -> Tensor:
    """y = x W_qᵀ + bias for W_q = s·q + b, q = round(clamp((W + scale·B A − b)/s, Qn, Qp)), trained through all of A, B, s and b.

    x (..., in), W (out, in), bias (out,) or None, A (r, in), B (out, r), s and b (groups,), each for consecutive inputs of one
    row → (..., out). With G = ∂L/∂W_q, which lives only while it is used, and M where nothing is clipped: M ∘ G goes to A and
    B, g·Σ (q − M v) ∘ G over the group to s, g·Σ (1 − M) ∘ G to b. Jeon et al. 2024, L4Q; Esser et al. 2020, LSQ, for s.
    """
    if traced() or forms(x, W) or not torch.is_grad_enabled():
        V = quantised(summed(W, A, B, scale), s, b, bits, g)
        return F.linear(x, V.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _QuantisedLinear.apply(x, W, bias, A, B, s, b, scale, bits, g, Recipe.of(x))
