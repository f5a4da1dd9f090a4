"""Quantised products: exact where they should be, to the authors' numbers, and what they cost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.golden.cases import names, read
from tunesmith import TunesmithError
from tunesmith.lab.cost import cost
from tunesmith.lab.fp4 import FP4, FP4Linear, convert, draw_signs, linear, product, quantise, steps, through, turn
from tunesmith.quantize.floats import e2m1

CASES = {name: read("fp4-training", name) for name in names("fp4-training")}


def noise():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "param.weight" in case.tensors])
def test_a_layer_of_microxcaling(name):
    case = CASES[name]
    x, W, b = (case.tensors[key].clone().requires_grad_() for key in ("in.x", "param.weight", "param.bias"))
    y = linear(x, W, b, FP4(block=case.config["block_size"]), noise())
    loss = (y - case.tensors["in.target"]).square().mean()
    loss.backward()
    for found, key in ((y, "out.y"), (loss, "out.loss"), (x.grad, "grad.x"), (W.grad, "grad.weight"), (b.grad, "grad.bias")):
        torch.testing.assert_close(found.detach(), case.tensors[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "grad.ste_with_scale" in case.tensors])
def test_gradients_of_quantising(name):
    case = CASES[name]
    x, g, k = case.tensors["in.x"], case.tensors["in.g"], case.config["block_size"]
    step = x.unflatten(1, (-1, k)).abs().amax(-1, keepdim=True) / 6
    assert torch.equal(through(x, g, FP4(block=k)), case.tensors["grad.ste_only"])
    torch.testing.assert_close(through(x, g, FP4(block=k, estimator="scale"), step), case.tensors["grad.ste_with_scale"])
    torch.testing.assert_close(through(x, torch.ones_like(g), FP4(block=k, estimator="dge"), step, case.config["dge_k"], case.config["dge_clip"]), case.tensors["out.dge_factor"])
    assert torch.equal(through(x, g, FP4(block=k, estimator="diagonal"), step), g)  # the largest entry is on the grid under an exact scale


def test_without_a_format_it_is_torchs_layer_bit_for_bit():
    x, W, b = torch.randn(3, 7, 20), torch.randn(5, 20), torch.randn(5)
    assert torch.equal(linear(x, W, b, None, noise()), F.linear(x, W, b))
    layer = nn.Linear(20, 5)
    assert type(convert(nn.Sequential(layer), None)[0]) is nn.Linear


def test_turning_both_operands_changes_nothing_but_the_rounding(monkeypatch):
    from tunesmith.lab import fp4

    a, b = torch.randn(4, 50, dtype=torch.float64), torch.randn(6, 50, dtype=torch.float64)
    config = FP4(hadamard="both")
    signs = draw_signs(50, config, noise())
    assert not torch.allclose(product(a, b, config, signs, (False, False), noise()), a @ b.T, rtol=1e-3)
    monkeypatch.setattr(fp4, "quantise", lambda x, config, generator=None: x)
    assert torch.allclose(product(a, b, config, signs, (False, False), noise()), a @ b.T)


@pytest.mark.parametrize("hadamard", ["none", "forward"])
def test_the_gradient_of_a_scale_is_taken_where_it_is_quantised(hadamard):
    x, W, g = torch.randn(4, 50, dtype=torch.float64, requires_grad=True), torch.randn(6, 50, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    config = FP4(scale="e5m3", hadamard=hadamard, estimator="scale")
    linear(x, W, None, config, noise()).backward(g)
    signs = draw_signs(50, config, noise()) if hadamard == "forward" else None
    again = x.detach().clone().requires_grad_()
    blocks = F.pad(z := turn(again, signs, config.h), (0, -z.shape[1] % 32)).unflatten(1, (-1, 32))
    exact = blocks.abs().amax(-1, keepdim=True) / 6
    step = exact + (steps(blocks, config) - exact).detach()
    v = blocks / step
    f = ((v + (e2m1(v) - v).detach()) * step).flatten(1)[:, : z.shape[1]]
    (f * turn(product(g, W.T, config, None, (False, False), noise()), signs, config.h)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_products_of_bfloat16_are_computed_in_float32():
    x, W, config = torch.randn(5, 64).bfloat16().requires_grad_(), torch.randn(6, 64).bfloat16().requires_grad_(), FP4(scale="e4m3", tensor_scale=True)
    y = linear(x, W, None, config, noise())
    y.sum().backward()
    assert torch.equal(y, linear(x.float(), W.float(), None, config, noise()).bfloat16())
    assert x.grad.dtype == W.grad.dtype == y.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [FP4(), FP4(scale="e4m3"), FP4(scale="e4m3", tensor_scale=True), FP4(scale="e5m3"), FP4(mode="rceil"), FP4(scale="e5m3", tensor_scale=True, block=8)])
def test_zeros_outliers_and_short_blocks(config):
    x = torch.zeros(3, 37)
    assert torch.equal(quantise(x, config), x)
    x[1], x[2, 5] = torch.randn(37), 1e4
    back = quantise(x, config)
    assert torch.isfinite(back).all() and back.shape == x.shape and (back[1] - x[1]).norm() < 0.2 * x[1].norm() + (0 if not config.tensor_scale else 9)
    assert (steps(x[:, :32].unflatten(1, (-1, config.size)), config) > 0).all()


def test_rounding_at_random_is_unbiased_and_reproducible():
    x = torch.randn(1, 32).repeat(4000, 1)
    config = FP4(mode="rceil")
    mean = quantise(x, config, noise()).mean(0)
    assert torch.allclose(mean, x[0], atol=0.05) and torch.equal(quantise(x, config, noise()), quantise(x, config, noise()))
    assert (quantise(x, config)[0] - x[0]).abs().max() > 0.05


def test_converting_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    convert(model, FP4(stochastic=("g",), hadamard="backward"), keep=("2",))
    assert type(model[0]) is FP4Linear and type(model[2]) is nn.Linear
    x, y = torch.randn(64, 32), torch.randn(64, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": "e3m4"}, "scale='e3m4' is not valid"),
        ({"hadamrd": "both"}, "no option 'hadamrd' .*hadamard"),
        ({"tensor_scale": True}, "tensor_scale is for scales of e4m3 and e5m3"),
        ({"scale": "e4m3", "mode": "ceil"}, "mode=ceil is for scale e8m0"),
        ({"block": 1}, "block=1 is not valid"),
    ],
)
def test_options_that_are_wrong_are_named(options, match):
    with pytest.raises(TunesmithError, match=match):
        FP4(**options)


def test_the_counts_of_the_worked_layer():
    plain = cost(FP4(), 4096, 4096, 11008)
    assert plain.flops_gemm == pytest.approx(1.108e12, rel=1e-3) and plain.ops_vector == 4 * 213_909_504 and plain.rng_draws == plain.syncs == 0
    turned = cost(FP4(hadamard="backward"), 4096, 4096, 11008)
    assert turned.flops_hadamard == 152_043_520 * 32 and turned.flops_hadamard / (plain.flops_gemm * 2 / 3) == pytest.approx(0.0066, abs=1e-4)
    assert cost(FP4(scale="e4m3", tensor_scale=True)).syncs == 6 and cost(FP4(stochastic=("g",))).rng_draws == 2 * 4096 * 11008
    assert plain.bytes == 2 * 213_909_504 + 213_909_504 // 2 + 213_909_504 // 32 and plain.overhead == pytest.approx(1250 * plain.bytes / plain.flops_gemm)
    assert cost(None).overhead == 0 < plain.overhead == cost(FP4(stochastic=("g",))).overhead  # bound by memory


def test_an_adapter_on_quantised_products_keeps_them():
    import tunesmith as ts

    torch.manual_seed(0)
    x, exact = torch.randn(4, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    expected = exact(x)
    model = convert(exact, FP4())
    quantised = model(x)
    assert (quantised - expected).abs().max() > 1e-3
    assert torch.equal(ts.adapt(model, "lora", targets="0")(x), quantised)
    with pytest.raises(TunesmithError, match="has adapters; quantise its products before"):
        convert(model, FP4())


def test_products_add_up_in_float32_under_autocast():
    layer = convert(nn.Sequential(nn.Linear(64, 16)), FP4(scale="e4m3", tensor_scale=True))
    x = torch.randn(8, 64)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
    assert layer(x[:0]).shape == (0, 16)
