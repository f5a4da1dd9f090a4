"""SHiRA and NeuroAda: which entries train, what that costs, and switching by scatter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.fused import sparse_linear
from tunesmith.engine.fused.sparse import sampled
from tunesmith.engine.model import adapters
from tunesmith.methods.entries import top


def one(method, x=None, m=6, n=8, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, dtype=dtype))
    calibrate = (lambda model: model(x).square().sum().backward()) if x is not None else None
    ts.adapt(model, {"method": method, **fields}, targets=["0"], calibrate=calibrate)
    return model, model[0].tunesmith.adapters["default"]


def stirred(model, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_takes_the_lower_of_equals(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    assert top(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


def test_masks_of_shira():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    plain = nn.Linear(8, 6, dtype=torch.float64)
    plain(x).square().sum().backward()
    W, G = plain.weight.detach().flatten(), plain.weight.grad.flatten()
    for mask, score in {"magnitude": W.abs(), "gradient": G.abs(), "snip": (W * G).abs()}.items():
        index = one("shira", x, mask=mask, density=0.2)[1].index.tolist()
        assert index == sorted(score.argsort(descending=True)[:10].tolist())
        second = one("shira", x, mask=mask, density=0.2, task=1)[1].index.tolist()
        assert second == sorted(score.argsort(descending=True)[10:20].tolist())
    index = one("shira", mask="struct", density=0.33)[1].index
    rows, columns = index // 8, index % 8
    assert set(rows[rows != columns].tolist()) == {0, 3} and len(index) == 2 * 8 + 4
    drawn = [set(one("shira", mask="random", density=0.2, task=task)[1].index.tolist()) for task in range(4)]
    assert all(len(d) == 10 for d in drawn) and len(set.union(*drawn)) == 40


@pytest.mark.parametrize("shape,rank,count", [((3072, 3072), 32, 32 * 6144), ((1024, 3072), 32, 32 * 4096)])
def test_rank_counts_as_lora(shape, rank, count):
    model = ts.adapt(nn.Sequential(nn.Linear(*reversed(shape), device="meta")), ts.SHiRA(rank=rank), targets=["0"])
    assert ts.summary(model).trainable == count


def test_counts_of_neuroada():
    outputs = [4096] * 4 + [11008] * 2 + [4096]
    assert 32 * sum(outputs) == 1_359_872 and 32 * 20 * sum(outputs) == 27_197_440
    model = ts.adapt(nn.Sequential(nn.Linear(4096, 11008, device="meta")), ts.NeuroAda(k=20), targets=["0"])
    assert ts.summary(model).trainable == 20 * 11008


@pytest.mark.parametrize("choice", ["magnitude", "smallest", "random", "gradient"])
def test_every_neuron_of_neuroada_has_k(choice):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, adapter = one("neuroada", x, k=3, choice=choice)
    torch.manual_seed(0)
    plain = nn.Linear(8, 6, dtype=torch.float64)
    plain(x).square().sum().backward()
    W = (plain.weight.grad if choice == "gradient" else plain.weight.detach()).abs()
    chosen = torch.zeros(48, dtype=torch.bool)
    chosen[adapter.index.long()] = True
    chosen = chosen.view(6, 8)
    assert (chosen.sum(1) == 3).all()
    for scores, row in zip(W, chosen, strict=True):
        if choice == "smallest":
            assert scores[row].max() <= scores[~row].min()
        elif choice != "random":
            assert scores[row].min() >= scores[~row].max()


def test_some_neurons_and_all_inputs():
    _, half = one("neuroada", k=2, neurons=0.5)
    assert len(half.index) == 6 and len(set((half.index // 8).tolist())) == 3
    _, whole = one("neuroada", k=100)
    assert whole.index.tolist() == list(range(48))


def test_too_many_entries():
    with pytest.raises(ts.TunesmithError, match="'0' has 48 entries, too few for rank=4"):
        one("shira", rank=4)
    with pytest.raises(ts.TunesmithError, match="density=0.6 and task=1"):
        one("shira", density=0.6, task=1)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_gradients(density):
    model, adapter = one("shira", density=density)
    stirred(model)
    x, b, W = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), model[0].bias, model[0].weight.detach().clone().requires_grad_()
    v = adapter.v.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, W, v: sparse_linear(x, W, b, v, adapter.index, None), (x, W, v))
    g, rows = torch.randn(10, 6, dtype=torch.float64), x.detach().reshape(10, 8)
    torch.testing.assert_close(sampled(g, rows, adapter.index), (g.T @ rows).flatten()[adapter.index])


def test_steps_are_those_of_masked_dense_training():
    """Of SGD and of Adam, which keep a masked gradient's entries apart."""
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01)):
        model, adapter = one("shira", density=0.2)
        dense = nn.Linear(8, 6, dtype=torch.float64)
        dense.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        mask = torch.zeros(48, dtype=torch.float64).index_fill_(0, adapter.index.long(), 1).view(6, 8)
        dense.weight.register_hook(mask.mul)
        ours, theirs = make(ts.trainable(model).values()), make([dense.weight])
        for step in range(4):
            x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            for net, optimizer in ((model, ours), (dense, theirs)):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(ts.merge(model)[0].weight.detach(), dense.weight.detach())


@pytest.mark.parametrize("method", ["shira", "neuroada", "paca"])
def test_switching_by_scatter_gives_the_base_back_bit_for_bit(method):
    model = tiny.tiny_llama().bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for seed, name in enumerate("ab"):
        stirred(ts.adapt(model, method, name=name), seed=seed)
    weight = model.model.layers[0].mlp.up_proj.weight
    for name in ("a", "b", "a"):
        ts.unmerge(model)
        ts.activate(model, name)
        ts.merge(model)
        assert model.model.layers[0].mlp.up_proj.weight is weight and not torch.equal(weight, before["model.layers.0.mlp.up_proj.weight"])
    with ts.disabled(model):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    ts.unmerge(model)
    ts.activate(model, {"a": 0.5, "b": 2.0})
    ts.merge(model)
    ts.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_small_changes_of_large_weights_count_in_bfloat16():
    """Added to 1 in bfloat16, 10⁻³ vanishes; beside it, it is there to be seen where the outputs are small."""
    model, adapter = one("neuroada", n=2, k=1, dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -0.99609375], dtype=torch.bfloat16))
        model[0].bias.zero_()
        adapter.index.copy_(torch.arange(6) * 2)
        adapter.v.fill_(1e-3)
    y = model(torch.ones(1, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(y, torch.full((1, 6), 0.00390625 + 1e-3, dtype=torch.bfloat16))


@pytest.mark.parametrize("method", ["shira", "neuroada"])
def test_no_copy_of_the_weight_is_kept(method):
    model, adapter = one(method, m=40, n=30, dtype=torch.float32)
    x, kept = torch.randn(7, 30, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum().backward()
    own = {model[0].weight.data_ptr(), adapter.v.data_ptr(), adapter.index.data_ptr(), x.data_ptr()}
    assert not [t.shape for t in kept if t.data_ptr() not in own]


def test_files_hold_positions_as_differences(tmp_path):
    model = stirred(ts.adapt(tiny.tiny_llama(), ts.SHiRA(density=0.1)))
    ts.save(model, tmp_path / "a")
    size = (tmp_path / "a" / "adapter.safetensors").stat().st_size
    report = ts.summary(model)
    assert 5 * report.trainable <= report.bytes < 5.3 * report.trainable and report.bytes < size < report.bytes + 6000
    again = ts.load(tiny.tiny_llama(), tmp_path / "a")
    for path, adapter in adapters(again, "default").items():
        assert torch.equal(adapter.index, adapters(model, "default")[path].index) and adapter.index.dtype == torch.int32


def test_a_mask_from_gradients_loads_without_data(tmp_path):
    model = tiny.tiny_llama()
    batch = tiny.batch("llama")
    stirred(ts.adapt(model, ts.SHiRA(mask="snip"), calibrate=lambda model: model(**batch).logits.square().mean().backward()))
    ts.save(model, tmp_path / "a")
    assert torch.equal(ts.load(tiny.tiny_llama(), tmp_path / "a")(**batch).logits, model(**batch).logits)
