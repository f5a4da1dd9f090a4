"""Autograd functions that keep as little as the mathematics allows and touch each tensor as few times as it takes.

Every function has the gradient of the plain expression in its docstring. Under `torch.compile` and the transforms of
`torch.func` the plain expression itself runs: there the compiler decides what to keep.
"""

import contextlib
import platform

import torch
import torch.nn.functional as F


class Recipe:
    """How a tensor comes out of others that are kept anyway, so that whoever needs it in backward need not keep it.

    `attach` says y = make(*inputs). The value, once made, serves all users of y until the backward of y itself, which
    comes last, clears it.
    """

    def __init__(self, make):
        self.make, self.value = make, None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.value is None:
            self.value = self.make(*inputs)
        return self.value

    def attach(self, y: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        y.recipe = self, [t.detach() for t in inputs], y._version
        return y

    @staticmethod
    def of(y: torch.Tensor):
        """(recipe, inputs) of y, unless it has none or was changed in place since: then (None, [y])."""
        recipe, inputs, version = getattr(y, "recipe", (None, [y], None))
        return (recipe, inputs) if recipe and version == y._version else (None, [y])


def traced() -> bool:
    """Whether a compiler or a `torch.func` transform is watching, from which a hand-written backward would hide."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_autocast(x: torch.Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, while training: with AVX-512 oneDNN's product is the faster one even though it has to reorder b first."""
    return _affine(a, b.T, None) if _AVX512 and _fast(a, b) else a @ b


def _fast(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _onednn is not None and a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu


def _affine(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b. oneDNN's float32 product is about a tenth faster than the one behind `mm` on x86."""
    return _onednn(x, W, b, "none", [], "")


def _find_onednn():
    try:
        product, one = torch.ops.mkldnn._linear_pointwise, torch.ones(1, 1)
        return product if product(one, one, None, "none", [], "").item() == 1 else None
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without it
        return None


_onednn = _find_onednn() if platform.machine() in ("x86_64", "AMD64") else None
_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


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
        dtype = _compute_dtype(x)
        with _no_autocast(x):
            rows = _rows(x, dtype)
            inner = (rows if x_adapter is None else _rows(x_adapter, dtype)) @ A.T.to(dtype)
            bias = None if b is None or m is not None else b.to(dtype)
            weight = W.to(dtype)
            if training and _fast(rows, weight):
                out = _affine(x.to(dtype), weight, bias)
                y = out.view(-1, W.shape[0])
            else:  # as the base computes, bit for bit
                out = x.new_empty(*x.shape[:-1], W.shape[0], dtype=dtype)  # a view could not be changed in place later
                y = out.view(-1, W.shape[0])
                torch.mm(rows, weight.T, out=y) if bias is None else torch.addmm(bias, rows, weight.T, out=y)
            y.addmm_(inner, B.T.to(dtype), alpha=scale)
            if m is not None:
                norm = weight_norm(W, A, B, scale) if norm is None else norm
                y.mul_((m / norm).to(dtype))
                if b is not None:
                    y.add_(b.to(dtype))
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
        with _no_autocast(g):
            x = _rows(ctx.recipe(*inputs) if ctx.recipe else inputs[0], dtype) if inputs else None
            g = _rows(g, dtype)
            if need_b:
                gb = g.sum(0)
            if need_m:
                gm = _magnitude_gradient(g, _rows(out, dtype), x, W, b, B, m, norm, inner, scale)
            if norm is not None:
                g = g * (m / norm).to(dtype)
            if need_B:
                gB = (inner.T @ g).mul_(scale).T
            if need_A or need_adapter or (need_x and not split):
                g_inner = _product(g, B.to(dtype)).mul_(scale)
            if need_A:
                gA = g_inner.T @ (_rows(x_adapter, dtype) if split else x)
            if need_x:
                gx = _product(g, W.to(dtype))
                if not split:
                    gx.addmm_(g_inner, A.to(dtype))
            if need_adapter:
                g_adapter = g_inner @ A.to(dtype)
            if need_W:
                gW = g.T @ x
        grads = gx, gW, gb, gA, gB, gm, g_adapter
        return *(t if t is None else t.to(like[1]).reshape(like[0]) for t, like in zip(grads, ctx.like, strict=True)), None, None, None, None


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
    if traced():
        inner = F.linear(x if x_adapter is None else x_adapter, A.to(x.dtype))
        return F.linear(x, W, b) + F.linear(inner, B.to(x.dtype)) * scale
    return _LowRankLinear.apply(x, W, b, A, B, None, x_adapter, scale, None, Recipe.of(x), torch.is_grad_enabled())


def dora_linear(x, W, b, A, B, scale: float, m, x_adapter=None, norm=None) -> torch.Tensor:
    """y = m/‖W + scale·B A‖ · (x Wᵀ + scale·(x Aᵀ) Bᵀ) + b, the norm of each row being a constant in backward.

    Shapes as in `lowrank_linear`, m (out,), `norm` (out,) if it is known. Liu et al. 2024, DoRA, equations 5 and 11.
    The output is kept for backward, so changing it in place raises torch's error about that.
    """
    if traced():
        with torch.no_grad():
            norm = weight_norm(W, A, B, scale) if norm is None else norm
        inner = F.linear(x if x_adapter is None else x_adapter, A.to(x.dtype))
        y = (m / norm).to(x.dtype) * (F.linear(x, W) + F.linear(inner, B.to(x.dtype)) * scale)
        return y if b is None else y + b
    return _LowRankLinear.apply(x, W, b, A, B, m, x_adapter, scale, norm, Recipe.of(x), torch.is_grad_enabled())


class _MergedLinear(torch.autograd.Function):
    """y = x W'ᵀ + b' for (W', b') = merged(W, b). Keeps x (or its recipe), W and b; makes W' again in backward."""

    @staticmethod
    def forward(ctx, x, W, b, merged, recipe, *parameters):
        dtype = _compute_dtype(x)
        with _no_autocast(x):
            V, c = merged(W, b)
            y = F.linear(x.to(dtype), V.to(dtype), None if c is None else c.to(dtype))
        ctx.recipe, inputs = recipe
        ctx.merged, ctx.dtype, ctx.parameters = merged, dtype, parameters
        ctx.like = x.shape, x.dtype
        ctx.save_for_backward(W, b, *parameters, *inputs)  # the parameters, so that a change in place before backward is noticed
        return y

    @staticmethod
    def backward(ctx, g):
        W, b, *inputs = ctx.saved_tensors
        inputs = inputs[len(ctx.parameters) :]
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[5:], strict=True) if need]
        with _no_autocast(g), torch.enable_grad():
            W_, b_ = W.detach().requires_grad_(need_W), None if b is None else b.detach().requires_grad_(need_b)
            V, c = ctx.merged(W_, b_)
            wanted += [t for t, need in ((W_, need_W), (b_, need_b)) if need]
            with torch.no_grad():
                g = _rows(g, ctx.dtype)
                gx = _product(g, V.to(ctx.dtype)).to(ctx.like[1]).reshape(ctx.like[0]) if need_x else None
                outputs = [(V, None)] if V.requires_grad else []
                if outputs:
                    x = _rows(ctx.recipe(*inputs) if ctx.recipe else inputs[0], ctx.dtype)
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
    if traced() or not torch.is_grad_enabled():
        V, c = merged(W, b)
        return F.linear(x, V.to(x.dtype), None if c is None else c.to(x.dtype))
    return _MergedLinear.apply(x, W, b, merged, Recipe.of(x), *parameters)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the logits of a few rows at a time, and the gradients with them, in one buffer."""

    @staticmethod
    def forward(ctx, hidden, W, b, labels, count, chunk):
        dtype = _compute_dtype(hidden)
        need_hidden, need_W, need_b = ctx.needs_input_grad[:3]
        losses = torch.empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        g_hidden = torch.empty_like(hidden) if need_hidden else None
        gW = torch.zeros_like(W) if need_W else None
        gb = torch.zeros_like(b) if need_b else None
        with _no_autocast(hidden):
            weight = W.to(dtype)
            buffer = None if _fast(hidden, weight) else torch.empty(min(chunk, len(hidden)), len(W), dtype=dtype, device=hidden.device)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h, target = hidden[part].to(dtype), labels[part, None]
                logits = _affine(h, weight, None) if _fast(h, weight) else torch.mm(h, weight.T, out=buffer[: len(h)])
                if b is not None:
                    logits.add_(b.to(dtype))
                p = logits.to(losses.dtype)
                right, top = p.gather(1, target), p.amax(1, keepdim=True)
                torch.softmax(p, 1, out=p)
                losses[part] = (top - p.amax(1, keepdim=True).log_() - right)[:, 0]
                if not (need_hidden or need_W or need_b):
                    continue
                p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
                p = p.to(dtype)
                if need_hidden:
                    g_hidden[part] = _product(p, weight).div_(count)
                if need_W:
                    gW.addmm_(p.T.to(gW.dtype), h.to(gW.dtype), alpha=1 / float(count))
                if need_b:
                    gb += p.sum(0).div_(count)
        ctx.save_for_backward(g_hidden, gW, gb)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, g):
        return *(t if t is None else t * g.to(t.dtype) for t in ctx.saved_tensors), None, None, None


def linear_cross_entropy(hidden, W, labels, bias=None, chunk: int = 256, count=None) -> torch.Tensor:
    """Cross-entropy of softmax(hidden Wᵀ + bias) against `labels`, holding the logits of `chunk` rows at a time.

    hidden (..., in), W (classes, in), bias (classes,) or None, labels (...) of class indices, -100 where there is
    none → scalar: the sum over the labels there are, divided by `count` (default: their number).
    """
    if traced():
        total = F.cross_entropy(F.linear(hidden, W, bias).flatten(0, -2).float(), labels.flatten(), reduction="sum")
        return total / ((labels != -100).sum() if count is None else count)
    labels = labels.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    kept = (labels != -100).nonzero()[:, 0]
    if len(kept) < len(labels):
        rows, labels = rows.index_select(0, kept), labels[kept]
    count = torch.as_tensor(len(labels) if count is None else count, device=rows.device)
    return _LinearCrossEntropy.apply(rows, W, bias, labels, count, chunk)
