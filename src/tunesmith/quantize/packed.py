"""A weight that is stored in few bits and read as a matrix: each use dequantises it, and nothing keeps the result."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.fused import frozen_linear
from ..errors import TunesmithError
from .formats import Format, Parts

aten = torch.ops.aten


class PackedWeight(Tensor):
    """A matrix (out, in) held as the `parts` of a `Format`.

    Any operation on it runs on the dequantised matrix and gives ordinary tensors; detaching, copying, moving and changing its
    dtype (that of the matrix it is read as) keep it packed. It cannot be changed in place. As the weight of `F.linear` it is
    dequantised in forward and once more in backward. `original`: the matrix it was made from, where that is kept.
    """

    format: Format
    parts: Parts
    original: Tensor | None

    @staticmethod
    def __new__(cls, format: Format, parts: Parts, shape, dtype: torch.dtype, original: Tensor | None = None):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts["codes"].device)

    def __init__(self, format: Format, parts: Parts, shape, dtype: torch.dtype, original: Tensor | None = None):
        self.format, self.parts, self.original = format, parts, original

    @classmethod
    def of(cls, W: Tensor, format: Format, keep: bool = False) -> "PackedWeight":
        """W (out, in) rounded to nearest."""
        W = W.detach()
        return cls(format, format.encode(W), W.shape, W.dtype, W if keep else None)

    def dequantize(self) -> Tensor:
        """The matrix, in this weight's dtype."""
        return self.format.decode(self.parts, self.shape).to(self.dtype)

    def with_parts(self, **parts: Tensor) -> "PackedWeight":
        """The same codes with some other parts."""
        return PackedWeight(self.format, self.parts | parts, self.shape, self.dtype)

    def _like(self, change, dtype: torch.dtype | None = None) -> "PackedWeight":
        original = None if self.original is None else change(self.original)
        return PackedWeight(self.format, {name: change(t) for name, t in self.parts.items()}, self.shape, dtype or self.dtype, original)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts.values())

    def __repr__(self):
        return f"PackedWeight({self.format.format}, {tuple(self.shape)}, {self.nbytes:,} bytes)"

    def __tensor_flatten__(self):
        for name, part in self.parts.items():
            object.__setattr__(self, f"part_{name}", part)
        return [f"part_{name}" for name in self.parts], (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        format, dtype = context
        return PackedWeight(format, {name.removeprefix("part_"): t for name, t in inner.items()}, size, dtype)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = _as(self, self._like(torch.clone))
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.format, self.parts, tuple(self.shape), self.dtype, self.requires_grad, isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            call = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            if isinstance(call["weight"], PackedWeight) and not isinstance(call["input"], PackedWeight):
                return frozen_linear(call["input"], call["weight"], call.get("bias"))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})  # results of other operations are ordinary tensors

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._can_decompose() and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
            return result
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func in (aten.detach.default, aten.alias.default):
                return first._like(lambda t: t)
            if func is aten.clone.default:
                return first._like(torch.clone)
            if func is aten._to_copy.default:
                device = kwargs.get("device") or first.device
                return first._like(lambda t: t.to(device), kwargs.get("dtype"))
            if func is aten.copy_.default and isinstance(args[1], PackedWeight) and args[1].format == first.format and args[1].shape == first.shape:
                for name, part in first.parts.items():
                    part.copy_(args[1].parts[name])
                return first
            if func._schema.is_mutable and func._schema.arguments[0].is_write:
                raise TunesmithError(f"a weight in {first.format.format} cannot be changed in place ({func._schema.name}); dequantise it first")
        plain = lambda t: t.dequantize() if isinstance(t, PackedWeight) else t  # noqa: E731
        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs))


def _as(like: PackedWeight, new: PackedWeight) -> PackedWeight:
    return torch.nn.Parameter(new, requires_grad=like.requires_grad) if isinstance(like, torch.nn.Parameter) else new


def _rebuild(format, parts, shape, dtype, requires_grad, parameter):
    new = PackedWeight(format, parts, shape, dtype)
    return torch.nn.Parameter(new, requires_grad=requires_grad) if parameter else new
