"""Several adapters on one model: weights, order, merges, mixed batches, names, lineage."""

import copy

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs, record_of, state_of

IDS = torch.randint(5, tiny.VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stir(model, seed=1, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


def attach(model, **methods):
    """Named, trained adapters; the last is active."""
    for seed, (name, method) in enumerate(methods.items()):
        stir(ts.adapt(model, method, name=name), seed)
    return model


def delta(model, name, path):
    layer = adapters(model, name)[path]
    return layer.scale * layer.B @ layer.A


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"b": 0.3, "a": 0.7}, {"a": -1.0, "b": 2.0}, {"a": 0.5}, {"a": 0.0, "b": 1.0}])
@pytest.mark.parametrize("merged", [False, True])
def test_weighted_loras_add_up(weights, merged):
    model = attach(net(), a=ts.LoRA(rank=2, targets=["0", "2"]), b=ts.LoRA(rank=3, alpha=5, targets=["0", "2"]))
    ts.activate(model, weights)
    h = X
    for path in ("0", "2"):
        layer = model.get_submodule(path)
        W = layer.weight + sum(w * delta(model, name, path) for name, w in weights.items())
        h = nn.functional.linear(h, W, layer.bias)
        h = torch.tanh(h) if path == "0" else h
    close((ts.merge(model) if merged else model)(X), h)


def test_a_weight_is_part_of_the_way_for_any_method():
    layer = nn.Sequential(nn.Linear(5, 4)).double()
    base = layer(X).detach()
    for method in (ts.LoRA(targets="0"), ts.IA3(targets="0"), ts.BitFit(), ts.Full(), ts.DoRA(targets="0"), ts.SeriesAdapter(targets="0")):
        stir(ts.adapt(layer, method, name="a"))
        whole = layer(X)
        ts.activate(layer, {"a": 0.25})
        close(layer(X), base + 0.25 * (whole - base))
        ts.detach(layer)


def test_order_is_the_order_of_activation():
    model = attach(nn.Sequential(nn.Linear(5, 4)).double(), lora=ts.LoRA(targets="0"), scale=ts.IA3(targets="0"))
    W, b, l = model[0].weight, model[0].bias, adapters(model, "scale")["0"].l
    dW = delta(model, "lora", "0")
    for names, expected in ((["lora", "scale"], l * (X @ (W + dW).T + b)), (["scale", "lora"], l * (X @ W.T + b) + X @ dW.T)):
        ts.activate(model, names)
        close(model(X), expected)
        ts.merge(model)
        close(model(X), expected)
        ts.unmerge(model)
        close(model(X), expected)


def test_merge_of_several_in_one_go_and_one_by_one():
    methods = {"a": ts.LoRA(targets=["0"]), "b": ts.DoRA(targets=["0", "2"]), "c": ts.IA3(targets=["2"])}
    model = attach(net(), **methods)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    ts.activate(model, {"a": 0.5, "b": 1.0, "c": 2.0})
    expected = model(X).detach()
    close(ts.merge(model)(X), expected)
    assert state_of(model).merged == {"a": 0.5, "b": 1.0, "c": 2.0}
    assert all(torch.equal(v, base[k]) for k, v in ts.unmerge(model).state_dict().items())
    for name, weight in {"a": 0.5, "b": 1.0, "c": 2.0}.items():
        ts.activate(model, {name: weight})
        ts.merge(model)
    close(model(X), expected)
    ts.merge(model)  # nothing left to merge
    close(model(X), expected)
    with pytest.raises(ts.TunesmithError, match="'a' is merged into the weights; unmerge first"):
        ts.activate(model, "a")
    assert all(torch.equal(v, base[k]) for k, v in ts.unmerge(model).state_dict().items())


def test_merge_that_fails_changes_nothing():
    model = attach(net(), a=ts.LoRA(targets=["0"]), s=ts.SeriesAdapter(targets=["2"]))
    ts.activate(model, ["a", "s"])
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(X)
    with pytest.raises(ts.TunesmithError, match="'s'.*cannot be merged"):
        ts.merge(model)
    assert torch.equal(model(X), expected) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_disabled_inside_merged_and_disabled():
    model = net()
    with torch.no_grad():
        base = model(X)
    attach(model, a=ts.LoRA(), b=ts.IA3(targets=["2"]))
    ts.activate(model, "a")
    ts.merge(model)
    ts.activate(model, "b")
    both = model(X)
    with ts.disabled(model):
        assert torch.equal(model(X), base)
        with ts.disabled(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), both)
    with pytest.raises(ZeroDivisionError), ts.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(X), both)


def test_disabled_inside_mixed():
    model = attach(net(), a=ts.LoRA(), b=ts.LoRA())
    with ts.disabled(model):
        base = model(X)
    with ts.mixed(model, ["a", None, "b"]):
        rows = model(X)
        with ts.disabled(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), rows)
    close(rows[1], base[1])


def test_detach_one_of_two():
    model = net()
    types = [type(m) for m in model.modules()]
    attach(model, a=ts.LoRA(targets=["0"]), b=ts.LoRA(targets=["0", "2"]))
    ts.activate(model, "a")
    expected = model(X)
    ts.activate(model, ["a", "b"])
    ts.detach(model, "b")
    assert torch.equal(model(X), expected)
    assert list(hubs(model)) == ["0"] and type(model[2]) is nn.Linear and ts.trainable(model).keys() == {"0.tunesmith.adapters.a.A", "0.tunesmith.adapters.a.B"}
    with pytest.raises(ts.TunesmithError, match="no adapter named 'b'"):
        ts.detach(model, "b")
    ts.adapt(model, ts.LoRA(targets=["2"]), name="b")  # the name is free again
    ts.detach(model, "b")
    ts.detach(model, "a")
    assert [type(m) for m in model.modules()] == types and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ts.TunesmithError, match="has no adapter; attach one"):
        ts.trainable(model)


@pytest.mark.parametrize("gone", ["a", "b"])
def test_detach_one_of_two_where_one_is_merged(gone):
    model = attach(net(), a=ts.LoRA(), b=ts.LoRA(targets=["2"]))
    base = {k: v.clone() for k, v in net().state_dict().items()}
    ts.activate(model, "a")
    alone = model(X)
    ts.merge(model)
    ts.activate(model, "b")
    ts.detach(model, gone)
    if gone == "b":
        close(model(X), alone)
        ts.unmerge(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if "tunesmith" not in k)
    ts.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


METHODS = {"lora": ts.LoRA(), "dora": ts.DoRA(), "ia3": ts.IA3(), "series": ts.SeriesAdapter(bottleneck=4), "full": ts.Full(), "bias": ts.BitFit()}


@pytest.mark.parametrize("method", METHODS)
def test_mixed_gradients_are_those_of_each_adapter_on_its_rows(method):
    model = attach(tiny.tiny_gpt2().double(), a=METHODS[method], b=METHODS[method])

    def gradients(names, ids):
        model.zero_grad()
        model(input_ids=ids).logits.square().sum().backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None and any(f".{n}." in path for n in names)}

    expected = {}
    for name, rows in (("a", [0, 3]), ("b", [1])):
        ts.activate(model, name)
        expected |= gradients(name, IDS[rows])
    with ts.mixed(model, ["a", "b", None, "a"]):
        together = gradients("ab", IDS)
    assert together.keys() == expected.keys()
    for path, grad in expected.items():
        torch.testing.assert_close(together[path], grad, atol=1e-10, rtol=1e-6, msg=lambda m, path=path: f"{path}: {m}")


def test_mixed_methods_that_share_no_layer():
    model = attach(net(), a=ts.LoRA(targets=["0"]), b=ts.IA3(targets=["2"]))
    alone = {}
    for name in ("a", "b", None):
        ts.activate(model, name or [])
        alone[name] = model(X)
    with ts.mixed(model, ["b", None, "a"]):
        close(model(X), torch.stack([alone["b"][0], alone[None][1], alone["a"][2]]))


def test_rows_times_beams():
    model = attach(net(), a=ts.LoRA(), b=ts.LoRA())
    alone = {}
    beams = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("a", "b", None):
        ts.activate(model, name or [])
        alone[name] = model(beams)
    rows = ["b", None, "a"]
    with ts.mixed(model, rows):
        close(model(beams), torch.stack([alone[rows[i // 2]][i] for i in range(6)]))
        with pytest.raises(ts.TunesmithError, match="a mixed batch of 3 rows met an input of 4"):
            model(beams[:4])


def test_beam_search_of_a_mixed_batch():
    model = attach(tiny.tiny_llama(), a=ts.LoRA(alpha=64), b=ts.LoRA(alpha=64))
    call = dict(max_new_tokens=5, num_beams=3, do_sample=False, attention_mask=torch.ones_like(IDS[:3]), pad_token_id=0, eos_token_id=None)
    rows, alone = ["b", None, "a"], []
    for i, name in enumerate(rows):
        ts.activate(model, name or [])
        alone.append(model.generate(IDS[:3], **call)[i])
    with ts.mixed(model, rows):
        assert torch.equal(model.generate(IDS[:3], **call), torch.stack(alone))


def test_mixed_needs_known_names_and_the_bases_weights():
    model = attach(net(), first=ts.LoRA())
    with pytest.raises(ts.TunesmithError, match="no adapter named 'firts' .did you mean 'first'"), ts.mixed(model, ["firts"]):
        pass
    ts.merge(model)
    with pytest.raises(ts.TunesmithError, match="unmerge first first"), ts.mixed(model, ["first"]):
        pass
    ts.unmerge(model)
    expected = model(X)
    with pytest.raises(ZeroDivisionError), ts.mixed(model, [None]):
        raise ZeroDivisionError
    assert torch.equal(model(X), expected)  # the mix ends with its block, however it ends


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "a/b", "a\n", 3, None, "keys", "items", "training", "forward", "_modules"])
def test_names_that_cannot_be(name):
    model = net()
    with pytest.raises(ts.TunesmithError, match="name"):
        ts.adapt(model, "lora", name=name)
    assert not hubs(model) and all(p.requires_grad for p in model.parameters())


def test_a_name_is_taken_once():
    model = attach(net(), a=ts.LoRA())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ts.TunesmithError, match="'a' already; choose another name or detach"):
        ts.adapt(model, "lora", name="a")
    assert model.state_dict().keys() == before.keys()
    for name in ("A", "0", "a-b_C9", "default"):
        ts.adapt(model, "lora", name=name)
    assert list(state_of(model).records) == ["a", "A", "0", "a-b_C9", "default"]


def test_lineage(tmp_path):
    model = attach(net(), a=ts.LoRA(), b=ts.IA3(targets=["2"]))
    assert record_of(model, "b").lineage == []  # beside another adapter is not on top of it
    ts.activate(model, {"a": 0.5, "b": 1.0})
    ts.merge(model)
    attach(model, c=ts.LoRA(targets=["0"]))
    lineage = [{"name": "a", "weight": 0.5, "method": "lora"}, {"name": "b", "weight": 1.0, "method": "ia3"}]
    assert record_of(model, "c").lineage == lineage
    ts.save(model, tmp_path / "c", name="c")
    ts.unmerge(model)
    ts.detach(model, "c")
    with pytest.raises(ts.TunesmithError, match="trained on top of adapter 'a'"):
        ts.load(model, tmp_path / "c")
    ts.load(model, tmp_path / "c", force=True)
    assert record_of(model, "c").lineage == lineage


def test_activate_takes_gradients_with_it():
    model = attach(net(), a=ts.LoRA(), b=ts.LoRA())
    for names, wanted in (("a", "a"), (["a", "b"], "ab"), ({"b": 0.5}, "b"), ([], ""), ("b", "b")):
        ts.activate(model, names)
        assert {path.split(".")[3] for path in ts.trainable(model)} == set(wanted)
        assert all(not p.requires_grad for path, p in model.named_parameters() if "tunesmith" not in path)
    with pytest.raises(ts.TunesmithError, match="no adapter named 'c'"):
        ts.activate(model, ["a", "c"])
    assert {path.split(".")[3] for path in ts.trainable(model)} == {"b"}  # a refused choice changes nothing
