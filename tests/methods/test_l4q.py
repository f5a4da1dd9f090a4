"""L4Q: its gradients against straight-through rounding, what is kept, the start, and the integers it ends with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tunesmith import optim
from tunesmith.engine.fused.quantised import FLOOR, quantised, quantised_linear, summed
from tunesmith.engine.model import adapters
from tunesmith.methods.l4q import smallest


def one(n=24, m=20, dtype=torch.float64, bias=True, **fields):
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype)), {"method": "l4q", "group_size": 8, **fields}, targets=["0"])
    return model, model[0].tunesmith.adapters["default"]


def stirred(model, size=0.01):
    """Factors, steps and offsets moved, so far that some weights are clipped."""
    (layer,) = adapters(model, "default").values()
    with torch.no_grad():
        layer.B.normal_(std=size)
        layer.step.mul_(0.5 + 0.5 * torch.rand_like(layer.step))
        layer.offset.normal_(std=size)
    return layer


def numbers(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, g):
        ctx.g = g
        return t.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.g, None


@pytest.mark.parametrize("bits,k,g", [(4, 8, 1.0), (3, 24, 0.1), (2, 4, 1.0), (8, 1, 0.5)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_straight_through_rounding(bits, k, g, bias):
    x, W, c, A, B, b = numbers((2, 3, 24), (20, 24), (20,), (4, 24), (20, 4), (480 // k,))
    s = (3 / 2**bits * (0.5 + torch.rand(480 // k, dtype=torch.float64))).requires_grad_()
    c = c if bias else None
    V = (W + 0.7 * B @ A).view(-1, k)
    s_, b_ = Scaled.apply(s, g)[:, None], Scaled.apply(b, g)[:, None]
    v = (V - b_) / s_
    expected = F.linear(x, (s_ * Round.apply(v.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) + b_).view(20, 24), c)
    y = quantised_linear(x, W, c, A, B, s, b, 0.7, bits, g)
    assert 0.05 < (v.round() - v.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round() != 0).double().mean() < 0.95
    torch.testing.assert_close(y, expected)
    target, leaves = torch.randn_like(y), [t for t in (x, W, c, A, B, s, b) if t is not None]
    found, wanted = (torch.autograd.grad(((z - target) ** 2).sum(), leaves) for z in (y, expected))
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(quantised_linear(x, W, c, A, B, s, b, 0.7, bits, g), expected)


def test_a_weight_on_the_bound_is_not_clipped():
    s, b = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    V = torch.tensor([[7.0, -8.0, 7.25, -9.0]], requires_grad=True)
    quantised(V, s, b, 4).sum().backward()
    assert V.grad.tolist() == [[1, 1, 0, 0]] and s.grad.tolist() == [7 - 8] and b.grad.tolist() == [2]


def test_no_matrix_but_the_weight_is_kept():
    model, layer = one(60, 50, torch.float32, group_size=20)
    stirred(model)
    x, kept = torch.randn(4, 60, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x).sum()
    own = {p.data_ptr() for p in (model[0].weight, model[0].bias, layer.A, layer.B, layer.step, layer.offset, x)}
    assert kept and not [t.shape for t in kept if t.data_ptr() not in own]
    y.backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_starts_on_the_rounded_base_and_clips_nothing(bits):
    model, layer = one(256, 200, torch.float32, bits=bits, group_size=64)
    W = model[0].weight
    v = W.view(-1, 64) / layer.step[:, None]
    assert v.min() >= -(2 ** (bits - 1)) and v.max() <= 2 ** (bits - 1) - 1
    x = torch.randn(3, 256)
    torch.testing.assert_close(model(x), F.linear(x, (v.round() * layer.step[:, None]).view_as(W), model[0].bias))


@pytest.mark.parametrize("bits,k", [(4, 8), (3, 24), (8, 4)])
def test_the_integers_give_what_was_trained(bits, k):
    model, _ = one(bits=bits, group_size=k, dtype=torch.float32)
    stirred(model)
    x = torch.randn(5, 24)
    y = model(x)
    W = ts.merge(model)[0].weight
    assert W.format.group(W.shape) == k and len(W.parts["codes"]) == 20 * 24 * bits / 8
    torch.testing.assert_close(model(x), y, atol=1e-6, rtol=0)
    assert torch.unique(W.dequantize().view(-1, k)[0]).numel() <= 2**bits


def test_a_step_below_zero_comes_back():
    model, layer = one()
    with torch.no_grad():
        layer.step[0] = -0.01
    x = torch.randn(3, 24, dtype=torch.float64)
    W = ts.merge(model)[0].weight.detach().clone()
    assert W[0, :8].abs().max() <= 8 * FLOOR
    ts.unmerge(model)
    model(x).square().sum().backward()
    assert torch.isfinite(layer.step.grad).all() and layer.step.grad[0] != 0


def test_a_row_of_zeros():
    torch.manual_seed(0)
    base = nn.Linear(16, 4)
    nn.init.zeros_(base.weight)
    model = ts.adapt(nn.Sequential(base), "l4q", targets=["0"])
    y = model(torch.randn(2, 16))
    y.sum().backward()
    assert torch.equal(y, base.bias.expand(2, 4)) and all(torch.isfinite(p.grad).all() for p in ts.trainable(model).values())


def test_small_changes_of_a_bfloat16_weight_are_not_lost():
    W, A, B = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(1, 4), torch.full((3, 1), 2.0**-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert (summed(W, A, B, 1.0) == 1 + 2.0**-12).all()


def test_groups():
    sizes = {8: 8, 16: 12, 24: 24, 1000: 24, 7: 8}
    for wanted, k in sizes.items():
        _, layer = one(group_size=wanted)
        assert layer.group_size == k and layer.step.shape == layer.offset.shape == (20 * 24 // k,)


def test_counts():
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    block = nn.Sequential(*(nn.Linear(*shape, device="meta") for shape in shapes))
    assert 32 * ts.summary(ts.adapt(block, {"method": "l4q", "targets": ["[0-6]"]})).trainable == 111_181_824


def test_a_fixed_grid(tmp_path):
    model, layer = one(train_scale=False)
    assert {id(p) for p in ts.trainable(model).values()} == {id(layer.A), id(layer.B)} and ts.summary(model).trainable == 4 * (20 + 24)
    stirred(model)
    x = torch.randn(3, 24, dtype=torch.float64)
    y = model(x)
    y.sum().backward()
    ts.save(model, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(24, 20, dtype=torch.float64))
    fresh.load_state_dict({k: t for k, t in model.state_dict().items() if "tunesmith" not in k})
    assert torch.equal(ts.load(fresh, tmp_path / "a")(x), y)


def test_steps_and_offsets_have_a_rate_of_their_own():
    model, layer = one(lr_ratio=0.05)
    rates = {id(p): group["lr"] for group in optim.build(model, lr=1e-2).param_groups for p in group["params"]}
    assert [rates[id(p)] for p in (layer.A, layer.B, layer.step, layer.offset)] == pytest.approx([1e-2, 1e-2, 5e-4, 5e-4])


def test_the_gradients_of_steps_are_scaled():
    def gradients(grad_scale):
        model, layer = one(grad_scale=grad_scale)
        model(torch.ones(2, 24, dtype=torch.float64)).square().sum().backward()
        return layer.step.grad

    torch.testing.assert_close(gradients("lsq"), gradients(1.0) / (8 * 7) ** 0.5)


@pytest.mark.parametrize(
    "field,value", [("bits", 1), ("bits", 9), ("group_size", 1), ("rank", 0), ("alpha", 0), ("lr_ratio", -1), ("grad_scale", "no"), ("dropout", 0.1)]
)
def test_bad_configs_are_refused(field, value):
    with pytest.raises(ts.TunesmithError, match=f"l4q.*{field}"):
        one(**{field: value})


def test_ends_below_the_target_rounded_to_nearest():
    torch.manual_seed(0)
    x, (model, _) = torch.randn(256, 24), one(dtype=torch.float32, bits=3)
    base = model[0]
    W = base.weight.detach() + 0.1 * torch.randn(20, 2) @ torch.randn(2, 24)
    y, s = F.linear(x, W, base.bias).detach(), smallest(W.view(-1, 8), 3)
    rounded = F.mse_loss(F.linear(x, quantised(W, s, torch.zeros_like(s), 3), base.bias), y).item()
    optimizer, losses = optim.build(model, lr=1e-2), []
    for _ in range(300):
        optimizer.zero_grad()
        value = F.mse_loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < rounded < losses[0]
