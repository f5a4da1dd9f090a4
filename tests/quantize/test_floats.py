"""Small floating-point formats: every code, ties, the ends of the range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.quantize import floats


def test_all_codes_of_e2m1():
    codes = torch.arange(16, dtype=torch.uint8)
    values = torch.tensor(floats.E2M1)
    assert torch.equal(floats.e2m1_encode(values), codes)
    assert torch.equal(floats.e2m1(values), values)
    assert torch.equal(floats.e2m1_encode(torch.tensor([7.0, -100.0, float("inf")])), torch.tensor([7, 15, 7], dtype=torch.uint8))


def test_ties_go_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert floats.e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert floats.e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert floats.e2m1(ties, "away").tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("v", [0.1, 2.3, 5.0, -3.3])
def test_stochastic_rounding_has_the_right_mean(v):
    x = torch.full((200_000,), v)
    drawn = floats.e2m1(x, "stochastic", torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(v, abs=6e-3) and len(drawn.unique()) == 2


@given(st.floats(0, 600, width=32), st.booleans())
def test_e4m3_is_torchs(v, small):
    v = torch.tensor([v / 2**14 if small else v])
    wanted = v.clamp(max=448).to(torch.float8_e4m3fn)
    assert floats.scale8(v, "e4m3").item() == wanted.view(torch.uint8).item()
    assert floats.scale8_value(floats.scale8(v, "e4m3"), "e4m3").item() == wanted.float().item()


@pytest.mark.parametrize(("name", "last"), [("e4m3", 126), ("e5m3", 254)])
def test_all_codes_of_the_scales(name, last):
    codes = torch.arange(last + 1, dtype=torch.uint8)
    values = floats.scale8_value(codes, name)
    assert torch.equal(floats.scale8(values, name), codes) and (values.diff() > 0).all()
    assert values[-1] == floats.SCALES[name][1] and values[1] == {"e4m3": 2**-9, "e5m3": 2**-17}[name]
    middles = (values[1:] + values[:-1]) / 2
    assert torch.equal(floats.scale8(middles, name), codes[:-1] + codes[:-1] % 2)  # ties go to the even code
    assert floats.scale8(torch.tensor([1e9]), name).item() == last


def test_exponents_of_powers_of_two_and_zero():
    absmax = torch.tensor([0.0, 1.0, 4.0, 6.0, 6.1, 7.9, 2.0**-126, 2.0**127])
    assert floats.e8m0(absmax).tolist() == [-127, -2, 0, 0, 0, 0, -127, 125]
    assert floats.e8m0(absmax, "ceil").tolist() == [-127, -2, 0, 1, 1, 1, -127, 125]
    assert floats.e8m0(absmax, "rceil").tolist() == [-127, -2, 0, 0, 1, 1, -127, 125]
    assert floats.e8m0(absmax, "even").tolist() == [-127, -2, 0, 0, 0, 1, -127, 125]
