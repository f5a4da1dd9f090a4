"""VeRA: the paper's counts, peft's random numbers, one pair of matrices, and files that do without them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.engine.sites import sites


def stirred(model, **config):
    torch.manual_seed(1)
    ts.adapt(model, ts.VeRA(**{"rank": 6, "targets": ["q_proj", "v_proj", "down_proj"], **config}))
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.normal_()
    return model


def logits(model):
    with torch.no_grad():
        return model(**tiny.batch("llama")).logits


def count(shapes, rank):
    layers = sites(nn.ModuleList(nn.Linear(size, out, device="meta") for out, size in shapes))
    return sum(ts.VeRA(rank=rank).count(site) for site in layers)


def test_counts_of_the_paper():
    assert ts.VeRA().rank == 256
    base, large = [(768, 768)] * 24, [(1024, 1024)] * 48  # queries and values of RoBERTa
    assert count(base, 1) == 18_456 and count(base, 16) == 18_816 and count(base, 256) == 24_576  # table 1: 18.4K, 18.8K, 24.5K
    assert count(large, 256) == 61_440 and count(base, 1024) == 43_008  # table 2: 0.061M, 0.043M
    for hidden, inner, layers, millions in ((4096, 11008, 32, 1.6), (5120, 13824, 40, 2.4)):  # Llama 2 7B and 13B, every linear layer but the head
        assert round(count(([(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]) * layers, 1024) / 1e6, 1) == millions


def test_the_matrices_are_one_stream_of_kaiming_uniform_numbers():
    model = stirred(tiny.tiny_llama(), projection_prng_key=5)  # q 32 → 32, v 32 → 16, down 64 → 32
    held = {id(a.projections) for a in adapters(model, "default").values()}
    projections = next(iter(adapters(model, "default").values())).projections
    stream = torch.Generator().manual_seed(5)
    A, B = (nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="relu", generator=stream) for shape in ((6, 64), (32, 6)))
    assert len(held) == 1 and torch.equal(projections.A, A) and torch.equal(projections.B, B)
    moved = copy.deepcopy(model).double()
    assert len({a.projections.B.data_ptr() for a in adapters(moved, "default").values()}) == 1
    assert adapters(moved, "default")["model.layers.0.mlp.down_proj"].projections.B.dtype == torch.float64


def plain(base, adapter, x):
    """Equation 2, with vectors on the activations."""
    out, size = base.weight.shape
    A, B = adapter.projections.A[:, :size], adapter.projections.B[:out]
    return F.linear(x, base.weight, base.bias) + adapter.b * F.linear(adapter.d * F.linear(x, A), B)


def test_outputs_and_gradients_are_those_of_the_equation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7, dtype=torch.float64), nn.Linear(7, 4, dtype=torch.float64))
    ts.adapt(net, ts.VeRA(rank=3, targets=["0", "1"]))
    for layer in net:
        adapter = layer.tunesmith.adapters["default"]
        assert adapter.d.eq(0.1).all() and not adapter.b.any()
        with torch.no_grad():
            adapter.b.normal_(), adapter.d.normal_()
        x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
        wanted = x, adapter.d, adapter.b
        y, expected = layer(x), plain(layer, adapter, x)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        for ours, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_neither_the_input_nor_a_matrix_of_the_weights_size_is_kept():
    net = nn.Sequential(nn.Linear(50, 40, bias=False))
    ts.adapt(net, ts.VeRA(rank=3, targets=["0"]))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        net(torch.randn(20, 50, requires_grad=True))
    own = {net[0].weight.data_ptr()}
    assert max(t.numel() for p, t in kept.items() if p not in own) <= 3 * 50


@pytest.mark.parametrize("hollow", [False, True])
def test_a_file_without_the_matrices_gives_them_back(tmp_path, hollow):
    model = stirred(tiny.tiny_llama(), projection_prng_key=3)
    ts.save(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"d", "b"} and sum(t.numel() for t in saved.values()) == 2 * (3 * 6 + 32 + 16 + 32)
    other = tiny.tiny_llama()
    if hollow:
        weights, buffers = other.state_dict(), dict(other.named_buffers())
        with torch.device("meta"):
            other = tiny.tiny_llama().to("meta")
            ts.load(other, tmp_path / "a")
        other.load_state_dict(weights, strict=False, assign=True)
        for path, buffer in buffers.items():  # the rotary frequencies, which no checkpoint holds
            other.get_submodule(path.rpartition(".")[0]).register_buffer(path.rpartition(".")[2], buffer, persistent=False)
    else:
        ts.load(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))


def test_layers_of_another_rank_or_key_have_a_pair_of_their_own(tmp_path):
    model = stirred(tiny.tiny_llama(), targets={"q_proj": {}, "v_proj": {"rank": 2}, "o_proj": {"projection_prng_key": 1}})
    layers = adapters(model, "default")
    assert len({id(a.projections) for a in layers.values()}) == 3
    assert layers["model.layers.1.self_attn.v_proj"].projections.B.shape == (16, 2)
    with pytest.raises(ts.TunesmithError, match="one r, projection_prng_key and vera_dropout"):
        ts.save(model, tmp_path / "p", format="peft")
    ts.save(model, tmp_path / "a")
    assert torch.equal(logits(ts.load(tiny.tiny_llama(), tmp_path / "a")), logits(model))


def edited(folder, change, **fields):
    """Rewrite a peft folder's tensors and config."""
    tensors, card = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(card | fields))
    return tensors


def test_a_peft_file_whose_matrices_its_key_does_not_draw_keeps_them(tmp_path):
    model = stirred(tiny.tiny_llama())
    ts.save(model, tmp_path / "p", format="peft")
    tensors = edited(tmp_path / "p", lambda t: t["base_model.vera_B"].mul_(1.5))
    other = ts.load(tiny.tiny_llama(), tmp_path / "p")
    for adapter in adapters(model, "default").values():
        nn.Parameter.mul_(adapter.b.data, 1.5)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=0)
    ts.save(other, tmp_path / "own")
    again = ts.load(tiny.tiny_llama(), tmp_path / "own")
    assert torch.equal(logits(again), logits(other)) and len({id(a.projections) for a in adapters(again, "default").values()}) == 1
    ts.save(again, tmp_path / "back", format="peft")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_peft_file_without_matrices(tmp_path):
    model = stirred(tiny.tiny_llama())
    ts.save(model, tmp_path / "p", format="peft")
    edited(tmp_path / "p", lambda t: [t.pop(f"base_model.vera_{name}") for name in "AB"])
    with pytest.raises(ts.TunesmithError, match="lacks base_model.vera_A or vera_B"):
        ts.load(tiny.tiny_llama(), tmp_path / "p")
    edited(tmp_path / "p", lambda t: None, save_projection=False)
    assert torch.equal(logits(ts.load(tiny.tiny_llama(), tmp_path / "p")), logits(model))


def test_a_peft_file_for_wider_layers_is_refused(tmp_path):
    ts.save(stirred(tiny.tiny_llama()), tmp_path / "p", format="peft")
    edited(tmp_path / "p", lambda t: t.update({"base_model.vera_A": torch.ones(6, 80)}))
    with pytest.raises(ts.TunesmithError, match=r"vera_A|projections.A.*\(6, 80\).*\(6, 64\)"):
        ts.load(tiny.tiny_llama(), tmp_path / "p")
    edited(tmp_path / "p", lambda t: None, bias="all")
    with pytest.raises(ts.TunesmithError, match="trains biases"):
        ts.load(tiny.tiny_llama(), tmp_path / "p")


def test_peft_acts_on_linear_layers_alone(tmp_path):
    model = ts.adapt(tiny.tiny_convnet(), ts.VeRA(rank=2, targets=["0"]))
    with pytest.raises(ts.TunesmithError, match="linear layers alone, not on '0'"):
        ts.save(model, tmp_path / "p", format="peft")
