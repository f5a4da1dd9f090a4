"""Small integers in bytes: 2, 3, 4 or 8 bits each, the first of a byte in its highest bits."""

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 below 2^bits → (⌈n·bits/8⌉,) uint8; three bits are a plane of two and a plane of one, each padded to a byte."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes >> 1, 2), _pack(codes & 1, 1)])
    return _pack(codes, bits)


def _pack(codes: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -len(codes) % each)).view(-1, each)
    return (rows << _shifts(bits, codes.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of `pack`: (n,) uint8."""
    if bits == 8:
        return packed
    if bits == 3:
        high = -(-n // 4)
        return (unpack(packed[:high], n, 2) << 1) | _look_up(packed[high:], n, _table(1, packed.device))
    return _look_up(packed, n, _table(bits, packed.device))


def values(packed: Tensor, n: int, bits: int, levels: Tensor) -> Tensor:
    """What n packed codes stand for in `levels` (2^bits,), (n,)."""
    if bits in (3, 8):
        return levels.index_select(0, unpack(packed, n, bits).int())
    return _look_up(packed, n, levels[_table(bits, packed.device).int()])  # a byte's values at once


def _look_up(packed: Tensor, n: int, table: Tensor) -> Tensor:
    """The entries of `table` (256, each) that bytes stand for."""
    return table.index_select(0, packed.int()).flatten()[:n]


def size(n: int, bits: int) -> int:
    """Bytes of n packed codes."""
    return -(-n // 4) + -(-n // 8) if bits == 3 else -(-n * bits // 8)


def _shifts(bits: int, device) -> Tensor:
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=device)


def _table(bits: int, device: torch.device) -> Tensor:
    """(256, 8/bits) uint8: the codes in each byte."""
    return (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> _shifts(bits, device)) & (2**bits - 1)
