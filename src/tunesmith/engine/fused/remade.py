"""What is made again in backward instead of kept: an adapted matrix, or everything between two activations."""

import torch
import torch.nn.functional as F

from .common import Recipe, as_rows, compute_dtype, forms, kept, linear, no_autocast, product, shaped, traced


class _MergedLinear(torch.autograd.Function):
    """y = x W'ᵀ + b' for (W', b') = merged(W, b). Keeps x (or its recipe), W and b; makes W' again in backward."""

    @staticmethod
    def forward(ctx, x, W, b, merged, recipe, *parameters):
        dtype = compute_dtype(x)
        with no_autocast(x):
            V, c = merged(W, b)
            y = linear(as_rows(x, dtype), V.to(dtype), None if c is None else c.to(dtype), True)
        ctx.recipe, inputs = recipe
        ctx.merged, ctx.dtype, ctx.parameters = merged, dtype, parameters
        ctx.like = x.shape, x.dtype
        ctx.save_for_backward(W, b, *parameters, *inputs)  # the parameters, so that a change in place before backward is noticed
        return shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, b, *inputs = ctx.saved_tensors
        inputs = inputs[len(ctx.parameters) :]
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[5:], strict=True) if need]
        with no_autocast(g), torch.enable_grad():
            W_, b_ = W.detach().requires_grad_(need_W), None if b is None else b.detach().requires_grad_(need_b)
            V, c = ctx.merged(W_, b_)
            wanted += [t for t, need in ((W_, need_W), (b_, need_b)) if need]
            with torch.no_grad():
                g = as_rows(g, ctx.dtype)
                gx = product(g, V.to(ctx.dtype)).to(ctx.like[1]).reshape(ctx.like[0]) if need_x else None
                outputs = [(V, None)] if V.requires_grad else []
                if outputs:
                    x = as_rows(kept(ctx, inputs), ctx.dtype)
                    outputs = [(V, (g.T @ x).to(V.dtype))]
                if c is not None and c.requires_grad:
                    outputs.append((c, g.sum(0).to(c.dtype)))
            found = iter(torch.autograd.grad([o for o, _ in outputs], wanted, [d for _, d in outputs], allow_unused=True) if outputs and wanted else [])
        grads = [next(found, None) if need else None for need in ctx.needs_input_grad[5:]]
        gW, gb = (next(found, None) if need else None for need in (need_W, need_b))
        return gx, gW, gb, None, None, *grads


def merged_linear(x, W, b, merged, parameters) -> torch.Tensor:
    """y = x W'ᵀ + b' with (W', b') = merged(W, b), a function of `parameters` too; W' lives only while it is used.

    x (..., in), W (out, in), b (out,) or None → (..., out). `merged` is called again in backward: it must not draw numbers.
    """
    if traced() or forms(x, W) or not torch.is_grad_enabled():
        V, c = merged(W, b)
        return F.linear(x, V.to(x.dtype), None if c is None else c.to(x.dtype))
    return _MergedLinear.apply(x, W, b, merged, Recipe.of(x), *parameters)


class _Remade(torch.autograd.Function):
    """y = make(x). Keeps x (or its recipe); makes everything between x and y again in backward."""

    @staticmethod
    def forward(ctx, x, make, recipe, *parameters):
        dtype = compute_dtype(x)
        with no_autocast(x):
            y = make(x.to(dtype))
        ctx.recipe, inputs = recipe
        ctx.make, ctx.dtype, ctx.parameters = make, dtype, parameters
        ctx.like = x.dtype
        ctx.save_for_backward(*parameters, *inputs)  # the parameters, so that a change in place before backward is noticed
        return y

    @staticmethod
    def backward(ctx, g):
        inputs = ctx.saved_tensors[len(ctx.parameters) :]
        need_x = ctx.needs_input_grad[0]
        with no_autocast(g), torch.enable_grad():
            x = kept(ctx, inputs).detach().to(ctx.dtype).requires_grad_(need_x)
            wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True) if need] + [x] * need_x
            found = iter(torch.autograd.grad(ctx.make(x), wanted, g, allow_unused=True))
        grads = [next(found) if need else None for need in ctx.needs_input_grad[3:]]
        return next(found).to(ctx.like) if need_x else None, None, None, *grads


def remade(x, make, parameters) -> torch.Tensor:
    """make(x), a function of `parameters` too, for what is larger in between than at its ends.

    `make` is called again in backward: it must not draw numbers.
    """
    if traced() or not torch.is_grad_enabled():
        return make(x)
    return _Remade.apply(x, make, Recipe.of(x), *parameters)
