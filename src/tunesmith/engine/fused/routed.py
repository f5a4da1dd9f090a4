"""x Wᵀ + b with a mixture of low-rank experts."""

import torch
import torch.nn.functional as F

from .common import Recipe, as_given, as_rows, compute_dtype, kept, linear, no_autocast, plainly, product, shaped


def _gated(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """h (N, E·r) with each of its r-wide blocks times its gate, gates (N, E)."""
    return (h.unflatten(1, (gates.shape[1], -1)) * gates.to(h.dtype)[..., None]).flatten(1)


class _RoutedLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s·((x Aᵀ) ∘ G) Bᵀ and l = x Rᵀ, where each gate of G = gate(l) (N, E) weighs r columns of x Aᵀ.

    Keeps x (or its recipe), W, A, B, R and the (N, E·r + E) product of x with A and R; makes G again in backward.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, R, x_adapter, gate, scale, recipe, training):
        dtype = compute_dtype(x)
        with no_autocast(x):
            rows, weight, bias = as_rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = linear(rows, weight, bias, training)
            parts = [(rows, torch.cat([A, R]))] if x_adapter is None else [(as_rows(x_adapter, dtype), A), (rows, R)]
            h = torch.cat([part @ factor.T.to(dtype) for part, factor in parts], 1)
            logits = h[:, len(A) :].clone()
            y.addmm_(_gated(h[:, : len(A)], gate(logits)), B.T.to(dtype), alpha=scale)
        ctx.recipe, inputs = recipe
        ctx.gate, ctx.scale, ctx.dtype = gate, scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, A, B, R, x_adapter)]
        need_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        ctx.save_for_backward(W, A, B, R, h, x_adapter, *(inputs if need_x else ()))
        return shaped(y, x), logits

    @staticmethod
    def backward(ctx, g, g_logits):
        W, A, B, R, h, x_adapter, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B, need_R, need_adapter = ctx.needs_input_grad[:7]
        dtype, split = ctx.dtype, x_adapter is not None
        gx = gW = gb = gA = gB = gR = g_adapter = None
        with no_autocast(g):
            x = as_rows(kept(ctx, inputs), dtype) if inputs else None
            g, inner = as_rows(g, dtype), h[:, : len(A)]
            with torch.enable_grad():
                logits = h[:, len(A) :].detach().requires_grad_()
                gates = ctx.gate(logits)
            if need_B:
                gB = (_gated(inner, gates.detach()).T @ g).mul_(ctx.scale).T
            g_inner = product(g, B.to(dtype)).mul_(ctx.scale)
            g_gates = (g_inner * inner).unflatten(1, (len(R), -1)).sum(-1).to(gates.dtype)
            g_logits = g_logits + torch.autograd.grad(gates, logits, g_gates)[0]
            g_inner = _gated(g_inner, gates.detach())
            down, g_down = (R, g_logits) if split else (torch.cat([A, R]), torch.cat([g_inner, g_logits], 1))
            if need_A or need_R:
                gA, gR = (g_inner.T @ as_rows(x_adapter, dtype), g_logits.T @ x) if split else (g_down.T @ x).split([len(A), len(R)])
            if need_x:
                gx = product(g, W.to(dtype)).addmm_(g_down, down.to(dtype))
            if need_adapter:
                g_adapter = g_inner @ A.to(dtype)
            if need_W:
                gW = g.T @ x
            if need_b:
                gb = g.sum(0)
        grads = gx, gW, gb, gA, gB, gR, g_adapter
        return *as_given(grads, ctx.like), None, None, None, None


def routed_change(x, A, B, R, gate, scale: float, x_adapter=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale·((x Aᵀ) ∘ gate(l)) Bᵀ, l = x Rᵀ as rows (N, E)): what `routed_linear` adds to x Wᵀ + b, as a plain expression."""
    logits = F.linear(x, R.to(x.dtype)).flatten(0, -2)
    inner = F.linear(x if x_adapter is None else x_adapter, A.to(x.dtype))
    h = _gated(inner.flatten(0, -2), gate(logits))
    return (F.linear(h, B.to(h.dtype)) * scale).unflatten(0, x.shape[:-1]), logits


def routed_linear(x, W, b, A, B, R, gate, scale: float, x_adapter=None) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + scale·Σ_e G_e·(x A_eᵀ) B_eᵀ with G = gate(l), and the logits l = x Rᵀ, as rows (N, E).

    x (..., in), W (out, in), b (out,) or None; A (E·r, in), B (out, E·r) and R (E, in) may have another dtype than x.
    `gate` maps logits (N, E) to gates (N, E) and is called again in backward. The experts read `x_adapter` (x after
    dropout) if that is given, the router always x. All experts are computed in one product, whatever the gates: for
    the E·r of a mixture of LoRA experts that costs less than moving tokens to the chosen experts and back.
    """
    if plainly(x, W):
        change, logits = routed_change(x, A, B, R, gate, scale, x_adapter)
        return F.linear(x, W, b) + change, logits
    return _RoutedLinear.apply(x, W, b, A, B, R, x_adapter, gate, scale, Recipe.of(x), torch.is_grad_enabled())
