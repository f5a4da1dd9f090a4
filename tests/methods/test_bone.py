"""Bone, Bat and MiSS: the formulas entry by entry, the fused gradients, the paper's sizes, what each refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tunesmith as ts
from tests import tiny
from tests.engine.test_fused import agree, gradients, normal, saved_by
from tunesmith.engine.fused import Recipe, block_sum_linear, shared_block


def site(out, size):
    return SimpleNamespace(out_features=out, in_features=size, shape=(out, size), path="layer")


def linear(out, size, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, out, bias, dtype=dtype))


def adapted(out, size, method, dtype=torch.float64, std=0.5):
    """(model of one layer, its D after a change, W)."""
    model = ts.adapt(linear(out, size, dtype), method, targets=["0"])
    (D,) = ts.trainable(model).values()
    with torch.no_grad():
        D.copy_(std * normal(*D.shape, grad=False))
    return model, D.detach(), model[0].weight.detach().clone()


def change(model):
    before = model[0].weight.detach().clone()
    after = ts.merge(model)[0].weight.detach().clone()
    ts.unmerge(model)
    return after - before


# The formulas, entry by entry.


@pytest.mark.parametrize("method,width", [("bone", 6), ("miss", 6), ({"method": "miss", "init_weights": "mini", "mini_r": 3}, 3)])
def test_every_entry_of_the_shared_block(method, width):
    method = ({"method": method} if isinstance(method, str) else method) | {"rank": 3}
    model, D, W = adapted(6, 8, method)
    assert D.shape == (3, width)
    expected = torch.tensor([[D[j % 3, o % width] for j in range(8)] for o in range(6)])
    torch.testing.assert_close(change(model), expected)
    x = normal(2, 4, 8)
    torch.testing.assert_close(model(x), F.linear(x, W + expected, model[0].bias))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_every_block_of_bat(axis):
    model, D, W = adapted(6, 8, {"method": "bat", "rank": 2, "axis": axis})
    assert D.shape == ((3, 2, 2) if axis == "out" else (4, 2, 2))
    expected = torch.empty(6, 8, dtype=torch.float64)
    for o in range(3):
        for i in range(4):
            at = slice(2 * o, 2 * o + 2), slice(2 * i, 2 * i + 2)
            mine = D[o if axis == "out" else i]
            expected[at] = W[at] @ mine + mine
            unmerged = (W[at] + expected[at] - mine) @ torch.linalg.inv(torch.eye(2) + mine)
            torch.testing.assert_close(unmerged, W[at])
    torch.testing.assert_close(change(model), expected)
    x = normal(2, 4, 8)
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, W + expected, model[0].bias))
    theirs = torch.autograd.grad(F.linear(x, W + expected).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad((y - model[0].bias).square().sum(), x), theirs)


def test_miss_in_bat_mode_is_bat():
    ours, theirs = (adapted(6, 8, m)[0] for m in ({"method": "miss", "rank": 2, "init_weights": "bat"}, {"method": "bat", "rank": 2}))
    assert torch.equal(change(ours), change(theirs))


def test_bat_of_a_multiple_of_the_identity():
    model, D, W = adapted(6, 6, {"method": "bat", "rank": 3})
    (parameter,) = ts.trainable(model).values()
    with torch.no_grad():
        parameter.copy_(0.25 * torch.eye(3))
    torch.testing.assert_close(change(model), 0.25 * W + 0.25 * torch.eye(3, dtype=W.dtype).tile(2, 2))


def test_bone_is_lora_with_the_tiled_identity():
    model, D, W = adapted(6, 9, {"method": "bone", "rank": 3})
    twin = ts.adapt(linear(6, 9), {"method": "lora", "rank": 3, "alpha": 3}, targets=["0"])
    lora = twin[0].tunesmith.adapters["default"]
    E = torch.eye(3, dtype=torch.float64).repeat(1, 3)
    with torch.no_grad():
        lora.A.copy_(E), lora.B.copy_(D.T)
    x = normal(5, 9)
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(E @ E.T, 9 / 3 * torch.eye(3, dtype=E.dtype))
    assert torch.linalg.matrix_rank(change(model)) == 3


def test_bat_has_full_rank():
    assert torch.linalg.matrix_rank(change(adapted(6, 8, {"method": "bat", "rank": 2})[0])) == 6


def test_mini_as_wide_as_the_output_is_bone():
    ours, theirs = (adapted(6, 8, m)[0] for m in ({"method": "miss", "rank": 3, "init_weights": "mini", "mini_r": 6}, {"method": "bone", "rank": 3}))
    assert torch.equal(change(ours), change(theirs))


def test_mini_as_wide_as_the_input_shares_along_the_output():
    model, D, _ = adapted(6, 8, {"method": "miss", "rank": 8, "init_weights": "mini", "mini_r": 2})
    torch.testing.assert_close(change(model), D.T.repeat(3, 1))  # eq. 3 with two shards


def test_columns_of_zeros_change_nothing():
    t = {n: normal(*s) for n, s in {"x": (2, 5), "W": (6, 5), "D": (3, 6)}.items()}
    wide = block_sum_linear(F.pad(t["x"], (0, 1)), F.pad(t["W"], (0, 1)), None, t["D"])
    torch.testing.assert_close(wide, block_sum_linear(t["x"], t["W"], None, t["D"]))


@pytest.mark.parametrize("method", ["bone", {"method": "bat", "axis": "in"}, "bat"])
def test_start_is_the_base_bit_for_bit(method):
    layer = linear(6, 8, torch.float32)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(ts.adapt(layer, method, targets=["0"])(x), F.linear(x, layer[0].weight, layer[0].bias))


def test_two_bats_apply_one_after_the_other():
    model = linear(6, 8)
    for seed, name in enumerate("ab"):
        ts.adapt(model, {"method": "bat", "rank": 2}, name=name, targets=["0"])
        (D,) = ts.trainable(model).values()
        with torch.no_grad():
            D.copy_(normal(*D.shape, seed=seed, grad=False))
    x, W = normal(3, 8), model[0].weight
    a, b = (model[0].tunesmith.adapters[name] for name in "ab")
    out = {}
    for first, second, order in ((a, b, "ab"), (b, a, "ba")):
        ts.activate(model, list(order))
        out[order] = model(x)
        torch.testing.assert_close(out[order], F.linear(x, second.merged(first.merged(W, None)[0], None)[0], model[0].bias))
    assert (out["ab"] - out["ba"]).abs().max() > 0.1


@pytest.mark.parametrize("method", [{"method": "bone", "rank": 3}, {"method": "miss", "rank": 3, "init_weights": "mini", "mini_r": 2}, {"method": "bat", "rank": 2, "axis": "in"}])
def test_two_of_a_kind_add_up_as_merged(method):
    model = linear(6, 8)
    for seed, name in enumerate("ab"):
        ts.adapt(model, method, name=name, targets=["0"])
        (D,) = ts.trainable(model).values()
        with torch.no_grad():
            D.copy_(normal(*D.shape, seed=seed, grad=False))
    ts.activate(model, {"a": 1.0, "b": 0.5})
    x = normal(3, 8)
    y = model(x)
    torch.testing.assert_close(ts.merge(model)(x), y)


@pytest.mark.parametrize("stacked", [False, True])
def test_dropout_acts_on_the_inputs_of_the_sum_and_in_training_alone(stacked):
    model, D, W = adapted(6, 8, {"method": "bone", "rank": 3, "dropout": 0.5})
    if stacked:  # over another adapter, which changes nothing
        ts.adapt(model, {"method": "bone", "rank": 2}, name="below", targets=["0"])
        ts.activate(model, ["below", "default"])
    x = normal(4, 8)
    base = F.linear(x, W, model[0].bias)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.testing.assert_close(y, base + shared_block(dropped, D, 6))
    assert not torch.allclose(y, base + shared_block(x, D, 6))
    g = torch.autograd.grad(y.sum(), x)[0]
    torch.manual_seed(3)
    expected = torch.autograd.grad((F.linear(x, W, model[0].bias) + shared_block(F.dropout(x, 0.5), D, 6)).sum(), x)[0]
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(model.eval()(x), base + shared_block(x, D, 6))


def test_embedding_rows_share_by_their_number():
    model = nn.Sequential(nn.Embedding(7, 4, dtype=torch.float64))
    base = model[0].weight.detach().clone()
    ts.adapt(model, {"method": "miss", "rank": 3, "init_weights": "mini", "mini_r": 2}, targets=["0"])
    (D,) = ts.trainable(model).values()
    with torch.no_grad():
        D.copy_(normal(3, 2, grad=False))
    ids = torch.arange(7)
    torch.testing.assert_close(model(ids), base + D[ids % 3].tile(2))
    torch.testing.assert_close(model(ids), ts.merge(model)(ids))


# The fused function.


SHAPES = pytest.mark.parametrize("size,r,m", [(6, 3, 6), (5, 2, 6), (5, 5, 3), (7, 3, 2), (4, 1, 1)])


def parts(size=5, r=2, m=6, x_shape=(2, 3), out=6):
    shapes = {"x": (*x_shape, size), "W": (out, size), "b": (out,), "D": (r, m)}
    return {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}


def plain(x, W, b, D, x_adapter=None):
    rows, (out, size), (r, m) = x if x_adapter is None else x_adapter, W.shape, D.shape
    delta = torch.stack([torch.stack([D[j % r, o % m] for j in range(size)]) for o in range(out)])
    return F.linear(x, W, b) + F.linear(rows, delta)


@SHAPES
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, dropped, size, r, m):
    t = parts(size, r, m)
    inputs = t["x"], t["W"], t["b"] if bias else None, t["D"], normal(2, 3, size, seed=7) if dropped else None
    torch.testing.assert_close(block_sum_linear(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(block_sum_linear, inputs)


@pytest.mark.parametrize("only", ["x", "W", "b", "D", "x_adapter"])
def test_gradient_of_one_input_alone(only):
    t = parts(7, 3, 2) | {"x_adapter": normal(2, 3, 7, seed=7)}
    t = {n: v.detach().requires_grad_(n == only) for n, v in t.items()}
    agree(gradients(block_sum_linear(**t), t), gradients(plain(**t), t))


def test_gradient_of_the_weight_through_a_recipe():
    t = parts()
    h = t["x"].detach().requires_grad_()
    x = Recipe(torch.sin).attach(h.sin(), h)
    agree(gradients(block_sum_linear(x, t["W"], None, t["D"]), {"W": t["W"]}), gradients(plain(h.sin(), t["W"], None, t["D"]), {"W": t["W"]}))


@pytest.mark.parametrize("x_shape", [(), (4,), (0,), (2, 0, 3)])
def test_any_leading_shape_and_a_change_in_place(x_shape):
    t = parts(7, 3, 2, x_shape)
    y = block_sum_linear(**t)
    y.add_(1)
    torch.testing.assert_close(y, plain(**t) + 1)
    agree(gradients(y, t), gradients(plain(**t), t))


def test_keeps_the_sum_and_not_the_input():
    t = parts(64, 8, 40, (32,), 40)
    t["W"].requires_grad_(False)
    _, kept = saved_by(block_sum_linear, *t.values())
    assert sorted(tuple(k.shape) for k in kept) == sorted([(40, 64), (8, 40), (32, 8)])


@pytest.mark.parametrize("axis", ["out", "in"])
def test_bat_keeps_no_changed_weight(axis):
    model, _, W = adapted(12, 16, {"method": "bat", "rank": 4, "axis": axis})
    x = normal(5, 16)
    _, kept = saved_by(model, x)
    wide = [k for k in kept if k.numel() >= W.numel()]
    assert all(k.data_ptr() == model[0].weight.data_ptr() for k in wide)


def test_cheaper_than_lora_at_equal_rank():
    def step(method):
        model = ts.adapt(linear(48, 64), {"method": method, "rank": 8}, targets=["0"])
        x = normal(32, 64)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}) as counter:
            y, kept = saved_by(model, x)
            y.sum().backward()
        return counter.get_total_flops(), sum(k.numel() for k in kept)

    (bone_flops, bone_kept), (lora_flops, lora_kept) = step("bone"), step("lora")
    product = 2 * 32 * 48 * 64
    assert bone_flops == 2 * product + 3 * 2 * 32 * 8 * 48  # S D, and the gradients of both; nothing as long as the input
    assert lora_flops == bone_flops + 3 * 2 * 32 * 8 * 64
    assert bone_kept == lora_kept - 32 * 64 - 8 * 64  # neither x nor A


def test_float32_block_over_bfloat16():
    t = parts(48, 5, 40, (64,), 40)
    low = {n: t[n].detach().to(torch.float32 if n == "D" else torch.bfloat16).requires_grad_(n != "W") for n in ("x", "W", "b", "D")}
    y, kept = saved_by(block_sum_linear, *low.values())
    assert y.dtype == torch.bfloat16 and all(k.dtype == torch.bfloat16 or k.shape == (5, 40) for k in kept)
    wide = {n: p.detach().double().requires_grad_(n != "W") for n, p in low.items()}
    theirs = gradients(plain(**wide), wide)
    for name, grad in gradients(y, low).items():
        assert grad.dtype == low[name].dtype
        assert (grad - theirs[name]).norm() < 0.02 * theirs[name].norm(), name


def test_autocast_computes_in_bfloat16():
    t = {n: p.detach().float().requires_grad_() for n, p in parts(12, 5, 8, (16,), 8).items()}
    theirs = gradients(plain(**t), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block_sum_linear(**t)
    assert y.dtype == torch.bfloat16
    for name, grad in gradients(y, t).items():
        assert grad.dtype == torch.float32
        assert (grad - theirs[name]).norm() < 0.03 * theirs[name].norm(), name


def test_compiled_functional_and_vectorised():
    t = parts(7, 3, 2)

    def f(x, W, b, D):
        return block_sum_linear(x, W, b, D).square().mean()

    expected = torch.autograd.grad(f(**t), t.values())
    functional = torch.func.grad(f, argnums=(0, 1, 2, 3))(*[v.detach() for v in t.values()])
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(**t), t.values())
    for ours, also, theirs in zip(functional, compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(also, theirs)
    x, W = t["x"].detach(), t["W"].detach()
    Ds = normal(4, 3, 2, grad=False)
    many = torch.func.vmap(lambda D: block_sum_linear(x, W, None, D))(Ds)
    torch.testing.assert_close(many, torch.stack([plain(x, W, None, D) for D in Ds]))


# The sizes of the paper and of peft's benchmark.


def blocks(hidden, inner, query, key):
    """(out, in) of the seven projections of one block."""
    return [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)]


LLAMA2_7B, LLAMA2_13B = blocks(4096, 11008, 4096, 4096), blocks(5120, 13824, 5120, 5120)
MISTRAL_7B, QWEN3_4B = blocks(4096, 14336, 4096, 1024), blocks(2560, 9728, 4096, 1024)


@pytest.mark.parametrize("layers,depth,rank,millions", [
    (LLAMA2_7B, 32, 16, 21.76), (LLAMA2_7B, 32, 32, 43.52), (LLAMA2_7B, 32, 64, 87.03), (LLAMA2_7B, 32, 128, 174.06),
    (MISTRAL_7B, 32, 64, 88.08), (QWEN3_4B, 36, 64, 70.78), (LLAMA2_13B, 40, 128, 272.6),
])  # fmt: skip
def test_counts_of_the_paper(layers, depth, rank, millions):
    for method in (ts.Bone(rank=rank), ts.MiSS(rank=rank), ts.Bat(rank=rank)):
        assert round(depth * sum(method.count(site(*shape)) for shape in layers) / 1e6, 2 if millions < 200 else 1) == millions
    assert ts.Bat(rank=rank, axis="in").count(site(*LLAMA2_7B[-1])) == 11008 * rank


def test_counts_of_the_peft_benchmark():
    layers = [(3072, 3072), (1024, 3072)]  # q and v of Llama-3.2-3B
    for method, count in ((ts.MiSS(), 7_340_032), (ts.MiSS(init_weights="bat"), 7_340_032), (ts.MiSS(init_weights="mini", mini_r=64), 229_376)):
        assert 28 * sum(method.count(site(*shape)) for shape in layers) == count


# Defaults, and what is refused.


def test_blocks_fit_the_layer_at_defaults():
    assert ts.Bone().shape(site(6, 1000)) == (64, 6)
    assert ts.Bone(rank=100).shape(site(6, 9)) == (9, 6)
    assert ts.Bat().shape(site(4096, 11008)) == (64, 64, 64)
    assert ts.Bat().shape(site(30, 45)) == (2, 15, 15)
    assert ts.Bat(axis="in").shape(site(30, 45)) == (3, 15, 15)
    assert ts.Bat().shape(site(7, 10)) == (7, 1, 1)
    assert ts.MiSS(init_weights="mini").shape(site(100, 70)) == (64, 50)


@pytest.mark.parametrize("method,message", [
    ({"method": "bat", "rank": 24}, r"bat: rank 24 does not divide both the 32 inputs and the 32 outputs of 'model.layers.0.self_attn.q_proj'; 16 does"),
    ({"method": "miss", "init_weights": "bat"}, r"miss: rank 64 does not divide both the 32 inputs .*; 32 does"),
    ({"method": "miss", "init_weights": "mini", "mini_r": 5}, r"miss: mini_r 5 does not divide the 32 outputs of 'model.layers.0.self_attn.q_proj'; 4 does"),
    ({"method": "miss", "mini_r": 8}, "mini_r=8 is not valid.*needs init_weights='mini'"),
    ({"method": "miss", "init_weights": "bat", "dropout": 0.1}, "bat.*no dropout"),
    ({"method": "bat", "axis": "row"}, "axis='row' is not valid"),
    ({"method": "bone", "init_weights": "bat"}, "'bone' has no field 'init_weights'"),
])  # fmt: skip
def test_refuses(method, message):
    with pytest.raises(ts.TunesmithError, match=message):
        ts.adapt(tiny.tiny_llama(), method)


def test_learns_in_the_order_of_the_blocks():
    """A net that knows sin 2πx learns + 0.3 cos 3πx: wider blocks learn it faster, and Bat's faster than Bone's."""

    def features(x):
        angles = torch.pi * x[:, None] * torch.arange(1, 5)
        return torch.cat([angles.sin(), angles.cos()], 1)

    def error(model, x, y):
        return (model(features(x))[:, 0] - y).square().mean()

    def fit(model, parameters, x, y, steps):
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            error(model, x, y).backward()
            optimizer.step()
        with torch.no_grad():
            return error(model, grid, new).item()

    torch.manual_seed(0)
    grid = torch.linspace(0, 1, 100)
    old, new = torch.sin(2 * torch.pi * grid), torch.sin(2 * torch.pi * grid) + 0.3 * torch.cos(3 * torch.pi * grid)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    unadapted = fit(model, model.parameters(), grid, old, 150)
    x = torch.rand(50)
    y = torch.sin(2 * torch.pi * x) + 0.3 * torch.cos(3 * torch.pi * x) + 0.1 * torch.randn(50)
    found = {}
    for method, rank in (("bone", 2), ("bone", 4), ("bone", 16), ("bat", 4)):
        ts.adapt(model, {"method": method, "rank": rank}, targets=["2", "4"])
        found[method, rank] = fit(model, list(ts.trainable(model).values()), x, y, 40)
        ts.detach(model)
    assert unadapted == pytest.approx(0.045, rel=0.2)
    assert max(found.values()) < 0.6 * unadapted
    assert found["bat", 4] < found["bone", 4] < found["bone", 2]
    assert found["bone", 16] < 0.5 * found["bone", 2]
