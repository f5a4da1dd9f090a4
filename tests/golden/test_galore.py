"""GaLore's and Natural GaLore's trajectories under given gradients against the authors' code."""

import pytest
import torch
from torch import nn

from tunesmith.optim import galore

from .cases import names, read

OPTIONS = ("rank", "update_proj_gap", "scale", "lr", "betas", "eps", "weight_decay")


def options(case):
    assert case.config["correct_bias"]
    return {key: case.config[key] for key in OPTIONS}


def given(case, monkeypatch, proj_type):
    """The case's subspaces, whose signs are arbitrary, in place of those of the same span that are found; the steps they are of."""
    steps = sorted({int(key.rpartition("step")[2]) for key in case.tensors if "_step" in key})
    find, left = galore.subspace, list(steps)

    def subspace(G, rank, kind):
        assert kind == proj_type
        step = left.pop(0)
        wanted = [case.tensors.get(f"out.{name}_step{step}") for name in "UV"]
        if wanted == [None, None]:
            P = case.tensors[f"out.P_step{step}"]
            wanted = [None, P.T] if G.shape[0] >= G.shape[1] else [P, None]
        for own, Q in zip(find(G, rank, kind), wanted, strict=True):
            assert (own is None) == (Q is None)
            if Q is not None:
                torch.testing.assert_close(own @ own.T, Q @ Q.T, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close((own * Q).sum(0).abs(), torch.ones_like(Q[0]), atol=1e-5, rtol=1e-5)
        return wanted

    monkeypatch.setattr(galore, "subspace", subspace)
    return left


def weights(case, optimizer, p):
    """The weight after each step, each with what the optimiser then holds."""
    for G in case.tensors["in.grads"]:
        p.grad = G.clone()
        optimizer.step()
        yield p.detach(), optimizer.state[p]


@pytest.mark.parametrize("name", names("galore"))
def test_galore(name, monkeypatch):
    case = read("galore", name)
    left = given(case, monkeypatch, case.config["proj_type"])
    p = nn.Parameter(case.tensors["frozen.W0"].clone())
    close = {"atol": 1e-6, "rtol": 1e-5}
    optimizer = galore.GaLore([p], proj_type=case.config["proj_type"], **options(case))
    for k, (W, state) in enumerate(weights(case, optimizer, p)):
        torch.testing.assert_close(W, case.tensors["out.W"][k], **close)
        torch.testing.assert_close(state["exp_avg"], case.tensors["out.exp_avg"][k], **close)
    torch.testing.assert_close(state["exp_avg_sq"], case.tensors["out.exp_avg_sq_last"], **close)
    assert not left


@pytest.mark.parametrize("name", [n for n in names("natural-galore") if "in.grads" in read("natural-galore", n).tensors])
def test_natural_galore(name, monkeypatch):
    """Two-sided, as the authors' code is; its Tucker factors of a matrix are the singular vectors."""
    case = read("natural-galore", name)
    left = given(case, monkeypatch, "full")
    seen, close = [], {"atol": case.tolerance, "rtol": case.tolerance}

    class Told(galore.NaturalGaLore):
        def transform(self, g, *args):
            seen.append((g, super().transform(g, *args)))
            return seen[-1][1]

    p = nn.Parameter(case.tensors["frozen.W0"].clone())
    more = {"history": case.config["natural_history"], "damping": case.config["lambda_damping"], "relative": False, "clear": False}
    optimizer = Told([p], proj_type="full", **options(case), **more)
    for k, (W, _) in enumerate(weights(case, optimizer, p)):
        for own, key in zip(seen[-1], ("low_rank_grad", "natural_grad"), strict=True):
            torch.testing.assert_close(own, case.tensors[f"out.{key}"][k], **close)
        torch.testing.assert_close(W, case.tensors["out.W"][k], **close)
    assert not left


@pytest.mark.parametrize("name", [n for n in names("natural-galore") if "in.low_rank_grads" in read("natural-galore", n).tensors])
def test_natural_gradient(name):
    case = read("natural-galore", name)
    gradients, size = case.tensors["in.low_rank_grads"], case.config["natural_history"]
    history = torch.zeros(size, *gradients[0].shape, dtype=gradients.dtype)
    for k, g in enumerate(gradients):
        history[k % size] = g
        found = galore.natural(history, k % size, case.config["lambda_damping"])
        torch.testing.assert_close(found, case.tensors["out.natural_grad"][k], atol=case.tolerance, rtol=case.tolerance)
