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
    """oneDNN compiles and keeps a kernel for each number of rows, so it gets whole blocks of 256: batches of uneven texts would fill the memory."""
    return _onednn is not None and len(a) % 256 == 0 and a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu


def _affine(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b. oneDNN's float32 product is about a tenth faster than the one behind `mm` on x86."""
    return _onednn(x, W, b, "none", [], "")


def _linear(rows: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, training: bool) -> torch.Tensor:
    """rows Wᵀ + b, (N, out); outside of training as the base computes it, bit for bit."""
    return (_affine if training and _fast(rows, W) else F.linear)(rows, W, b)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y (N, out) in the shape of x (..., in), and no view: the caller may change it in place."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


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


def _kept(ctx, inputs) -> torch.Tensor:
    """The input that a forward kept, made again where it kept its recipe."""
    return ctx.recipe(*inputs) if ctx.recipe else inputs[0]


def _as_given(grads, like) -> list:
    """Gradients in the shapes and dtypes of what they belong to; `like` holds (shape, dtype) or None."""
    return [t if t is None else t.to(each[1]).reshape(each[0]) for t, each in zip(grads, like, strict=True)]


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
            y = _linear(rows, weight, bias, training)
            y.addmm_(inner, B.T.to(dtype), alpha=scale)
            if m is not None:
                norm = weight_norm(W, A, B, scale) if norm is None else norm
                y.mul_((m / norm).to(dtype))
                if b is not None:
                    y.add_(b.to(dtype))
        out = _shaped(y, x)
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
            x = _rows(_kept(ctx, inputs), dtype) if inputs else None
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
        return *_as_given(grads, ctx.like), None, None, None, None


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
            y = _linear(_rows(x, dtype), V.to(dtype), None if c is None else c.to(dtype), True)
        ctx.recipe, inputs = recipe
        ctx.merged, ctx.dtype, ctx.parameters = merged, dtype, parameters
        ctx.like = x.shape, x.dtype
        ctx.save_for_backward(W, b, *parameters, *inputs)  # the parameters, so that a change in place before backward is noticed
        return _shaped(y, x)

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
                    x = _rows(_kept(ctx, inputs), ctx.dtype)
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
            buffer = None
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h, target = hidden[part].to(dtype), labels[part, None]
                if _fast(h, weight):
                    logits = _affine(h, weight, None)
                else:
                    buffer = torch.empty(len(h), len(W), dtype=dtype, device=h.device) if buffer is None else buffer[: len(h)]
                    logits = torch.mm(h, weight.T, out=buffer)
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
        dtype = _compute_dtype(x)
        with _no_autocast(x):
            ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, D, x_adapter)]
            ctx.recipe, inputs = recipe
            ctx.dtype, m = dtype, D.shape[1]
            rows, weight, bias = _rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = _linear(rows, weight, bias, training)
            S = _block_sum(rows if x_adapter is None else _rows(x_adapter, dtype), len(D))
            y.addmm_(S, D.to(dtype)) if m == len(W) else y.unflatten(1, (-1, m)).add_((S @ D.to(dtype))[:, None])
        ctx.save_for_backward(W, D, S if ctx.needs_input_grad[3] else None, *(inputs if ctx.needs_input_grad[1] else ()))
        return _shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, D, S, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_D, need_adapter = ctx.needs_input_grad[:5]
        dtype, m, split = ctx.dtype, D.shape[1], ctx.like[4] is not None
        gx = gW = gb = gD = g_adapter = None
        with _no_autocast(g):
            g = _rows(g, dtype)
            shared = g if m == len(W) else g.unflatten(1, (-1, m)).sum(1)
            if need_b:
                gb = g.sum(0)
            if need_D:
                gD = S.T @ shared
            if need_adapter or (need_x and not split):
                g_sum = _product(shared, D.T.to(dtype))
            if need_x:
                gx = _product(g, W.to(dtype))
                if not split:
                    _add_tiled(gx, g_sum)
            if need_adapter:
                g_adapter = _add_tiled(g.new_zeros(len(g), W.shape[1]), g_sum)
            if need_W:
                gW = g.T @ _rows(_kept(ctx, inputs), dtype)
        grads = gx, gW, gb, gD, g_adapter
        return *_as_given(grads, ctx.like), None, None


def block_sum_linear(x, W, b, D, x_adapter=None) -> torch.Tensor:
    """y = x Wᵀ + b + (Σ_g x_g) D for the r-wide blocks x_g of x, or of `x_adapter` (x after dropout) if that is given.

    x (..., in), W (out, in), b (out,) or None, D (r, m) with r ≤ in and m a divisor of out, over which the last term is
    repeated → (..., out). D may have another dtype than x. Kang & Yin 2024, MiSS, equation 6.
    """
    if traced():
        return F.linear(x, W, b) + shared_block(x if x_adapter is None else x_adapter, D, len(W))
    return _BlockSumLinear.apply(x, W, b, D, x_adapter, Recipe.of(x), torch.is_grad_enabled())


def _gated(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """h (N, E·r) with each of its r-wide blocks times its gate, gates (N, E)."""
    return (h.unflatten(1, (gates.shape[1], -1)) * gates.to(h.dtype)[..., None]).flatten(1)


class _RoutedLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s·((x Aᵀ) ∘ G) Bᵀ and l = x Rᵀ, where each gate of G = gate(l) (N, E) weighs r columns of x Aᵀ.

    Keeps x (or its recipe), W, A, B, R and the (N, E·r + E) product of x with A and R; makes G again in backward.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, R, x_adapter, gate, scale, recipe, training):
        dtype = _compute_dtype(x)
        with _no_autocast(x):
            rows, weight, bias = _rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = _linear(rows, weight, bias, training)
            parts = [(rows, torch.cat([A, R]))] if x_adapter is None else [(_rows(x_adapter, dtype), A), (rows, R)]
            h = torch.cat([part @ factor.T.to(dtype) for part, factor in parts], 1)
            logits = h[:, len(A) :].clone()
            y.addmm_(_gated(h[:, : len(A)], gate(logits)), B.T.to(dtype), alpha=scale)
        ctx.recipe, inputs = recipe
        ctx.gate, ctx.scale, ctx.dtype = gate, scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, A, B, R, x_adapter)]
        need_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        ctx.save_for_backward(W, A, B, R, h, x_adapter, *(inputs if need_x else ()))
        return _shaped(y, x), logits

    @staticmethod
    def backward(ctx, g, g_logits):
        W, A, B, R, h, x_adapter, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B, need_R, need_adapter = ctx.needs_input_grad[:7]
        dtype, split = ctx.dtype, x_adapter is not None
        gx = gW = gb = gA = gB = gR = g_adapter = None
        with _no_autocast(g):
            x = _rows(_kept(ctx, inputs), dtype) if inputs else None
            g, inner = _rows(g, dtype), h[:, : len(A)]
            with torch.enable_grad():
                logits = h[:, len(A) :].detach().requires_grad_()
                gates = ctx.gate(logits)
            if need_B:
                gB = (_gated(inner, gates.detach()).T @ g).mul_(ctx.scale).T
            g_inner = _product(g, B.to(dtype)).mul_(ctx.scale)
            g_gates = (g_inner * inner).unflatten(1, (len(R), -1)).sum(-1).to(gates.dtype)
            g_logits = g_logits + torch.autograd.grad(gates, logits, g_gates)[0]
            g_inner = _gated(g_inner, gates.detach())
            down, g_down = (R, g_logits) if split else (torch.cat([A, R]), torch.cat([g_inner, g_logits], 1))
            if need_A or need_R:
                gA, gR = (g_inner.T @ _rows(x_adapter, dtype), g_logits.T @ x) if split else (g_down.T @ x).split([len(A), len(R)])
            if need_x:
                gx = _product(g, W.to(dtype)).addmm_(g_down, down.to(dtype))
            if need_adapter:
                g_adapter = g_inner @ A.to(dtype)
            if need_W:
                gW = g.T @ x
            if need_b:
                gb = g.sum(0)
        grads = gx, gW, gb, gA, gB, gR, g_adapter
        return *_as_given(grads, ctx.like), None, None, None, None


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
    if traced():
        change, logits = routed_change(x, A, B, R, gate, scale, x_adapter)
        return F.linear(x, W, b) + change, logits
    return _RoutedLinear.apply(x, W, b, A, B, R, x_adapter, gate, scale, Recipe.of(x), torch.is_grad_enabled())


class _GroupedLowRankLinear(torch.autograd.Function):
    """y_i = x_i Wᵀ + b + s·(x_i A_iᵀ) B_iᵀ for x_i the i-th of g equal parts of the rows.

    Keeps x (or its recipe), W, A, B and the (N, r) products x_i A_iᵀ.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, scale, recipe, training):
        dtype = _compute_dtype(x)
        with _no_autocast(x):
            rows, weight, bias = _rows(x, dtype), W.to(dtype), None if b is None else b.to(dtype)
            y = _linear(rows, weight, bias, training)
            inner = rows.unflatten(0, (len(A), -1)) @ A.mT.to(dtype)  # (g, n, r)
            y.unflatten(0, (len(A), -1)).baddbmm_(inner, B.mT.to(dtype), alpha=scale)
        ctx.recipe, inputs = recipe
        ctx.scale, ctx.dtype = scale, dtype
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, W, b, A, B)]
        ctx.save_for_backward(W, A, B, inner, *(inputs if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else ()))
        return _shaped(y, x)

    @staticmethod
    def backward(ctx, g):
        W, A, B, inner, *inputs = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B = ctx.needs_input_grad[:5]
        dtype, groups = ctx.dtype, (len(A), -1)
        gx = gW = gb = gA = gB = None
        with _no_autocast(g):
            x = _rows(_kept(ctx, inputs), dtype) if inputs else None
            g = _rows(g, dtype)
            parts = g.unflatten(0, groups)
            if need_B:
                gB = (inner.mT @ parts).mul_(ctx.scale).mT
            if need_A or need_x:
                g_inner = (parts @ B.to(dtype)).mul_(ctx.scale)
            if need_A:
                gA = g_inner.mT @ x.unflatten(0, groups)
            if need_x:
                gx = _product(g, W.to(dtype))
                gx.unflatten(0, groups).baddbmm_(g_inner, A.to(dtype))
            if need_W:
                gW = g.T @ x
            if need_b:
                gb = g.sum(0)
        grads = gx, gW, gb, gA, gB
        return *_as_given(grads, ctx.like), None, None, None


def grouped_change(x, A, B, scale: float) -> torch.Tensor:
    """scale·(x_i A_iᵀ) B_iᵀ: what `grouped_lowrank_linear` adds to x Wᵀ + b, as a plain expression."""
    parts = x.reshape(len(A), -1, x.shape[-1])
    return ((parts @ A.mT.to(x.dtype)) @ B.mT.to(x.dtype) * scale).reshape(*x.shape[:-1], B.shape[1])


def grouped_lowrank_linear(x, W, b, A, B, scale: float) -> torch.Tensor:
    """y = x Wᵀ + b + scale·(x A_iᵀ) B_iᵀ, where the i-th of g equal parts of x's first dimension has its own factors.

    x (rows, ..., in) with g a divisor of rows, W (out, in), b (out,) or None, A (g, r, in), B (g, out, r) → (rows, ..., out).
    """
    if traced():
        return F.linear(x, W, b) + grouped_change(x, A, B, scale)
    return _GroupedLowRankLinear.apply(x, W, b, A, B, scale, Recipe.of(x), torch.is_grad_enabled())


def _halved(frequency: torch.Tensor, size: int):
    """Of a real signal −f says what f does: (|f|, the sign of f, 1 where f is its own negative and ½ elsewhere)."""
    opposite = size - frequency
    return torch.minimum(frequency, opposite), torch.where(opposite < frequency, -1, 1), torch.where(2 * frequency % size == 0, 1.0, 0.5)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """The real and imaginary parts of the half spectrum of each row, (size // 2 + 1, 2, N)."""
    return torch.view_as_real(torch.fft.rfft(x)).movedim(0, -1).contiguous()


def _spectral(x, c, rows, columns, out: int, scale: float):
    """`spectral_linear` of x (N, in): the sparse matrix between two transforms of vectors, (N, out)."""
    (row, row_sign, share), (column, column_sign, _) = _halved(rows, out), _halved(columns, x.shape[1])
    imaginary = torch.where(share == 1, 0, -share * row_sign * column_sign)  # sin is 0 where a frequency is its own negative
    weights = c[:, None] * torch.stack([share, imaginary], 1).to(c.dtype)
    X = _halves(x)
    Y = X.new_zeros(out // 2 + 1, 2, len(x)).index_add(0, row, X.index_select(0, column) * weights[..., None])
    return torch.fft.irfft(torch.view_as_complex(Y.movedim(-1, 0).contiguous()), n=out) * (scale / x.shape[1])


class _SpectralLinear(torch.autograd.Function):
    """Keeps x (or its recipe) and c; the change of the weight is not formed, in backward neither."""

    @staticmethod
    def forward(ctx, x, c, rows, columns, out, scale, recipe):
        ctx.dtype = torch.promote_types(_compute_dtype(x), torch.float32)  # transforms know no bfloat16
        with _no_autocast(x):
            y = _spectral(_rows(x, ctx.dtype), c.to(ctx.dtype), rows, columns, out, scale)
        ctx.recipe, inputs = recipe
        ctx.out, ctx.scale, ctx.like = out, scale, (x.shape, x.dtype)
        ctx.save_for_backward(c, rows, columns, *(inputs if ctx.needs_input_grad[1] else ()))
        return y.to(_compute_dtype(x)).reshape(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx, g):
        c, rows, columns, *inputs = ctx.saved_tensors
        (*_, size), dtype = ctx.like
        gx = gc = None
        with _no_autocast(g):
            g = _rows(g, ctx.dtype)
            if ctx.needs_input_grad[0]:
                gx = _spectral(g, c.to(ctx.dtype), columns, rows, size, ctx.scale).to(dtype).reshape(ctx.like[0])
            if ctx.needs_input_grad[1]:
                x = _rows(_kept(ctx, inputs), ctx.dtype)
                (row, row_sign, _), (column, column_sign, _) = _halved(rows, ctx.out), _halved(columns, size)
                products = (_halves(x).index_select(0, column) * _halves(g).index_select(0, row)).sum(-1)
                gc = (products[:, 0] - row_sign * column_sign * products[:, 1]).mul_(ctx.scale / (ctx.out * size)).to(c.dtype)
        return gx, gc, None, None, None, None, None


def spectral_linear(x, c, rows, columns, out: int, scale: float) -> torch.Tensor:
    """y = scale·Re(ifft2 F) x, where F (out, in) is zero but for F[rows, columns] = c.

    x (..., in), c, rows and columns (n,) → (..., out). The transform over both axes is one of x and one of y with F
    between them, 2.5·(in log₂ in + out log₂ out) + 4n operations for a row of x. Gao et al. 2024, FourierFT, equations 2–4.
    """
    if traced():
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = _spectral(x.reshape(-1, x.shape[-1]).to(dtype), c.to(dtype), rows, columns, out, scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], out)
    return _SpectralLinear.apply(x, c, rows, columns, out, scale, Recipe.of(x))


class _Remade(torch.autograd.Function):
    """y = make(x). Keeps x (or its recipe); makes everything between x and y again in backward."""

    @staticmethod
    def forward(ctx, x, make, recipe, *parameters):
        dtype = _compute_dtype(x)
        with _no_autocast(x):
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
        with _no_autocast(g), torch.enable_grad():
            x = _kept(ctx, inputs).detach().to(ctx.dtype).requires_grad_(need_x)
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
