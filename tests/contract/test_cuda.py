"""The contract on a GPU: what the CPU gives, to rounding."""

import copy

import pytest
import torch

import tunesmith as ts
from tunesmith.engine.fused import common
from tunesmith.methods import registry

from .zoo import PAIRS, PROMPTS, adapt, build, inputs, logits, loss, stir, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pairs = pytest.mark.parametrize("method,kind", PAIRS)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def there(batch):
    return {k: v.cuda() for k, v in batch.items()}


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("light", [False, True])
@pairs
def test_gradients_and_steps_are_those_of_the_cpu(method, kind, light, monkeypatch):
    monkeypatch.setattr(common, "light", lambda x, W: light)
    here, batch = build(kind).train(), inputs(kind)
    stir(adapt(here, method))
    gpu = copy.deepcopy(here).cuda()
    close(logits(gpu, there(batch)), logits(here, batch))
    loss(here, batch).backward()
    loss(gpu, there(batch)).backward()
    for path, p in ts.trainable(here).items():
        found = ts.trainable(gpu)[path]
        assert found.is_cuda and (found.grad is None) == (p.grad is None), path
        if p.grad is not None:
            close(found.grad, p.grad)
    for model in (here, gpu):
        torch.optim.SGD(ts.trainable(model).values(), lr=1e-2).step()
    close(logits(gpu, there(batch)), logits(here, batch), 1e-3)


@pairs
def test_adapted_trained_merged_and_saved_there(method, kind, tmp_path):
    model, batch = build(kind).cuda(), there(inputs(kind))
    adapt(model, method)
    assert all(p.is_cuda for p in ts.trainable(model).values())
    losses = train(model, batch, steps=8, lr=1e-2 if registry[method].default_lr > 2e-4 else 1e-3)
    assert min(losses[-4:]) < losses[0] - 1e-5
    expected = logits(model, batch)
    ts.save(model, tmp_path / "a")
    close(logits(ts.load(build(kind), tmp_path / "a"), inputs(kind)), expected.cpu())
    close(logits(ts.load(build(kind).cuda(), tmp_path / "a"), batch), expected.cpu(), 1e-6)  # atomic sums come in any order
    if registry[method].mergeable:
        close(logits(ts.merge(model), batch), expected.cpu())
        ts.unmerge(model)
        close(logits(model, batch), expected.cpu(), 1e-6)


@pairs
def test_bfloat16_base_with_float32_adapters(method, kind):
    model, batch = build(kind, torch.bfloat16).cuda(), there(inputs(kind, dtype=torch.bfloat16))
    adapt(model, method)
    train(model, batch, steps=2)
    assert logits(model, batch).dtype == torch.bfloat16
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in ts.trainable(model).values())


@pairs
def test_one_adapter_per_row(method, kind):
    if kind == "t5" and method in PROMPTS | {"full"}:
        pytest.skip("rows of other lengths; a table of position biases without rows")
    model, batch = build(kind).cuda(), there(inputs(kind))
    for seed, name in enumerate("ab"):
        stir(adapt(model, method, name=name), seed)
    rows = ["b", None, "a"]
    with ts.mixed(model, rows):
        together = logits(model, batch)
    for i, name in enumerate(rows):
        ts.activate(model, name or [])
        close(together[i], logits(model, batch)[i].cpu())
