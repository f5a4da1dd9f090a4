"""PaCA: which columns train, what is kept for backward, and its LoRA form."""

import pytest
import torch
from peft import PeftModel
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters


def one(x=None, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, dtype=dtype))
    calibrate = (lambda model: model(x).square().sum().backward()) if x is not None else None
    ts.adapt(model, {"method": "paca", "rank": 3, **fields}, targets=["0"], calibrate=calibrate)
    return model, model[0].tunesmith.adapters["default"]


def stirred(model, size=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("width,ffn,layers,rank,total", [(4096, 11008, 32, 8, 10_878_976), (4096, 11008, 32, 16, 21_757_952)])
def test_counts_of_llama2(width, ffn, layers, rank, total):
    outputs = [width] * 4 + [ffn] * 2 + [width]
    assert layers * rank * sum(outputs) == total
    model = nn.Sequential(nn.Linear(4096, 11008, device="meta"))
    assert ts.summary(ts.adapt(model, ts.PaCA(rank=rank), targets=["0"])).trainable == rank * ffn


def test_choices():
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    plain = nn.Linear(12, 8, dtype=torch.float64)
    order = plain.weight.norm(dim=0).argsort()
    assert set(one(choice="largest")[1].index.tolist()) == set(order[-3:].tolist())
    assert set(one(choice="smallest")[1].index.tolist()) == set(order[:3].tolist())
    plain(x).square().sum().backward()
    assert set(one(x, choice="gradient")[1].index.tolist()) == set(plain.weight.grad.norm(dim=0).argsort()[-3:].tolist())
    drawn = [one(seed=seed)[1].index.tolist() for seed in range(20)]
    assert drawn == [one(seed=seed)[1].index.tolist() for seed in range(20)] and all(each == sorted(set(each)) for each in drawn)
    assert len(set(map(tuple, drawn))) > 15


def test_layers_of_equal_shape_draw_their_own_columns():
    model = ts.adapt(tiny.tiny_llama(), "paca", targets=["q_proj", "o_proj"])
    drawn = [tuple(a.index.tolist()) for a in adapters(model, "default").values()]
    assert len(set(drawn)) == len(drawn) == 4


def test_more_columns_than_inputs():
    with pytest.raises(ts.TunesmithError, match="'0' has 12 inputs, too few for rank=13"):
        one(rank=13)


def test_only_the_chosen_columns_change():
    model, adapter = one()
    before = model[0].weight.clone()
    stirred(model)
    merged = ts.merge(model)[0].weight
    changed = (merged != before).any(0).nonzero()[:, 0]
    assert changed.tolist() == adapter.index.tolist()
    torch.testing.assert_close(merged[:, adapter.index], before[:, adapter.index] + 8 / 3 * adapter.v)
    assert torch.equal(ts.unmerge(model)[0].weight, before)


def test_gradients():
    model, adapter = one()
    stirred(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    def run(x, D):
        adapter.v = nn.Parameter(D.detach())
        return torch.func.functional_call(model, {"0.tunesmith.adapters.default.v": D}, (x,))

    assert torch.autograd.gradcheck(run, (x, adapter.v.detach().clone().requires_grad_()))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 4)])
def test_only_the_chosen_inputs_are_kept(shape):
    model, adapter = one(dtype=torch.float32)
    x, kept = torch.randn(*shape, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum().backward()
    own = {model[0].weight.data_ptr(), adapter.v.data_ptr(), adapter.index.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == x.numel() // 12 * 3


def test_peft_reads_it_as_lora(tmp_path):
    model = stirred(ts.adapt(tiny.tiny_llama(), {"method": "paca", "targets": {"q_proj": {"rank": 4}, "down_proj": {"alpha": 3}, "v_proj": {}}}))
    ts.save(model, tmp_path / "a", format="peft")
    batch = tiny.batch("llama")
    theirs = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=2e-5, rtol=0)
    again = ts.load(tiny.tiny_llama(), tmp_path / "a")
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=2e-5, rtol=0)
