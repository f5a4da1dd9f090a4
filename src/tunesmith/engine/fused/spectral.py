"""The product with a matrix that is sparse in the frequency domain."""

import torch

from .common import Recipe, as_rows, compute_dtype, kept, no_autocast, traced


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
        ctx.dtype = torch.promote_types(compute_dtype(x), torch.float32)  # transforms know no bfloat16
        with no_autocast(x):
            y = _spectral(as_rows(x, ctx.dtype), c.to(ctx.dtype), rows, columns, out, scale)
        ctx.recipe, inputs = recipe
        ctx.out, ctx.scale, ctx.like = out, scale, (x.shape, x.dtype)
        ctx.save_for_backward(c, rows, columns, *(inputs if ctx.needs_input_grad[1] else ()))
        return y.to(compute_dtype(x)).reshape(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx, g):
        c, rows, columns, *inputs = ctx.saved_tensors
        (*_, size), dtype = ctx.like
        gx = gc = None
        with no_autocast(g):
            g = as_rows(g, ctx.dtype)
            if ctx.needs_input_grad[0]:
                gx = _spectral(g, c.to(ctx.dtype), columns, rows, size, ctx.scale).to(dtype).reshape(ctx.like[0])
            if ctx.needs_input_grad[1]:
                x = as_rows(kept(ctx, inputs), ctx.dtype)
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
