"""FourierFT: the paper's counts and equation, in the space of the activations, at peft's entries."""

import math

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.engine.sites import sites
from tunesmith.methods.fourierft import pattern


def net(out=6, size=5, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return ts.adapt(nn.Sequential(nn.Linear(size, out, dtype=dtype)), ts.FourierFT(**config), targets=["0"])


def adapter_of(model):
    return model[0].tunesmith.adapters["default"]


def test_counts_of_the_paper():
    def count(layers, hidden, n):
        return layers * ts.FourierFT(n_frequency=n).count(sites(nn.Sequential(nn.Linear(hidden, hidden, device="meta")))[0])

    # queries and values of RoBERTa base and large, GPT-2 medium, LLaMA2 7B, ViT base
    assert (count(24, 768, 1000), count(48, 1024, 1000), count(48, 1024, 1000), count(64, 4096, 1000), count(24, 768, 3000)) == (24_000, 48_000, 48_000, 64_000, 72_000)


@pytest.mark.parametrize("out,size,n", [(6, 5, 12), (7, 8, 20), (4, 4, 16), (1, 5, 5), (5, 1, 4), (8, 6, 48)])
def test_the_change_is_the_sum_of_waves(out, size, n):
    model = net(out, size, n_frequency=n, scaling=3.0)
    adapter, W = adapter_of(model), model[0].weight.detach()
    where = torch.randperm(out * size, generator=torch.Generator().manual_seed(777))[:n].tolist()
    change = torch.zeros(out, size, dtype=torch.float64)
    for c, (j, k) in zip(adapter.spectrum.tolist(), [divmod(e, size) for e in where], strict=True):  # equation 3, real part, as ifft2 scales it
        for p in range(out):
            for q in range(size):
                change[p, q] += 3.0 * c * math.cos(2 * math.pi * (p * j / out + q * k / size)) / (out * size)
    torch.testing.assert_close(adapter.merged(W, None)[0], W + change)
    x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), nn.functional.linear(x, W + change, model[0].bias)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g, retain_graph=True), torch.autograd.grad(expected, x, g))
    formed = nn.functional.linear(x, *adapter.merged(W, model[0].bias))
    torch.testing.assert_close(torch.autograd.grad(y, adapter.spectrum, g), torch.autograd.grad(formed, adapter.spectrum, g))


def test_gradcheck_and_one_gradient_alone():
    from tunesmith.engine.fused import spectral_linear

    def change(x, c):
        return spectral_linear(x, c, torch.tensor([0, 3, 5, 2, 1]), torch.tensor([4, 0, 2, 2, 3]), 6, 1.5)

    for x_grad, c_grad in ((True, True), (True, False), (False, True)):
        x, c = torch.randn(2, 5, dtype=torch.float64, requires_grad=x_grad), torch.randn(5, dtype=torch.float64, requires_grad=c_grad)
        assert torch.autograd.gradcheck(change, (x, c))
        torch.testing.assert_close(torch.func.vmap(change, (0, None))(x, c), change(x, c))


def test_nothing_but_the_input_and_the_spectrum_is_kept():
    model = net(40, 50, torch.float32, n_frequency=7)
    x = torch.randn(20, 50, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(x)
    own = {p.data_ptr() for p in model.parameters()}
    rest = [t.numel() for pointer, t in kept.items() if pointer not in own]
    assert sorted(rest)[-1] <= x.numel() and rest.count(x.numel()) <= 1


def test_every_layer_of_one_shape_has_the_same_entries():
    model = ts.adapt(tiny.tiny_llama(), ts.FourierFT(n_frequency=20, targets=["q_proj", "o_proj", "v_proj"]))
    layers = adapters(model, "default")
    q, v = layers["model.layers.0.self_attn.q_proj"], layers["model.layers.0.self_attn.v_proj"]
    same = [a for a in layers.values() if torch.equal(a.rows, q.rows) and torch.equal(a.columns, q.columns)]
    assert len(same) == 4 and not torch.equal(v.rows, q.rows) and q.rows.max() >= 16 > v.rows.max()
    other = ts.adapt(tiny.tiny_llama(), ts.FourierFT(n_frequency=20, random_loc_seed=1, targets=["q_proj"]))
    assert not torch.equal(adapters(other, "default")["model.layers.0.self_attn.q_proj"].rows, q.rows)


def test_the_start_is_normal_and_as_small_as_the_papers_in_every_size_of_layer():
    sizes = {}
    for width in (768, 384):
        adapter = adapter_of(net(width, width, torch.float32))
        assert abs(adapter.spectrum.std() - 1) < 0.1
        sizes[width] = adapter.merged(torch.zeros(width, width), None)[0].std().item()
    expected = 150 * 500**0.5 / 768**2
    assert sizes[768] == pytest.approx(expected, rel=0.1) and sizes[384] == pytest.approx(expected, rel=0.1)
    assert adapter_of(net(4, 4, n_frequency=9, scaling=150.0)).scaling == 150 and adapter_of(net(768, 1024, torch.float32)).scaling == 150


def test_zeros_start_from_the_base():
    model = net(init="zeros")
    x = torch.randn(3, 5, dtype=torch.float64)
    with ts.disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert adapter_of(model).spectrum.grad.any()


def test_bfloat16_activations_and_hollow_bases(tmp_path):
    model = net(6, 8, torch.bfloat16, n_frequency=20, scaling=9.0)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), nn.functional.linear(x.float(), *adapter_of(model).merged(model[0].weight.float(), model[0].bias.float())), atol=0.02, rtol=0.02)
    ts.save(model, tmp_path / "a")
    other = nn.Sequential(nn.Linear(8, 6, dtype=torch.bfloat16, device="meta"))
    with torch.device("meta"):
        ts.load(other, tmp_path / "a")
    other.load_state_dict({"0.weight": model[0].weight, "0.bias": model[0].bias}, strict=False, assign=True)
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("counts", [{"a.q": 5, "b.q": 9, "q": 9}, {"q": 5, "a.q": 9}, {"q": 9, "a.q": 5, "b.a.q": 7}, {"x.q": 5, "y.q": 6}, {"q": 9}])
def test_patterns_mean_one_layer_each(counts):
    import re

    keys = dict(sorted(pattern(counts, 9).items()))
    for path, n in counts.items():  # as peft looks it up
        found = next((key for key in keys if re.match(rf".*\.{key}$", path)), path)
        assert keys.get(found, 9) == n


def test_what_peft_cannot_hold(tmp_path):
    model = ts.adapt(tiny.tiny_convnet(), ts.FourierFT(n_frequency=4, targets=["0"]))
    with pytest.raises(ts.TunesmithError, match="linear layers alone, not on '0'"):
        ts.save(model, tmp_path / "p", format="peft")
    model = ts.adapt(tiny.tiny_llama(), {"method": "fourierft", "targets": {"q_proj": {}, "v_proj": {"scaling": 30}}})
    with pytest.raises(ts.TunesmithError, match="one scaling"):
        ts.save(model, tmp_path / "p", format="peft")
    assert not list(tmp_path.iterdir())
