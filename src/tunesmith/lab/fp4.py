"""Training with products in FP4, simulated to the bit: quantised linear layers as a composition of techniques.

Each of a layer's three products quantises both operands along their own contraction axis, in blocks of E2M1 with a scale of 8
bits, and adds up in float32. "Elucidating the Design Space of FP4 training", arXiv 2509.17791.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ..engine.hadamard import transform
from ..errors import TunesmithError, invalid
from ..quantize import floats

Operand = Literal["x", "W", "g"]


class FP4(BaseModel):
    """A way to quantise the products of a linear layer. Raises `TunesmithError` for options that do not go together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["e8m0", "e4m3", "e5m3"] = Field("e8m0", description="of a block: powers of two (MXFP4), NVFP4's, or with one more bit of exponent")
    block: Annotated[int, Field(ge=2)] | None = Field(None, description="numbers that share a scale; default: 16 for e4m3, else 32")
    mode: floats.Mode = Field("floor", description="e8m0: how the exponent is chosen")
    tensor_scale: bool = Field(False, description="e4m3, e5m3: a float32 scale for the whole operand")
    hadamard: Literal["none", "forward", "backward", "both"] = Field("none", description="whose operands are turned by a random Hadamard matrix")
    h: Literal[2, 4, 8, 16, 32, 64, 128] = Field(16, description="order of that matrix")
    stochastic: tuple[Operand, ...] = Field((), description="operands that are rounded up or down at random: x, W, g (of the backward only)")
    estimator: Literal["ste", "scale", "diagonal", "dge"] = Field("ste", description="what the backward takes for the gradient of quantising x and W")

    def __init__(self, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise TunesmithError(invalid("FP4", error, FP4.model_fields, "option")) from None
        if self.scale == "e8m0" and self.tensor_scale:
            raise TunesmithError("tensor_scale is for scales of e4m3 and e5m3; e8m0 has all exponents that float32 has")
        if self.scale != "e8m0" and self.mode != "floor":
            raise TunesmithError(f"mode={self.mode} is for scale e8m0; {self.scale} rounds the scale to nearest")

    @property
    def size(self) -> int:
        """Numbers in a block."""
        return self.block or (16 if self.scale == "e4m3" else 32)

    @property
    def name(self) -> str:
        """The options that are not as usual, in short."""
        form = {"e8m0": "MXFP4", "e4m3": "NVFP4", "e5m3": "UE5M3"}[self.scale]
        parts = [form if self.block is None else f"{form} k={self.block}"]
        parts += [self.mode] * (self.mode != "floor") + ["tensor scale"] * self.tensor_scale
        parts += [f"H{'' if self.h == 16 else self.h} {self.hadamard}"] * (self.hadamard != "none") + [f"SR {''.join(self.stochastic)}"] * bool(self.stochastic)
        return " + ".join(parts + [self.estimator] * (self.estimator != "ste"))


def _blocks(x: Tensor, k: int) -> Tensor:
    """x (m, n) as (m, blocks, k), the last block filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % k)).unflatten(1, (-1, k))


def steps(blocks: Tensor, config: FP4) -> Tensor:
    """What each block's E2M1 values are multiplied by, (m, blocks, 1)."""
    absmax = blocks.abs().amax(-1, keepdim=True)
    return floats.scale_of(floats.fit(absmax, config.scale, config.mode, config.tensor_scale), config.scale, absmax.dtype)


def quantise(x: Tensor, config: FP4, generator: torch.Generator | None = None) -> Tensor:
    """f(x) (m, n) of x, quantised along its rows; rounded at random with a `generator`."""
    blocks = _blocks(x, config.size)
    step = steps(blocks, config)
    return (floats.e2m1(blocks / step, "stochastic" if generator else "even", generator) * step).flatten(1)[:, : x.shape[1]]


def through(x: Tensor, gradient: Tensor, config: FP4, step: Tensor | None = None, kappa: float = 5.0, most: float = 3.0) -> Tensor:
    """∂L/∂x from the gradient of f(x), both (m, n), as the config's estimator has it; `step` as `steps` gives it, if it is known.

    `ste`: as it is. `scale`: also through the block's scale, exact absmax/6, to its largest entry m: Σᵢ gᵢ(Q(vᵢ) − vᵢ)·sign(x_m)/6;
    `diagonal`: of that sum the term of m alone. `dge`: times min(most, |2u − 1|^(1/κ − 1)/κ), u being where between two
    neighbouring values x lies (Wang et al. 2025, arXiv 2501.17116).
    """
    if config.estimator == "ste":
        return gradient
    blocks, g = _blocks(x, config.size), _blocks(gradient, config.size)
    v = blocks / (steps(blocks, config) if step is None else step)
    if config.estimator == "dge":
        size = v.abs().clamp(max=floats.LARGEST)  # what is clipped counts as the largest value
        levels = torch.tensor(floats.E2M1[:8], dtype=v.dtype, device=v.device)
        i = torch.bucketize(size, levels, right=True).clamp(1, 7)
        u = (size - levels[i - 1]) / (levels[i] - levels[i - 1])
        g = g * ((2 * u - 1).abs().clamp(min=1e-12) ** (1 / kappa - 1) / kappa).clamp(max=most)
    else:
        largest = blocks.abs().argmax(-1, keepdim=True)
        lost = g * (floats.e2m1(v) - v)
        lost = lost.sum(-1, keepdim=True) if config.estimator == "scale" else lost.gather(-1, largest)
        g = g.scatter_add(-1, largest, lost * blocks.gather(-1, largest).sign() / floats.LARGEST)
    return g.flatten(1)[:, : x.shape[1]]


def draw_signs(n: int, config: FP4, generator: torch.Generator) -> Tensor:
    """Random ±1 for n numbers, filled up to whole Hadamard matrices."""
    return torch.randint(0, 2, (n + -n % config.h,), generator=generator, device=generator.device, dtype=torch.float32) * 2 - 1


def _hadamard(x: Tensor, h: int) -> Tensor:
    return transform(x.unflatten(1, (-1, h))).flatten(1) / h**0.5


def turn(x: Tensor, signs: Tensor | None, h: int) -> Tensor:
    """x (m, n), filled up with zeros, times the signs and, in blocks, the orthonormal Hadamard matrix of order h; x itself for no signs."""
    return x if signs is None else _hadamard(F.pad(x, (0, len(signs) - x.shape[1])) * signs.to(x), h)


def _estimate(x: Tensor, gradient: Tensor, config: FP4, signs: Tensor | None) -> Tensor:
    """`through` where x was quantised, which is after a turn."""
    if config.estimator == "ste" or signs is None:
        return through(x, gradient, config)
    return (_hadamard(through(turn(x, signs, config.h), turn(gradient, signs, config.h), config), config.h) * signs.to(x))[:, : x.shape[1]]


def product(a: Tensor, b: Tensor, config: FP4, signs: Tensor | None, random: tuple[bool, bool], generator: torch.Generator) -> Tensor:
    """a bᵀ of a (m, n) and b (l, n), both quantised along n, after a turn with the same signs, if any."""
    a, b = (turn(t, signs, config.h) for t in (a, b))
    a, b = (quantise(t, config, generator if drawn else None) for t, drawn in zip((a, b), random, strict=True))
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, config, generator):
        wide = torch.promote_types(x.dtype, torch.float32)  # values times scales have more digits than bfloat16
        rows, W = x.reshape(-1, x.shape[-1]).to(wide), W.to(wide)
        signs = draw_signs(x.shape[-1], config, generator) if config.hadamard in ("forward", "both") else None
        ctx.save_for_backward(rows, W, signs)
        ctx.config, ctx.generator, ctx.shape = config, generator, x.shape
        y = product(rows, W, config, signs, ("x" in config.stochastic, "W" in config.stochastic), generator)
        return (y if b is None else y + b).view(*x.shape[:-1], len(W)).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        rows, W, signs = ctx.saved_tensors
        config, generator = ctx.config, ctx.generator
        noisy = {operand: operand in config.stochastic for operand in ("x", "W", "g")}

        def back(a, b, random):
            return product(a, b, config, draw_signs(a.shape[1], config, generator) if config.hadamard in ("backward", "both") else None, random, generator)

        g, gx, gW = g.reshape(-1, g.shape[-1]).to(rows), None, None
        if ctx.needs_input_grad[0]:
            gx = _estimate(rows, back(g, W.T, (noisy["g"], noisy["W"])), config, signs).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            gW = _estimate(W, back(g.T, rows.T, (noisy["g"], noisy["x"])), config, signs)
        return gx, gW, g.sum(0) if ctx.needs_input_grad[2] else None, None, None


def linear(x: Tensor, W: Tensor, b: Tensor | None, config: FP4 | None, generator: torch.Generator) -> Tensor:
    """y = x Wᵀ + b, x (..., in), W (out, in), its products quantised as `config` says; None: exactly torch's."""
    return F.linear(x, W, b) if config is None else _Linear.apply(x, W, b, config, generator)


class FP4Linear(nn.Linear):
    """A linear layer with quantised products. Weights stay as they are; random numbers are its own, apart from the data's."""

    fp4: FP4
    generator: torch.Generator

    def forward(self, x):
        if self.generator.device != x.device:  # the model has moved
            self.generator = torch.Generator(x.device).manual_seed(self.generator.initial_seed())
        return linear(x, self.weight, self.bias, self.fp4, self.generator)


def convert(model: nn.Module, config: FP4 | None, seed: int = 0, keep: tuple[str, ...] = ()) -> nn.Module:
    """Quantise the products of a model's linear layers, in place, but for those whose path is in `keep`. Returns the model.

    Adapters attached afterwards change the weights whose products are quantised. Raises `TunesmithError` for a model that has some already.
    """
    if "_tunesmith" in model.__dict__:
        raise TunesmithError("this model has adapters; quantise its products before the first one is attached")
    for i, (path, module) in enumerate(model.named_modules()):
        if type(module) is nn.Linear and path not in keep and config is not None:
            module.__class__ = FP4Linear
            module.fp4, module.generator = config, torch.Generator(module.weight.device).manual_seed(seed * 1000 + i)
    return model
