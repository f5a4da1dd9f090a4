"""Every method on a base whose weights are packed computes what it computes on the matrices that these stand for."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests.contract import zoo
from tunesmith.methods import registry
from tunesmith.quantize import PackedWeight, packed_weights, quantize

MODELS = ("llama", "bert")
NEED = {"peqa": "int4", "sketchtune": "sketch4"}  # what these train is a part of the packed weight
PAIRS = [(method, kind) for method in registry for kind in MODELS if kind not in zoo.CANNOT.get(method, ()) and registry[method].quantized_base_ok]


def pair(method, kind, format="nf4", dtype=torch.float32):
    """The same adapter on packed weights and on the matrices they stand for."""
    packed = quantize(zoo.build(kind, dtype), {"format": format, "group_size": 16})
    plain = zoo.build(kind, dtype)
    with torch.no_grad():
        for path, weight in packed_weights(packed).items():
            plain.get_parameter(path).copy_(weight.dequantize())
    for model in (packed, plain):
        torch.manual_seed(3)
        zoo.adapt(model, zoo.GIVEN.get(method, method))
        zoo.stir(model)
    return packed, plain


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] not in NEED])
def test_outputs_and_gradients_are_those_of_the_matrices(method, kind):
    packed, plain = pair(method, kind)
    batch = zoo.inputs(kind)
    found = []
    for model in (packed, plain):
        value = zoo.loss(model.train(), batch)
        value.backward()
        found.append((value, {name: p.grad for name, p in ts.trainable(model).items()}))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, gradient in found[1][1].items():
        assert (gradient is None) == (found[0][1][name] is None)
        if gradient is not None:
            assert torch.allclose(found[0][1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_the_base_stays_packed_and_comes_back(method, kind):
    model = quantize(zoo.build(kind), {"format": NEED.get(method, "int4"), "group_size": 16})
    batch, before = zoo.inputs(kind), packed_weights(model)
    codes = {path: w.parts["codes"].clone() for path, w in before.items()}
    alone = zoo.logits(model, batch)
    zoo.adapt(model, zoo.GIVEN.get(method, method))
    zoo.stir(model)
    adapted = zoo.logits(model.eval(), batch)
    if registry[method].mergeable:
        ts.merge(model)
        assert torch.allclose(zoo.logits(model, batch), adapted, atol=2e-5)
        ts.unmerge(model)
    with ts.disabled(model):
        assert torch.equal(zoo.logits(model, batch), alone)
    ts.detach(model)
    now = packed_weights(model)
    assert all(now[path] is weight and torch.equal(weight.parts["codes"], codes[path]) for path, weight in before.items())
    assert torch.equal(zoo.logits(model, batch), alone)


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_no_matrix_is_kept_for_backward(method, kind):
    packed = pair(method, kind, NEED.get(method, "nf4"))[0]
    weights, kept = [w.dequantize() for w in packed_weights(packed).values()], []
    own = {p.data_ptr() for p in packed.parameters() if not isinstance(p, PackedWeight)}

    def look(t):
        if not isinstance(t, PackedWeight) and t.data_ptr() not in own:
            kept.extend(1 for W in weights for each in (W, W.T) if t.shape == each.shape and nn.functional.cosine_similarity(t.flatten(), each.flatten(), 0) > 0.8)
        return t

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        zoo.loss(packed.train(), zoo.inputs(kind))
    assert not kept


@pytest.mark.parametrize("method", ["lora", "dora", "shira"])
def test_saving_copying_and_pickling(method, tmp_path):
    packed, _ = pair(method, "llama")
    batch = zoo.inputs("llama")
    adapted = zoo.logits(packed.eval(), batch)
    ts.save(packed, tmp_path / "a")
    fresh = quantize(zoo.build("llama"), {"format": "nf4", "group_size": 16})
    assert torch.equal(zoo.logits(ts.load(fresh, tmp_path / "a"), batch), adapted)
    for model in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert packed_weights(model).keys() == packed_weights(packed).keys()
        assert torch.equal(zoo.logits(model, batch), adapted)
    with pytest.raises(ts.TunesmithError, match="other weights"):
        ts.load(zoo.build("llama"), tmp_path / "a")


@pytest.mark.parametrize("format", ["nf4", "nf3", "int8", "int3", "mxfp4", "nvfp4", "sketch4"])
def test_formats_in_training(format):
    packed, plain = pair("lora", "llama", format)
    batch = zoo.inputs("llama")
    assert torch.allclose(torch.tensor(zoo.train(packed, batch, 3)), torch.tensor(zoo.train(plain, batch, 3)), rtol=1e-4)


def test_bfloat16_autocast_and_checkpointing():
    packed, plain = pair("lora", "llama", dtype=torch.bfloat16)
    batch = zoo.inputs("llama")
    assert torch.allclose(zoo.loss(packed, batch), zoo.loss(plain, batch), rtol=2e-2)
    packed, plain = pair("lora", "llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(zoo.loss(packed, batch), zoo.loss(plain, batch), rtol=1e-3)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(torch.tensor(zoo.train(packed.train(), batch, 2)), torch.tensor(zoo.train(plain.train(), batch, 2)), rtol=1e-4)


def test_a_compiled_model(tmp_path):
    packed, plain = pair("lora", "llama")
    compiled = torch.compile(packed, backend="aot_eager")
    batch = zoo.inputs("llama")
    value = zoo.loss(compiled, batch)
    value.backward()
    assert torch.allclose(value, zoo.loss(plain, batch), rtol=1e-5)


def test_a_layer_that_is_not_adapted_keeps_no_matrix():
    model = quantize(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), "nf4", targets="0")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 32, requires_grad=True))
    assert not [t for t in kept if t.numel() == 32 * 64 and not isinstance(t, PackedWeight)]
