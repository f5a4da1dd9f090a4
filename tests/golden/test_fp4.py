"""Formats of FP4 training against microxcaling and torchao."""

import pytest
import torch

from tunesmith.quantize import floats

from .cases import names, read

CASES = {name: read("fp4-training", name) for name in names("fp4-training")}


def having(key):
    return [name for name, case in CASES.items() if key in case.tensors]


def blocks(x, k):
    """x (…, n) as (blocks, k), and the way back."""
    return x.reshape(-1, k), lambda y: y.reshape(x.shape)


def mx(x, k, mode="floor", rounding="even"):
    groups, back = blocks(x, k)
    e = floats.e8m0(groups.abs().amax(1), mode)
    scale = torch.ldexp(torch.ones(len(e), dtype=x.dtype), e)[:, None]
    return back(floats.e2m1(groups / scale, rounding) * scale), e


@pytest.mark.parametrize("name", having("out.shared_exponent"))
def test_mxfp4(name):
    case = CASES[name]
    x, k = case.tensors["in.x"], case.config["block_size"]
    for rounding, key in (("even", "even"), ("away", "nearest"), ("down", "floor")):
        found, e = mx(x, k, rounding=rounding)
        assert torch.equal(found, case.tensors[f"out.dequant_{key}"])
        assert torch.equal(e.float(), case.tensors["out.shared_exponent"].flatten())


@pytest.mark.parametrize("name", having("out.exp_rceil"))
def test_scale_modes(name):
    case = CASES[name]
    for mode in ("floor", "ceil", "rceil", "even"):
        found, e = mx(case.tensors["in.x"], case.config["block_size"], mode)
        assert torch.equal(e.float(), case.tensors[f"out.exp_{mode}"].flatten())
        assert torch.equal(found, case.tensors[f"out.dequant_{mode}"])


@pytest.mark.parametrize("name", having("out.dequant_block_only"))
def test_nvfp4(name):
    case = CASES[name]
    out, k = case.part("out"), case.config["block_size"]
    groups, back = blocks(case.tensors["in.x"], k)
    absmax = groups.abs().amax(1)
    for key, whole, form in (("block_only", torch.tensor(1.0), "e4m3"), ("tensor_scaled", out["tensor_scale"], "e4m3"), ("ue5m3", torch.tensor(1.0), "e5m3")):
        scale = floats.scale8_value(floats.scale8(absmax / 6 / whole, form), form)
        scale = scale.clamp(min=2**-6 if form == "e4m3" else 2**-17)  # torchao has no subnormal scales
        wanted = out["scale_ue5m3" if key == "ue5m3" else f"scale_{key}"].flatten()
        assert torch.equal(scale, wanted)
        v = groups * ((1 / whole) / wanted)[:, None] if form == "e4m3" else groups / wanted[:, None]
        found = back(floats.e2m1(v) * (wanted * whole)[:, None])
        torch.testing.assert_close(found, out[f"dequant_{key}"], atol=1e-7, rtol=1e-5)
        if f"packed_{key}" in out:  # torchao has the even element in the low half of a byte
            codes = floats.e2m1_encode(v).view(*case.tensors["in.x"].shape)
            assert torch.equal(codes[..., 0::2] | codes[..., 1::2] << 4, out[f"packed_{key}"])
