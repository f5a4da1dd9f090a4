"""SPT: the budget, where modules land, and what trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs
from tunesmith.methods.spt import selection


def adapted(method="spt-lora", kind="bert", **fields):
    model, batch = tiny.BUILDERS[kind](), tiny.batch(kind)
    return ts.adapt(model, {"method": method, **fields}, calibrate=lambda m: m(**batch).logits.square().mean().backward()), batch


@pytest.mark.parametrize("method", ["spt-lora", "spt-adapter"])
@pytest.mark.parametrize("budget", [50, 500, 1500])
def test_the_budget_is_nearly_met_and_counted(method, budget):
    model, _ = adapted(method, budget=budget, rank=2, ease=1, vector_ease=1)
    total = ts.summary(model).trainable
    assert total == sum(p.numel() for p in ts.trainable(model).values()) and 0.7 * budget < total < 1.3 * budget


def test_starts_as_the_base_merges_and_loads(tmp_path):
    base, batch = tiny.tiny_bert(), tiny.batch("bert")
    model, _ = adapted(budget=1200, rank=2, ease=2, vector_ease=2)
    layers = adapters(model, "default").values()
    assert any(a.module for a in layers) and any(hasattr(a, "v") for a in layers) and any(a.vectors for a in layers)
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    expected = model(**batch).logits
    ts.save(model, tmp_path / "a")
    assert torch.equal(ts.load(tiny.tiny_bert(), tmp_path / "a")(**batch).logits, expected)
    torch.testing.assert_close(ts.merge(model)(**batch).logits, expected)


def test_hits_grow_with_tau_and_are_the_largest():
    scores = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (10, 30, 20)]
    hits = selection(scores, [1, 5, 20, 60])
    assert [sum(each) for each in hits] == [1, 5, 20, 60] and all(a <= b for x, y in zip(hits, hits[1:], strict=False) for a, b in zip(x, y, strict=True))
    cut = torch.cat(scores).sort(descending=True).values[19]
    assert hits[2] == [int((s >= cut).sum()) for s in scores]


def test_an_entrys_gradient_is_the_dense_one():
    model, batch = adapted(budget=300, ease=1, vector_ease=1)
    dense = tiny.tiny_bert()
    model(**batch).logits.square().sum().backward()
    dense(**batch).logits.square().sum().backward()
    seen = 0
    for path, hub in hubs(model).items():
        adapter = hub.adapters["default"]
        if hasattr(adapter, "v"):
            torch.testing.assert_close(adapter.v.grad, dense.get_parameter(f"{path}.weight").grad.flatten()[adapter.index.long()], atol=1e-5, rtol=1e-4)
            seen += 1
        for name, v in adapter.vectors.items():
            torch.testing.assert_close(v.grad, dense.get_parameter(f"{path}.{name}").grad[getattr(adapter, f"index_{name}").long()], atol=1e-5, rtol=1e-4)
            seen += 1
    assert seen > 1


def test_a_head_at_zero_tells_nothing():
    model, batch = tiny.tiny_bert(), tiny.batch("bert")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ts.TunesmithError, match="start the head at random"):
        ts.adapt(model, "spt-lora", calibrate=lambda m: m(**batch).logits.sum().backward())
    with pytest.raises(ts.TunesmithError, match="calibrate"):
        ts.adapt(model, "spt-lora")


def test_modules_land_where_the_change_is():
    """Of three blocks the teacher's second differs, so that the student's is the sensitive one."""
    torch.manual_seed(0)
    student = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 4))
    x, hidden = torch.randn(64, 16), torch.randn(64, 16)

    def calibrate(model):
        (F.mse_loss(model[:4](x), hidden) * 10 + F.mse_loss(model(x), torch.zeros(64, 4)) * 1e-3).backward()

    ts.adapt(student, ts.SPTLoRA(rank=2, budget=64), calibrate=calibrate)
    found = {path: a.module for path, a in adapters(student, "default").items()}
    assert found["2"] == "lora" and found.get("4") is None
