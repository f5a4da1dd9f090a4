"""What is computed again in backward has the gradients of what it computes."""

import pytest
import torch
from torch import nn

from tunesmith.engine.fused import Recipe, remade


def parts(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, A = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in ((2, 3, 5), (4, 5)))
    return x, A, lambda x: torch.tanh(x @ A.T.to(x.dtype)) ** 2


@pytest.mark.parametrize("leaves", ["x", "A", "both"])
def test_gradients(leaves):
    x, A, make = parts()
    wanted = {"x": [x], "A": [A], "both": [x, A]}[leaves]
    x.requires_grad_(leaves != "A"), A.requires_grad_(leaves != "x")
    y, plain = remade(x, make, [A]), make(x)
    assert torch.equal(y, plain)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(plain.sum(), wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_ends_are_kept():
    x, A, make = parts()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        remade(x, make, [A])
    assert sorted(kept) == sorted([x.data_ptr(), A.data_ptr()])


def test_an_input_with_a_recipe_is_not_kept():
    x, A, make = parts()
    half = x.detach()[..., :1]
    made = Recipe(lambda h: h.expand(2, 3, 5) * 2).attach(half.expand(2, 3, 5) * 2, half)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = remade(made, make, [A])
    assert made.data_ptr() not in kept
    torch.testing.assert_close(torch.autograd.grad(y.sum(), A)[0], torch.autograd.grad(make(made).sum(), A)[0])


def test_autocast_and_changed_parameters():
    x, A, make = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = remade(x, make, [A])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == torch.float32
    torch.testing.assert_close(A.grad, torch.autograd.grad(make(x).sum(), A)[0], atol=0.1, rtol=0.1)
    y = remade(x, make, [A])
    with torch.no_grad():
        nn.init.zeros_(A)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
