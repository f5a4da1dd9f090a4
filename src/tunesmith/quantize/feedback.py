"""Rounding column by column, each column's error being made up for in those that follow (GPTQ)."""

import torch
from torch import Tensor

from ..errors import TunesmithError
from .formats import Format, Parts

DAMP = 0.01  # of the mean of the moments' diagonal
EXPONENT = 4  # of a column's importance to a table: LeanQuant's


def factor(moments: Tensor, order: bool = False, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """(the columns in the order they are rounded in, U upper triangular with H⁻¹ = UᵀU in that order) of damped moments (in, in)."""
    H = moments.double().clone()
    H.diagonal()[H.diag() == 0] = 1
    permutation = H.diag().argsort(descending=True, stable=True) if order else torch.arange(len(H), device=H.device)
    H.diagonal().add_(damp * H.diag().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[permutation][:, permutation]))
    return permutation, torch.linalg.cholesky(inverse, upper=True)


def encode(W: Tensor, moments: Tensor, format: Format, order: bool = False, stats: Parts | None = None, damp: float = DAMP) -> Parts:
    """The stored parts of W (out, in), chosen for little error of W x over inputs x with E[x xᵀ] ∝ `moments` (in, in).

    GPTQ (arXiv 2210.17323, algorithm 1); tables of sketch formats by k-means weighted by diag(U)⁻⁴ for H⁻¹ = UᵀU
    (LeanQuant, arXiv 2407.10032). `order`: columns of larger moments first, groups then being fitted to W as it is. `stats`:
    of all groups, where they are known.
    Raises `TunesmithError` for moments that are not finite, and for groups that run on over the rows of W.
    """
    (out, n), k = W.shape, format.group(W.shape)
    if n % k:
        raise TunesmithError(f"group_size={k} does not divide a row of {n} weights; choose one that does for calibrated rounding")
    if not torch.isfinite(moments).all():
        raise TunesmithError("the calibration's inputs are not finite; calibrate in float32, or on other data")
    W = torch.where(moments.diag() == 0, 0, W.double())
    permutation, U = factor(moments, order, damp)
    stored = None if stats is None else format.store(stats)
    if stored is None and (order or format.double_quant or format.family in ("sketch", "nv")):  # all groups at once
        weights = U.diag().pow(-EXPONENT)[permutation.argsort()].view(-1, k).repeat(out, 1) if format.family == "sketch" else None
        stored = format.store(format.fit(W.float().view(-1, k), weights))
        stats = format.stats(stored)
    fitted = [] if stored is None else None
    codes, columns = torch.empty(out, n, dtype=torch.uint8, device=W.device), W[:, permutation]
    block = k * (128 // k) if k <= 128 else max(d for d in range(1, 129) if k % d == 0)
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = torch.empty(out, end - start, dtype=W.dtype, device=W.device)
        for j in range(start, end):
            if fitted is not None and j % k == 0:
                fitted.append(format.store(format.fit(columns[:, j : j + k].float().contiguous())))
                now = format.stats(fitted[-1])
            if fitted is None:
                group = int(permutation[j]) // k
                now = {name: t.view(out, n // k, *t.shape[1:])[:, group] for name, t in stats.items()}
            w = columns[:, j]
            code = format.code(w[:, None].to(next(iter(now.values())).dtype), now)
            codes[:, permutation[j]] = code[:, 0]
            errors[:, j - start] = (w - format.value(code, now)[:, 0]) / U[j, j]
            columns[:, j + 1 : end].addr_(errors[:, j - start], U[j, j + 1 : end], alpha=-1)
        columns[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    parts = stored if fitted is None else {name: torch.stack([p[name] for p in fitted], 1).flatten(0, 1) for name in fitted[0]}
    return {"codes": format.pack(codes, out * n)} | parts
