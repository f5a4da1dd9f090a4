"""Ascending positions in few bytes: their differences, seven bits to a byte (LEB128)."""

import numpy as np
import torch
from torch import Tensor

LONGEST = 9  # bytes of the largest difference that int64 holds


def packable(t: Tensor) -> bool:
    """Whether a tensor is a list of ascending positions."""
    return t.dim() == 1 and t.dtype in (torch.int32, torch.int64) and not t.is_meta and len(t) > 0 and bool(t[0] >= 0) and bool((t[1:] > t[:-1]).all())


def packed_size(t: Tensor) -> int:
    """Bytes of a tensor in an adapter's file."""
    return len(pack(t)) if packable(t) else t.numel() * t.element_size()


def pack(positions: Tensor) -> Tensor:
    """Ascending positions ≥ 0 → bytes, lowest seven bits first, the eighth bit saying that more follow."""
    gaps = np.diff(positions.cpu().numpy().astype(np.int64), prepend=0)[:, None]
    place = np.arange(LONGEST)
    length = np.maximum((gaps >> 7 * place > 0).sum(1, keepdims=True), 1)
    digits = (gaps >> 7 * place & 127 | (place < length - 1) << 7).astype(np.uint8)
    return torch.from_numpy(digits[place < length])


def unpack(data: Tensor) -> Tensor:
    """The inverse of `pack`, int64. Raises `ValueError` for bytes that it did not write."""
    digits = data.numpy()
    last = digits < 128
    if data.dim() != 1 or data.dtype != torch.uint8 or not len(digits) or not last[-1]:
        raise ValueError("not packed positions")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    if place.max() >= LONGEST:
        raise ValueError("not packed positions")
    positions = torch.from_numpy(np.add.reduceat((digits & 127).astype(np.int64) << 7 * place, starts).cumsum())
    if not packable(positions) or not torch.equal(pack(positions), data):
        raise ValueError("not packed positions")
    return positions
