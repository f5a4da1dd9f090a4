"""Small integers in bytes: 2, 3, 4 or 8 bits each, the first of a byte in its highest bits."""

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # one number of so many bytes


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
    return values(packed, n, bits, torch.arange(2**bits, dtype=torch.uint8, device=packed.device)) if bits < 8 else packed


def values(packed: Tensor, n: int, bits: int, levels: Tensor) -> Tensor:
    """What n packed codes stand for in `levels` (2^bits,), (n,): those of a byte, or of four threes, at once."""
    index, table = packed.int(), _table(bits, packed.device)
    if bits == 3:
        high, low = index.tensor_split((-(-n // 4),))
        index = (high << 4) | torch.stack([low >> 4, low & 15], 1).flatten()[: len(high)]
    return _rows(levels[table.int()], index).flatten()[:n]


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """The entry of `levels` (m,) at each of the codes, in their shape."""
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """The rows of a table (m, each): as one number each, where there is one of their size, which is five times as fast."""
    wide = None if torch.compiler.is_compiling() else WIDE.get(table[0].nbytes)
    return table.index_select(0, index) if wide is None else table.view(wide)[:, 0].index_select(0, index).view(table.dtype)


def size(n: int, bits: int) -> int:
    """Bytes of n packed codes."""
    return -(-n // 4) + -(-n // 8) if bits == 3 else -(-n * bits // 8)


def _shifts(bits: int, device) -> Tensor:
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=device)


def _table(bits: int, device: torch.device) -> Tensor:
    """(256, 8/bits) uint8: the codes in each byte; of three bits (4096, 4), by eight bits of the plane of two and four of the other."""
    if bits == 3:
        i = torch.arange(4096, device=device)[:, None]
        return ((((i >> (_shifts(2, device) + 4)) & 3) << 1) | ((i >> _shifts(1, device)[4:]) & 1)).to(torch.uint8)
    return (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> _shifts(bits, device)) & (2**bits - 1)
