"""How a matrix is stored in few bits: groups of consecutive weights, each with its own statistics, and a code for each weight.

A format fits statistics to groups, rounds weights to codes and gives the codes' values back. Weights are rounded for the
statistics as they are stored. Everything is in float32, as wide as the weights are at least.
"""

import functools
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import TunesmithError, nearest
from . import bits as packing
from . import floats
from .clusters import kmeans

Parts = dict[str, Tensor]

SMALL = {"mx": ("e8m0", False), "nv": ("e4m3", True)}  # family: (scales of blocks, whether the matrix has one too)
BLOCK = 256  # numbers in 8 bits that share a scale


@functools.cache
def normal_levels(b: int) -> list[float]:
    """NF-b: 2^b quantiles of N(0, 1) over [−1, 1] with an exact zero, ascending. QLoRA (arXiv 2305.14314), as its code computes them."""
    from scipy.stats import norm

    offset, half = 0.9677083, 2 ** (b - 1)
    positive = norm.ppf(torch.linspace(offset, 0.5, half + 1)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, half)[:-1])
    levels = torch.tensor([*positive, 0.0, *negative], dtype=torch.float32).sort().values
    return (levels / levels.max()).tolist()


@functools.cache
def dynamic_map() -> list[float]:
    """The 256 signed values of the 8-bit scales of scales, ascending (bitsandbytes' dynamic map)."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
    return sorted([*positive, *(-p for p in positive), 0.0, 1.0])


@functools.cache
def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n whose ratio to `wanted` is nearest to 1; the smaller of two that are as near."""
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    return min(divisors, key=lambda k: max(k / wanted, wanted / k))


def closest(v: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of ascending levels, uint8; the lower one of two that are as near."""
    return torch.bucketize(v, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


class Format(BaseModel):
    """A number format of weights.

    `nf4`, `nf3`, `nf2`: quantiles of the normal distribution times the group's largest magnitude (QLoRA). `int8` to `int2`:
    (code − zero)·scale, the range of a group reaching over 0. `mxfp4`, `nvfp4`: E2M1 times a scale of 8 bits (E8M0; E4M3 with
    one float32 for the matrix). `sketch4` to `sketch2`: each group has a table of its own, found by k-means (SketchTune).
    `group_size`: weights that share statistics, consecutive in a row, or "row"; where it does not divide a row, the divisor
    nearest to it does, the row itself if need be (nf groups run on over the rows instead).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["nf4", "nf3", "nf2", "int8", "int4", "int3", "int2", "mxfp4", "nvfp4", "sketch4", "sketch3", "sketch2"] = "nf4"
    group_size: int | Literal["row"] | None = Field(None, description="default: 64 for nf and int, 32 for mxfp4, 16 for nvfp4, a row for sketch")
    double_quant: bool = Field(False, description="nf: scales in 8 bits, with a scale for each 256 of them")

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise TunesmithError(_sentence(error)) from None
        if isinstance(self.group_size, int) and self.group_size < 2:
            raise TunesmithError(f"group_size={self.group_size}: at least two weights share a scale")
        if self.double_quant and self.family != "nf":
            raise TunesmithError(f"double_quant is for nf formats; the scales of {self.format} are of 8 or 16 bits as they are")

    @property
    def family(self) -> str:
        return self.format.rstrip("0123456789").removesuffix("fp")

    @property
    def bits(self) -> int:
        return int(self.format[-1])

    def group(self, shape: tuple[int, int]) -> int:
        """Weights in a group of a matrix (out, in)."""
        wanted = self.group_size or {"nf": 64, "int": 64, "mx": 32, "nv": 16, "sketch": "row"}[self.family]
        wanted = shape[1] if wanted == "row" else wanted
        return wanted if self.runs_on else nearest_divisor(shape[1], wanted)

    @property
    def runs_on(self) -> bool:
        """Whether groups run on over the rows, the last one being filled up with zeros."""
        return self.family == "nf"

    def groups(self, W: Tensor) -> Tensor:
        """W (out, in) as (groups, k)."""
        k = self.group(W.shape)
        return torch.nn.functional.pad(W.flatten(), (0, -W.numel() % k)).view(-1, k)

    def encode(self, W: Tensor) -> Parts:
        """The stored parts of W (out, in), rounded to nearest."""
        groups = self.groups(W.to(torch.promote_types(W.dtype, torch.float32)))
        exact = self.fit(groups)
        parts = self.store(exact)
        codes = self.code(groups, exact if self.double_quant else self.stats(parts))  # QLoRA rounds weights before it does scales
        return {"codes": self.pack(codes, W.numel())} | parts

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The matrix (out, in) that the parts stand for, float32 (float64 where statistics are)."""
        stats, n, k = self.stats(parts), shape[0] * shape[1], self.group(shape)
        if self.family == "sketch":
            return self.value(self.unpack(parts["codes"], shape), stats).view(shape)
        codes, scale = parts["codes"], stats["scale"]
        values = codes.to(scale.dtype) if self.bits == 8 else packing.values(codes, n, self.bits, self.levels(scale))
        values = torch.nn.functional.pad(values, (0, -n % k)) if n % k else values
        return self._scaled(values.view(-1, k), stats).flatten()[:n].view(shape)

    def pack(self, codes: Tensor, n: int) -> Tensor:
        return packing.pack(codes.flatten()[:n], self.bits)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Codes (groups, k) uint8."""
        k, n = self.group(shape), shape[0] * shape[1]
        codes = packing.unpack(packed, n, self.bits)
        return (torch.nn.functional.pad(codes, (0, -n % k)) if n % k else codes).view(-1, k)

    # What follows differs by family. Groups (n, k); statistics are tensors of n rows.

    def fit(self, groups: Tensor, weights: Tensor | None = None) -> Parts:
        """Exact statistics of groups; `weights` (n, k) or (k,) say how much each entry matters to a table."""
        if self.family == "nf":
            return {"scale": groups.abs().amax(1)}
        if self.family == "int":
            return affine(groups, self.bits)
        if self.family == "sketch":
            return {"table": kmeans(groups, 2**self.bits, weights)}
        name, tensor_scale = SMALL[self.family]
        return floats.fit(groups.abs().amax(1), name, tensor_scale=tensor_scale)

    def store(self, stats: Parts) -> Parts:
        """Statistics as they are kept."""
        if self.family == "nf" and self.double_quant:
            return nested(stats["scale"])
        if self.family == "int":
            return {"scale": _half(stats["scale"]), "zero": stats["zero"].to(torch.uint8)}
        if self.family == "sketch":
            return {"table": _half(stats["table"])}
        return stats

    def stats(self, parts: Parts) -> Parts:
        """The inverse of `store`, as floating point."""
        if self.family == "nf" and self.double_quant:
            return {"scale": unnested(parts)}
        if self.family in ("mx", "nv"):
            return {"scale": floats.scale_of(parts, SMALL[self.family][0])}
        return {name: t if t.dtype == torch.float64 else t.float() for name, t in parts.items() if name != "codes"}

    def code(self, groups: Tensor, stats: Parts) -> Tensor:
        """The nearest codes, (n, k) uint8."""
        if self.family == "int":
            return ((groups / stats["scale"][:, None]).round_().add_(stats["zero"][:, None])).clamp_(0, 2**self.bits - 1).to(torch.uint8)
        if self.family == "sketch":
            table, order = stats["table"].sort(1)
            return order.gather(1, torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, groups.contiguous())).to(torch.uint8)
        scaled = groups / torch.where(stats["scale"] == 0, 1, stats["scale"])[:, None]
        return closest(scaled, self.levels(groups)) if self.family == "nf" else floats.e2m1_encode(scaled)

    def value(self, codes: Tensor, stats: Parts) -> Tensor:
        """What codes (n, k) stand for."""
        if self.family == "sketch":
            table = stats["table"]
            if torch.is_grad_enabled() and table.requires_grad:
                return table.gather(1, codes.long())
            first = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=table.device)
            return packing.look_up(table.flatten(), codes + first[:, None])
        return self._scaled(packing.look_up(self.levels(stats["scale"]), codes), stats)

    def levels(self, like: Tensor) -> Tensor:
        """The values of the codes before scaling, (2^bits,)."""
        known = range(2**self.bits) if self.family == "int" else normal_levels(self.bits) if self.family == "nf" else floats.E2M1
        return torch.tensor(known, dtype=like.dtype, device=like.device)

    def _scaled(self, values: Tensor, stats: Parts) -> Tensor:
        values, scale = values.sub_(stats["zero"][:, None]) if self.family == "int" else values, stats["scale"][:, None]
        return values * scale if scale.requires_grad else values.mul_(scale)

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a stored matrix (out, in), in closed form."""
        n, k = shape[0] * shape[1], self.group(shape)
        groups = -(-n // k)
        each = {"nf": 4, "int": 3, "mx": 1, "nv": 1, "sketch": 2 * 2**self.bits}[self.family]
        scales = groups + 4 * -(-groups // BLOCK) + 4 if self.double_quant else groups * each + (4 if self.family == "nv" else 0)
        return packing.size(n, self.bits) + scales


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "quantize"
    if first["type"] == "extra_forbidden":
        return f"quantize has no field {name!r}{nearest(name, Format.model_fields)}"
    known = Format.model_fields["format"].annotation.__args__
    if name == "format":
        return f"unknown number format {first['input']!r}{nearest(str(first['input']), known) or '; there are ' + ', '.join(known)}"
    right = 'a whole number or "row"' if name.startswith("group_size") else "true or false"
    return f"quantize: {name.split('.')[0]}={first['input']!r} is not valid; it is {right}"


def parse(value: Any) -> Format:
    """A format from its name, a mapping with the key `format`, or itself."""
    if isinstance(value, Format):
        return value
    if not isinstance(value, str | dict):
        raise TunesmithError(f"a number format is a name such as nf4, or a mapping such as {{format: int4, group_size: 64}}, not {value!r:.80}")
    return Format(**({"format": value} if isinstance(value, str) else value))


def affine(groups: Tensor, bits: int) -> Parts:
    """Asymmetric min–max scales and zero points of groups (n, k), (n,) each: round-to-nearest's."""
    low, high = groups.amin(1).clamp_(max=0), groups.amax(1).clamp_(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, 1, scale)
    return {"scale": scale, "zero": (-low / scale).round_()}


def nested(scale: Tensor) -> Parts:
    """Double quantisation of scales (n,): 8-bit codes, a float32 scale for each 256 of them and the mean."""
    offset = scale.mean()
    codes, outer = blockwise(scale - offset, dynamic_map())
    return {"scale": codes, "outer": outer, "offset": offset}


def unnested(parts: Parts) -> Tensor:
    return unblocked(parts["scale"], parts["outer"], dynamic_map()).add_(parts["offset"])


def blockwise(x: Tensor, levels: list[float]) -> tuple[Tensor, Tensor]:
    """Codes of x, uint8 in its shape, among ascending levels of −1 to 1, and the largest magnitude of each 256 consecutive entries."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    codes = closest(blocks / torch.where(scale == 0, 1, scale)[:, None], torch.tensor(levels).to(x))
    return codes.flatten()[: x.numel()].view(x.shape).clone(), scale


def unblocked(codes: Tensor, scale: Tensor, levels: list[float]) -> Tensor:
    """The values that `blockwise` rounded to, in scale's dtype."""
    values = packing.look_up(torch.tensor(levels).to(scale), codes.flatten())
    return values.mul_(scale.repeat_interleave(BLOCK)[: len(values)]).view(codes.shape)


def _half(t: Tensor) -> Tensor:
    """As float16, unless it is of double precision, which is for checking the maths."""
    return t if t.dtype == torch.float64 else t.clamp(-65504, 65504).half()
