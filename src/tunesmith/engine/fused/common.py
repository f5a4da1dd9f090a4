"""What the autograd functions share: what a backward keeps, in which dtype it computes, and the faster matrix product."""

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


def light(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether a GPU is done with x Wᵀ before Python is with the next call: then torch's own backward, which is not Python, is the faster one."""
    return x.is_cuda and x.numel() * len(W) < 2**33


def forms(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether forming a matrix of W's shape and keeping it for backward is the cheapest way to use it with x."""
    return light(x, W) and W.numel() < 2**21


def plainly(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Whether the plain expression runs."""
    return traced() or light(x, W)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def no_autocast(x: torch.Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, while training: with AVX-512 oneDNN's product is the faster one even though it has to reorder b first."""
    return affine(a, b.T, None) if _AVX512 and fast(a, b) else a @ b


def fast(a: torch.Tensor, b: torch.Tensor) -> bool:
    """oneDNN compiles and keeps a kernel for each number of rows, so it gets whole blocks of 256: batches of uneven texts would fill the memory."""
    return _onednn is not None and len(a) % 256 == 0 and a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu


def affine(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b. oneDNN's float32 product is about a tenth faster than the one behind `mm` on x86."""
    return _onednn(x, W, b, "none", [], "")


def linear(rows: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, training: bool) -> torch.Tensor:
    """rows Wᵀ + b, (N, out); outside of training as the base computes it, bit for bit."""
    return (affine if training and fast(rows, W) else F.linear)(rows, W, b)


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
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


def as_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def kept(ctx, inputs) -> torch.Tensor:
    """The input that a forward kept, made again where it kept its recipe."""
    return ctx.recipe(*inputs) if ctx.recipe else inputs[0]


def as_given(grads, like) -> list:
    """Gradients in the shapes and dtypes of what they belong to; `like` holds (shape, dtype) or None."""
    return [t if t is None else t.to(each[1]).reshape(each[0]) for t, each in zip(grads, like, strict=True)]
