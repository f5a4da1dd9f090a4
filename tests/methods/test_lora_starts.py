"""LoRA's starts from the weight (OLoRA) and from the gradient (LoRA-GA), with the base left as it is."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.contract.zoo import build, inputs, logits, loss, stir
from tunesmith.engine.model import adapters
from tunesmith.engine.sites import sites

STARTS = ("pissa", "olora", "gradient")


def adapted(kind, method, dtype=torch.float32):
    model = build(kind, dtype)
    torch.manual_seed(3)
    return ts.adapt(model, method, calibrate=lambda model: loss(model, inputs(kind, dtype=dtype)).backward())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convnet", "attention"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_output_is_the_bases_and_the_base_stays(method, start, kind):
    plain, batch = build(kind, torch.float64), inputs(kind, dtype=torch.float64)
    model = adapted(kind, {"method": method, "init": start, "rank": 3}, torch.float64)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-9, rtol=0)
    assert all(a.A.abs().sum() and a.B.abs().sum() for a in adapters(model, "default").values())
    stir(model)
    after = logits(model, batch)
    assert not torch.allclose(after, logits(plain, batch))
    torch.testing.assert_close(logits(ts.merge(copy.deepcopy(model)), batch), after, atol=1e-9, rtol=0)
    ts.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def layer(init, out=7, size=9, rank=2, **config):
    """One linear layer with its adapter, and the gradient G that the adapter started from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, out, dtype=torch.float64))
    x, g = torch.randn(20, size, dtype=torch.float64), torch.randn(20, out, dtype=torch.float64)
    ts.adapt(model, ts.LoRA(rank=rank, init=init, **config), targets=["0"], calibrate=lambda model: (model(x) * g).sum().backward())
    return model, model[0].tunesmith.adapters["default"], x, g


@pytest.mark.parametrize("out,size", [(7, 9), (9, 7)])
def test_olora_starts_from_the_qr_factors(out, size):
    model, adapter, _, _ = layer("olora", out, size)
    W = model[0].weight.detach()
    Q, R = torch.linalg.qr(W)
    assert torch.equal(adapter.B, Q[:, :2]) and torch.equal(adapter.A, R[:2])
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(2, dtype=torch.float64))
    left = W - adapter.B @ adapter.A  # Q's other columns span what is left
    torch.testing.assert_close(adapter.B.T @ left, torch.zeros(2, size, dtype=torch.float64))
    assert torch.equal(adapter.A0, adapter.A) and torch.equal(adapter.B0, adapter.B) and not adapter.A0.requires_grad


@pytest.mark.parametrize("rslora", [False, True])
def test_loraga_first_step_is_along_the_gradients_best_approximation_of_rank_2r(rslora):
    model, adapter, x, g = layer("gradient", rslora=rslora, alpha=3)
    G = g.T @ x
    (model(x) * g).sum().backward()
    A, B = adapter.A.detach(), adapter.B.detach()
    for factor in (A @ A.T, B.T @ B):  # both orthogonal, of the size out^¼/√16
        torch.testing.assert_close(factor, 7**0.5 / 16 * torch.eye(2, dtype=torch.float64))
    step = B @ adapter.A.grad + adapter.B.grad @ A
    U, S, Vh = torch.linalg.svd(G)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    scale = 3 / (2**0.5 if rslora else 2)
    torch.testing.assert_close(step, scale * 7**0.5 / 16 * best)
    assert (A @ Vh[:2].T).square().sum() == pytest.approx(2 * 7**0.5 / 16)  # A has the first two right vectors, B the next two left ones
    assert (U[:, 2:4].T @ B).square().sum() == pytest.approx(2 * 7**0.5 / 16)


def test_a_rank_above_the_matrixs_trains_with_zeros_beyond():
    for init in STARTS:
        model, adapter, x, _ = layer(init, 3, 4, rank=5)
        with ts.disabled(model):
            base = model(x)
        torch.testing.assert_close(model(x), base)
        assert not adapter.A[3:].any() and not adapter.B[:, 3:].any()


def test_the_gradient_is_asked_for_and_given_back():
    with pytest.raises(ts.TunesmithError, match="calibrate=function"):
        ts.adapt(tiny.tiny_llama(), {"method": "lora", "init": "gradient"})
    model = adapted("llama", {"method": "lora", "targets": {"q_proj": {"init": "gradient"}, "v_proj": {}}})  # one of the two asks
    assert all(p.grad is None for p in model.parameters()) and all(s.gradient is None for s in sites(model))
    kinds = {path.split(".")[-1]: a.starts for path, a in adapters(model, "default").items()}
    assert kinds == {"q_proj": True, "v_proj": False}


@pytest.mark.parametrize("start", ["olora", "gradient"])
def test_files(start, tmp_path):
    model = stir(adapted("llama", {"method": "lora", "init": start, "rank": 3}))
    batch = inputs("llama")
    ts.save(model, tmp_path / "own")
    assert torch.equal(logits(ts.load(build("llama"), tmp_path / "own"), batch), logits(model, batch))
    ts.save(model, tmp_path / "peft", format="peft")
    back = ts.load(build("llama"), tmp_path / "peft")
    torch.testing.assert_close(logits(back, batch), logits(model, batch), atol=1e-5, rtol=0)
    rank = {len(t) for key, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items() if "lora_A" in key}
    assert rank == {3 if start == "olora" else 6}  # a gradient is not found again by whoever reads the file


def test_what_peft_cannot_hold(tmp_path):
    with pytest.raises(ts.TunesmithError, match="OLoRA acts on nn.Linear alone, not on 'transformer.h.0.attn.c_attn'"):
        ts.save(adapted("gpt2", {"method": "lora", "init": "olora"}), tmp_path / "a", format="peft")
    with pytest.raises(ts.TunesmithError, match="one start"):
        ts.save(adapted("llama", {"method": "lora", "targets": {"q_proj": {"init": "olora"}, "v_proj": {}}}), tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())
