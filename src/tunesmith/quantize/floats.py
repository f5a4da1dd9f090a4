"""Floating-point formats of 4 and 8 bits, to the bit: E2M1 for weights, E8M0, E4M3 and E5M3 without a sign for scales.

OCP Microscaling Formats 1.0 and NVFP4; UE5M3 as in arXiv 2509.17791. Everything is computed in the dtype that is given, float32
or float64, and exponents are read off the numbers' bits.
"""

from typing import Literal

import torch
from torch import Tensor

from .bits import look_up

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # by code
LARGEST = 6.0
SCALES = {"e4m3": (-6, 448.0), "e5m3": (-14, 114688.0)}  # exponent of the smallest normal number, largest number
Mode = Literal["floor", "ceil", "rceil", "even"]


def exponent(v: Tensor) -> Tensor:
    """⌊log₂ v⌋ of positive v, int32; of 0 it is −127."""
    return torch.where(v > 0, torch.frexp(v).exponent - 1, -127)


def _round(v: Tensor, rounding: str, generator: torch.Generator | None = None) -> Tensor:
    if rounding == "even":
        return v.round()
    if rounding == "away":
        return (v + 0.5).floor()
    if rounding == "down":
        return v.floor()
    return (v + torch.rand(v.shape, dtype=v.dtype, device=v.device, generator=generator)).floor()


def e2m1(v: Tensor, rounding: Literal["even", "away", "down", "stochastic"] = "even", generator: torch.Generator | None = None) -> Tensor:
    """v rounded to E2M1's values, those beyond ±6 to ±6. `stochastic`: up with the probability that makes the mean v."""
    size = v.abs()
    step = torch.ldexp(torch.full_like(v, 0.5), exponent(size).clamp(0, 2))
    return torch.copysign((_round(size / step, rounding, generator) * step).clamp(max=LARGEST), v)


def e2m1_encode(v: Tensor) -> Tensor:
    """The codes of v rounded to nearest, ties to even: uint8 below 16, bit 3 being the sign."""
    size = e2m1(v).abs()
    e = exponent(size).clamp(min=0)
    code = torch.where(size >= 1, 2 * e + torch.ldexp(size, 1 - e).int(), (2 * size).int())
    return (code + 8 * torch.signbit(v)).to(torch.uint8)


def e8m0(absmax: Tensor, mode: Mode = "floor") -> Tensor:
    """Exponents −127 to 127 of the powers of two that scale blocks of E2M1 with these largest magnitudes, int32.

    `floor`: ⌊log₂ Z⌋ − 2 (OCP), whose largest entries may clip; `ceil`: ⌈log₂ Z⌉ − 2; `rceil`: ⌈log₂ Z/6⌉, which clips nothing;
    `even`: as floor, of Z rounded to one bit after the point.
    """
    if mode == "rceil":
        absmax = absmax / LARGEST
    if mode == "even":
        e = exponent(absmax)
        absmax = torch.ldexp(torch.ldexp(absmax, 1 - e).round(), e - 1)
    e = exponent(absmax)
    up = (mode in ("ceil", "rceil")) & (torch.frexp(absmax).mantissa != 0.5) & (absmax > 0)
    return (e + up - (0 if mode == "rceil" else 2)).clamp(-127, 127)


def scale8(v: Tensor, name: Literal["e4m3", "e5m3"]) -> Tensor:
    """Codes of v ≥ 0 in an unsigned format with 3 bits after the point, uint8: ties to even, v beyond the largest to the largest."""
    low, largest = SCALES[name]
    v = v.clamp(max=largest)
    e = exponent(v).clamp(min=low)
    q = torch.ldexp(v, 3 - e).round()  # 8 to 16 where v is normal
    return ((e - low) * 8 + q.int()).to(torch.uint8)


def scale8_value(codes: Tensor, name: Literal["e4m3", "e5m3"], dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `scale8`."""
    low, every = SCALES[name][0], torch.arange(256, device=codes.device)
    e, m = every // 8, (every % 8).to(dtype)
    known = torch.where(e == 0, torch.ldexp(m, torch.tensor(low - 3)), torch.ldexp(m + 8, e + low - 4))
    return look_up(known, codes)


def fit(absmax: Tensor, name: Literal["e8m0", "e4m3", "e5m3"], mode: Mode = "floor", tensor_scale: bool = False) -> dict[str, Tensor]:
    """The stored scales of blocks with these largest magnitudes: codes, uint8 in absmax's shape, and with a tensor scale one number, `tensor`."""
    if name == "e8m0":
        return {"scale": (e8m0(absmax, mode) + 127).to(torch.uint8)}
    whole = absmax.amax() / (LARGEST * SCALES[name][1]) if tensor_scale and absmax.numel() else absmax.new_ones(())
    whole = torch.where(whole > 0, whole, 1)
    codes = scale8(absmax / (LARGEST * whole), name).clamp(min=1)  # a scale of 0 would lose a block of small weights whole
    return {"scale": codes} | ({"tensor": whole} if tensor_scale else {})


def scale_of(parts: dict[str, Tensor], name: Literal["e8m0", "e4m3", "e5m3"], dtype: torch.dtype = torch.float32) -> Tensor:
    """What the E2M1 values of each block are multiplied by, above 0."""
    codes = parts["scale"]
    if name == "e8m0":
        return torch.ldexp(torch.ones(codes.shape, dtype=dtype, device=codes.device), codes.int() - 127)
    value = scale8_value(codes, name, dtype)
    return value if "tensor" not in parts else value * parts["tensor"]
