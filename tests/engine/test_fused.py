"""The hand-written gradients against autograd's own."""

import pytest
import torch
import torch.nn.functional as F

from tunesmith.engine.fused import dora_linear, linear_cross_entropy, lowrank_linear, merged_linear

SCALE = 1.5


def normal(*shape, seed=0, dtype=torch.float64, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype).requires_grad_(grad)


def layer(x_shape=(2, 3, 5), out=6, rank=2, dtype=torch.float64, W_grad=True):
    """x, W, b, A, B, m of a small layer."""
    size = x_shape[-1]
    shapes = {"x": x_shape, "W": (out, size), "b": (out,), "A": (rank, size), "B": (out, rank), "m": (out,)}
    return {n: normal(*s, seed=i, dtype=dtype, grad=n != "W" or W_grad) for i, (n, s) in enumerate(shapes.items())}


def plain_lowrank(x, W, b, A, B, scale, x_adapter=None):
    return F.linear(x, W, b) + scale * F.linear(F.linear(x if x_adapter is None else x_adapter, A), B)


def plain_dora(x, W, b, A, B, scale, m, x_adapter=None):
    norm = (W + scale * B @ A).norm(dim=1).detach()
    y = m / norm * plain_lowrank(x, W, None, A, B, scale, x_adapter)
    return y if b is None else y + b


def gradients(y, inputs):
    g = normal(*y.shape, seed=9, grad=False).to(y.dtype)
    wanted = {n: t for n, t in inputs.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad((y * g).sum(), wanted.values()), strict=True))


def agree(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("W_grad", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_lowrank_gradcheck(bias, dropped, W_grad):
    t = layer(W_grad=W_grad)
    x_adapter = normal(*t["x"].shape, seed=7) if dropped else None
    inputs = t["x"], t["W"], t["b"] if bias else None, t["A"], t["B"], SCALE, x_adapter
    assert torch.autograd.gradcheck(lowrank_linear, inputs)
    torch.testing.assert_close(lowrank_linear(*inputs), plain_lowrank(*inputs))


@pytest.mark.parametrize("only", ["x", "W", "b", "A", "B", "x_adapter"])
def test_lowrank_gradient_of_one_input_alone(only):
    t = layer() | {"x_adapter": normal(2, 3, 5, seed=7)}
    for name in ("m", *t):
        t[name] = t[name].detach().requires_grad_(name == only)
    inputs = [t[n] for n in ("x", "W", "b", "A", "B")] + [SCALE, t["x_adapter"]]
    agree(gradients(lowrank_linear(*inputs), t), gradients(plain_lowrank(*inputs), t))


def test_a_dropped_input_takes_its_gradient_through_the_dropout():
    t = layer()
    keep = torch.rand(t["x"].shape, generator=torch.Generator().manual_seed(0)).gt(0.5) * 2.0

    def run(f):
        return gradients(f(t["x"], t["W"], t["b"], t["A"], t["B"], SCALE, t["x"] * keep), {k: v for k, v in t.items() if k != "m"})

    agree(run(lowrank_linear), run(plain_lowrank))


@pytest.mark.parametrize("W_grad", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dead", [(), (0, 3), range(6)])
def test_dora_against_autograd_with_a_detached_norm(dead, bias, dropped, W_grad):
    t = layer(W_grad=W_grad)
    with torch.no_grad():
        t["m"][list(dead)] = 0
    if not bias:
        t["b"] = None
    t["x_adapter"] = normal(2, 3, 5, seed=7) if dropped else None
    inputs = t["x"], t["W"], t["b"], t["A"], t["B"], SCALE, t["m"], t["x_adapter"]
    ours, theirs = dora_linear(*inputs), plain_dora(*inputs)
    torch.testing.assert_close(ours, theirs)
    agree(gradients(ours, t), gradients(theirs, t))
    norm = (t["W"] + SCALE * t["B"] @ t["A"]).norm(dim=1).detach()
    assert torch.autograd.gradcheck(lambda x, m: dora_linear(x, *inputs[1:6], m, inputs[7], norm), (t["x"], t["m"]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_gradcheck(bias, count, chunk):
    hidden, W, b = normal(2, 5, 4), normal(7, 4), normal(7) if bias else None
    labels = torch.tensor([[1, -100, 6, 0, -100], [3, 3, -100, 2, 5]])

    def ours(hidden, W, b):
        return linear_cross_entropy(hidden, W, labels, b, chunk=chunk, count=count)

    def plain(hidden, W, b):
        total = F.cross_entropy(F.linear(hidden, W, b).flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (7 if count is None else count)

    assert torch.autograd.gradcheck(ours, (hidden, W, b))
    torch.testing.assert_close(ours(hidden, W, b), plain(hidden, W, b))
    inputs = {"hidden": hidden, "W": W, "b": b}
    agree(gradients(ours(**inputs), inputs), gradients(plain(**inputs), inputs))


@pytest.mark.parametrize("frozen", [("W", "b"), ("hidden", "b"), ("hidden", "W")])
def test_cross_entropy_gradient_of_one_input_alone(frozen):
    t = {"hidden": normal(6, 4), "W": normal(7, 4), "b": normal(7)}
    for name in frozen:
        t[name] = t[name].detach()
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    ours = linear_cross_entropy(t["hidden"], t["W"], labels, t["b"], chunk=2)
    agree(gradients(ours, t), gradients(F.cross_entropy(F.linear(*t.values()), labels), t))


def test_cross_entropy_without_labels():
    hidden, W = normal(2, 3, 4), normal(7, 4)
    none = torch.full((2, 3), -100)
    assert linear_cross_entropy(hidden, W, none).isnan()  # the mean of nothing, as torch has it
    part = linear_cross_entropy(hidden, W, none, count=5)  # a part of a batch whose labels are elsewhere
    assert part.item() == 0
    for grad in torch.autograd.grad(part, (hidden, W)):
        assert not grad.any()


def test_cross_entropy_of_huge_logits():
    hidden, W, labels = 1e4 * normal(5, 4, dtype=torch.float32).detach(), normal(7, 4, dtype=torch.float32).detach(), torch.arange(5)
    torch.testing.assert_close(linear_cross_entropy(hidden, W, labels), F.cross_entropy(hidden @ W.T, labels))


def saved_by(f, *inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = f(*inputs)
    return y, kept


@pytest.mark.parametrize("f", [lowrank_linear, dora_linear])
def test_float32_adapter_over_bfloat16(f):
    t = layer((64, 48), out=40)
    names = ["x", "W", "A", "B"] + (["m"] if f is dora_linear else [])
    low = {n: t[n].detach().bfloat16() if n in ("x", "W") else t[n].detach().float() for n in names}
    for n in low:
        low[n].requires_grad_(n != "W")
    magnitude = [low["m"]] if f is dora_linear else []
    y, kept = saved_by(f, low["x"], low["W"], None, low["A"], low["B"], SCALE, *magnitude)
    assert y.dtype == torch.bfloat16
    assert not [k for k in kept if k.dtype == torch.float32 and k.numel() >= low["x"].numel()]
    assert [k for k in kept if k.data_ptr() == low["x"].data_ptr()]  # x itself, not a copy
    ours = gradients(y, low)
    assert {n: g.dtype for n, g in ours.items()} == {n: low[n].dtype for n in ours}
    wide = {n: p.detach().double().requires_grad_(n != "W") for n, p in low.items()}
    plain = plain_dora if f is dora_linear else plain_lowrank
    theirs = gradients(plain(wide["x"], wide["W"], None, wide["A"], wide["B"], SCALE, *([wide["m"]] if magnitude else [])), wide)
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() < 0.02 * grad.norm(), name


@pytest.mark.parametrize("f", [lowrank_linear, dora_linear])
def test_autocast_computes_in_bfloat16(f):
    t = {n: p.detach().float().requires_grad_() for n, p in layer((16, 12), out=8).items()}
    if f is lowrank_linear:
        del t["m"]
    inputs = [t[n] for n in ("x", "W", "b", "A", "B")] + [SCALE] + [t[n] for n in ("m",) if n in t]
    plain = (plain_dora if "m" in t else plain_lowrank)(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = f(*inputs)
    assert y.dtype == torch.bfloat16
    theirs = gradients(plain, t)
    for name, grad in gradients(y, t).items():
        assert grad.dtype == torch.float32
        assert (grad - theirs[name]).norm() < 0.03 * theirs[name].norm(), name


def test_autocast_cross_entropy():
    hidden, W, b = (normal(*s, dtype=torch.float32) for s in ((6, 4), (7, 4), (7,)))
    labels = torch.tensor([0, 1, -100, 3, 4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, W, labels, b)
    plain = F.cross_entropy(F.linear(hidden, W, b), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, atol=0.03, rtol=0.03)
    inputs = {"hidden": hidden, "W": W, "b": b}
    agree(gradients(ours, inputs), gradients(plain, inputs), atol=0.03, rtol=0.03)


def ways():
    t = layer()
    labels = torch.tensor([[1, -100, 3], [0, 2, 5]])
    yield "lowrank", {n: t[n] for n in ("x", "W", "b", "A", "B")}, lambda x, W, b, A, B: lowrank_linear(x, W, b, A, B, SCALE).square().mean()
    yield "dora", t, lambda x, W, b, A, B, m: dora_linear(x, W, b, A, B, SCALE, m).square().mean()
    yield "loss", {"hidden": t["x"], "W": t["W"], "bias": t["b"]}, lambda hidden, W, bias: linear_cross_entropy(hidden, W, labels, bias)


@pytest.mark.parametrize("inputs,f", [pytest.param(t, f, id=name) for name, t, f in ways()])
def test_compiled_and_functional_gradients(inputs, f):
    values, f32 = list(inputs.values()), {n: p.detach().float().requires_grad_() for n, p in inputs.items()}
    plain = torch.autograd.grad(f(*values), values)
    functional = torch.func.grad(f, argnums=tuple(range(len(values))))(*[v.detach() for v in values])
    for ours, theirs in zip(functional, plain, strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, atol=1e-7, rtol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph="labels" not in f.__code__.co_freevars)(*f32.values())
    for ours, theirs in zip(torch.autograd.grad(compiled, f32.values()), plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)


def test_vectorised_over_adapters():
    t = layer()
    As, Bs = normal(3, 2, 5, seed=20, grad=False), normal(3, 6, 2, seed=21, grad=False)
    x, W = t["x"].detach(), t["W"].detach()
    many = torch.func.vmap(lambda A, B: lowrank_linear(x, W, None, A, B, SCALE))(As, Bs)
    torch.testing.assert_close(many, torch.stack([plain_lowrank(x, W, None, A, B, SCALE) for A, B in zip(As, Bs, strict=True)]))


@pytest.mark.parametrize("only", [None, "x", "W", "b", "A", "B"])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_linear_has_the_gradients_of_the_plain_expression(bias, only):
    t = layer()
    t = {n: v.detach().requires_grad_(only in (None, n)) for n, v in t.items() if bias or n != "b"}
    x, W, b, A, B = t["x"], t["W"], t.get("b"), t["A"], t["B"]

    def merged(W, b):
        return W * (1 + B @ A), None if b is None else b * A.sum()

    wanted = {n: v for n, v in t.items() if n in ("x", "W", "A", "B") or (n == "b" and bias)}
    if not any(v.requires_grad for v in wanted.values()):
        return
    y = merged_linear(x, W, b, merged, [A, B])
    plain = F.linear(x, *merged(W, b))
    torch.testing.assert_close(y, plain)
    agree(gradients(y, wanted), gradients(plain, wanted))


def test_merged_linear_keeps_no_merged_matrix():
    t = layer((4, 50), out=60)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s.shape) or s, lambda s: s):
        merged_linear(t["x"], t["W"].detach(), None, lambda W, b: (W * (1 + t["B"] @ t["A"]), b), [t["A"], t["B"]])
    assert sorted(map(tuple, kept)) == sorted([(4, 50), (60, 50), tuple(t["A"].shape), tuple(t["B"].shape)])


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(bias):
    t = layer((4, 64, 5), dtype=torch.float32)
    b = t["b"] if bias else None
    for y in (lowrank_linear(t["x"], t["W"].detach(), b, t["A"], t["B"], SCALE), merged_linear(t["x"], t["W"].detach(), b, lambda W, b: (W + t["B"] @ t["A"], b), [t["A"], t["B"]])):
        y.mul_(2).sum().backward()
