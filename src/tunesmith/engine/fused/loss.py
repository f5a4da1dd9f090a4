"""Cross-entropy over a large vocabulary."""

import torch
import torch.nn.functional as F

from .common import affine, compute_dtype, fast, no_autocast, product, traced


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the logits of a few rows at a time, and the gradients with them, in one buffer."""

    @staticmethod
    def forward(ctx, hidden, W, b, labels, count, chunk):
        dtype = compute_dtype(hidden)
        need_hidden, need_W, need_b = ctx.needs_input_grad[:3]
        losses = torch.empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        g_hidden = torch.empty_like(hidden) if need_hidden else None
        gW = torch.zeros_like(W) if need_W else None
        gb = torch.zeros_like(b) if need_b else None
        with no_autocast(hidden):
            weight = W.to(dtype)
            buffer = None
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h, target = hidden[part].to(dtype), labels[part, None]
                if fast(h, weight):
                    logits = affine(h, weight, None)
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
                    g_hidden[part] = product(p, weight).div_(count)
                if need_W:
                    gW.addmm_(p.T.to(gW.dtype), h.to(gW.dtype), alpha=1 / float(count))
                if need_b:
                    gb += p.sum(0).div_(count)
        ctx.save_for_backward(g_hidden, gW, gb)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, g):
        return *(t if t is None else t * g.to(t.dtype) for t in ctx.saved_tensors), None, None, None


def linear_cross_entropy(hidden, W, labels, bias=None, chunk: int | None = None, count=None) -> torch.Tensor:
    """Cross-entropy of softmax(hidden Wᵀ + bias) against `labels`, holding the logits of `chunk` rows at a time.

    hidden (..., in), W (classes, in), bias (classes,) or None, labels (...) of class indices, -100 where there is
    none → scalar: the sum over the labels there are, divided by `count` (default: their number).
    `chunk` is 256 by default, on a GPU 1024.
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
    return _LinearCrossEntropy.apply(rows, W, bias, labels, count, chunk or (1024 if rows.is_cuda else 256))
