"""The hand-written gradients of routed and grouped low-rank layers against autograd's own."""

import pytest
import torch
import torch.nn.functional as F

from tunesmith.engine.fused import Recipe, grouped_change, grouped_lowrank_linear, routed_change, routed_linear

SCALE, EXPERTS, RANK = 1.5, 3, 2


def normal(*shape, seed=0, grad=True, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


def gate(logits):
    best, index = logits.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, index, best.softmax(1))


def routed(bias=True, dropped=False, W_grad=True, dtype=torch.float64):
    shapes = {"x": (2, 3, 5), "W": (6, 5), "b": (6,), "A": (EXPERTS * RANK, 5), "B": (6, EXPERTS * RANK), "R": (EXPERTS, 5), "x_adapter": (2, 3, 5)}
    made = {n: normal(*s, seed=i, grad=n != "W" or W_grad, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    return made | ({} if bias else {"b": None}) | ({} if dropped else {"x_adapter": None})


def plain_routed(x, W, b, A, B, R, x_adapter):
    change, logits = routed_change(x, A, B, R, gate, SCALE, x_adapter)
    return F.linear(x, W, b) + change, logits


def fused_routed(x, W, b, A, B, R, x_adapter):
    return routed_linear(x, W, b, A, B, R, gate, SCALE, x_adapter)


def gradients(outputs, inputs):
    seeds = [normal(*y.shape, seed=9, grad=False, dtype=y.dtype) for y in outputs]
    wanted = {n: t for n, t in inputs.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(outputs, wanted.values(), seeds), strict=True))


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


def test_the_plain_change_is_the_sum_over_experts():
    t = routed()
    change, logits = routed_change(t["x"], t["A"], t["B"], t["R"], gate, SCALE)
    weights = gate(t["x"].flatten(0, 1) @ t["R"].T)
    experts = [t["x"].flatten(0, 1) @ t["A"][e * RANK : e * RANK + RANK].T @ t["B"][:, e * RANK : e * RANK + RANK].T for e in range(EXPERTS)]
    expected = SCALE * sum(weights[:, e, None] * y for e, y in enumerate(experts))
    torch.testing.assert_close(change.flatten(0, 1), expected)
    assert logits.shape == (6, EXPERTS) and (weights > 0).sum() == 12


@pytest.mark.parametrize("W_grad", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_routed_gradients(bias, dropped, W_grad):
    t = routed(bias, dropped, W_grad)
    ours, theirs = fused_routed(**t), plain_routed(**t)
    torch.testing.assert_close(ours, theirs)
    agree(gradients(ours, t), gradients(theirs, t))
    assert torch.autograd.gradcheck(lambda *inputs: fused_routed(**dict(zip(t, inputs, strict=True))), tuple(t.values()))


@pytest.mark.parametrize("only", ["x", "W", "b", "A", "B", "R", "x_adapter"])
def test_routed_gradient_of_one_input_alone(only):
    t = {n: v.detach().requires_grad_(n == only) for n, v in routed(dropped=True).items()}
    agree(gradients(fused_routed(**t)[:1], t), gradients(plain_routed(**t)[:1], t))


def test_a_recipe_stands_for_the_input():
    t = routed()
    half = (t["x"] / 2).detach().requires_grad_()
    recipe = Recipe(lambda h: 2 * h)

    def run(f, kept):
        x = 2 * half
        return gradients(f(**t | {"x": recipe.attach(x, half) if kept else x}), {"half": half, **{n: t[n] for n in "WbABR"}})

    agree(run(fused_routed, True), run(plain_routed, False))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5), (8, 2, 2, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("W_grad", [True, False])
def test_grouped_gradients(W_grad, bias, shape):
    shapes = {"x": shape, "W": (6, 5), "b": (6,), "A": (2, RANK, 5), "B": (2, 6, RANK)}
    t = {n: normal(*s, seed=i, grad=n != "W" or W_grad) for i, (n, s) in enumerate(shapes.items())} | ({} if bias else {"b": None})

    def fused(x, W, b, A, B):
        return grouped_lowrank_linear(x, W, b, A, B, SCALE)

    y = fused(**t)
    halves = [F.linear(x, t["W"], t["b"]) + SCALE * x @ A.T @ B.T for x, A, B in zip(t["x"].chunk(2), t["A"], t["B"], strict=True)]
    torch.testing.assert_close(y, torch.cat(halves))
    torch.testing.assert_close(grouped_change(t["x"], t["A"], t["B"], SCALE) + F.linear(t["x"], t["W"], t["b"]), y)
    agree(gradients([y], t), gradients([torch.cat(halves)], t))
    assert torch.autograd.gradcheck(fused, tuple(t.values()))


@pytest.mark.parametrize("only", ["x", "W", "b", "A", "B"])
def test_grouped_gradient_of_one_input_alone(only):
    shapes = {"x": (4, 3, 5), "W": (6, 5), "b": (6,), "A": (2, RANK, 5), "B": (2, 6, RANK)}
    t = {n: normal(*s, seed=i, grad=n == only) for i, (n, s) in enumerate(shapes.items())}
    plain = F.linear(t["x"], t["W"], t["b"]) + grouped_change(t["x"], t["A"], t["B"], SCALE)
    agree(gradients([grouped_lowrank_linear(**t, scale=SCALE)], t), gradients([plain], t))


@pytest.mark.parametrize("kind", ["routed", "grouped"])
def test_bfloat16_inputs_and_changes_in_place(kind):
    """Factors in float32 over a bfloat16 base; the output may be added to in place."""
    x, W = normal(4, 3, 16, seed=1, dtype=torch.bfloat16), normal(8, 16, seed=2, grad=False, dtype=torch.bfloat16)
    if kind == "routed":
        factors = [normal(s, 16, seed=i, dtype=torch.float32) for i, s in enumerate((EXPERTS * RANK, EXPERTS))]
        A, R, B = *factors, normal(8, EXPERTS * RANK, seed=5, dtype=torch.float32)
        y, trained = routed_linear(x, W, None, A, B, R, gate, SCALE)[0], (A, B, R)
    else:
        A, B = normal(2, RANK, 16, seed=3, dtype=torch.float32), normal(2, 8, RANK, seed=4, dtype=torch.float32)
        y, trained = grouped_lowrank_linear(x, W, None, A, B, SCALE), (A, B)
    y += 1
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("kind", ["routed", "grouped"])
def test_only_the_listed_tensors_are_kept(kind):
    x, W = normal(1, 64, 32), normal(48, 32, grad=False)
    seen = []

    def save(t):
        seen.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        if kind == "routed":
            A, B, R = normal(EXPERTS * RANK, 32), normal(48, EXPERTS * RANK), normal(EXPERTS, 32)
            routed_linear(x, W, None, A, B, R, gate, SCALE)
            expected = [x.shape, W.shape, A.shape, B.shape, R.shape, (64, EXPERTS * (RANK + 1))]
        else:
            A, B = normal(2, RANK, 32), normal(2, 48, RANK)
            grouped_lowrank_linear(x, W, None, A, B, SCALE)
            expected = [x.shape, W.shape, A.shape, B.shape, (2, 32, RANK)]
    assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))
