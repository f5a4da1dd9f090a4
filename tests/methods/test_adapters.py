"""Series and parallel adapters: where they sit, what they read, how many parameters they have."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs

BEGINS = {
    "llama": "model.layers.0.post_attention_layernorm",
    "gpt2": "transformer.h.0.ln_2",
    "bert": "bert.encoder.layer.0.intermediate.dense",
    "t5": "encoder.block.0.layer.1.layer_norm",
    "vit": "vit.layers.0.layernorm_after",
}
ENDS = {
    "llama": "model.layers.0.mlp.down_proj",
    "gpt2": "transformer.h.0.mlp.c_proj",
    "bert": "bert.encoder.layer.0.output.dense",
    "t5": "encoder.block.0.layer.1.DenseReluDense.wo",
    "vit": "vit.layers.0.mlp.fc2",
}


def stir(model, size=0.1):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def given_and_made(model, begin, end, kind):
    """What a layer is given and what another one gives in a forward."""
    seen = {}
    hooks = [
        model.get_submodule(begin).register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        model.get_submodule(end).register_forward_hook(lambda _, args, y: seen.update(y=y)),
    ]
    with torch.no_grad():
        model(**tiny.batch(kind))
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["y"]


@pytest.mark.parametrize("kind", BEGINS)
def test_parallel_reads_the_stream_before_the_norm_and_adds_to_the_block(kind):
    model = ts.adapt(tiny.BUILDERS[kind](), ts.ParallelAdapter(bottleneck=4))
    found = list(hubs(model))
    assert BEGINS[kind] in found and ENDS[kind] in found and len(found) == (8 if kind == "t5" else 4)
    stir(model)
    layer = adapters(model, "default")[ENDS[kind]]
    x, y = given_and_made(model, BEGINS[kind], ENDS[kind], kind)
    with ts.disabled(model):
        same, below = given_and_made(model, BEGINS[kind], ENDS[kind], kind)
    torch.testing.assert_close(x, same)  # the first block of the model
    branch = 0.1 * F.linear(F.relu(F.linear(x, layer.down, layer.down_bias)), layer.up, layer.up_bias)
    torch.testing.assert_close(y, below + branch)


def test_parallel_beside_linear_layers_and_norms():
    model = ts.adapt(tiny.tiny_llama(), ts.ParallelAdapter(targets=["up_proj", "input_layernorm"], bottleneck=4, activation="tanh", scale=1.0, bias=False))
    assert {path.rpartition(".")[2] for path in hubs(model)} == {"up_proj", "input_layernorm"}
    stir(model)
    site, x = model.model.layers[1].mlp.up_proj, torch.randn(2, 3, 32)
    layer = site.tunesmith.adapters["default"]
    torch.testing.assert_close(site(x), F.linear(x, site.weight) + torch.tanh(x @ layer.down.T) @ layer.up.T)


def test_parallel_keeps_to_some_layers_and_files_bring_it_back(tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(), ts.ParallelAdapter(bottleneck=4, layers=[-1])))
    assert set(hubs(model)) == {"model.layers.1.post_attention_layernorm", "model.layers.1.mlp.down_proj"}
    batch = tiny.batch("llama")
    expected = model(**batch).logits
    ts.save(model, tmp_path / "a")
    torch.testing.assert_close(ts.load(tiny.tiny_llama(), tmp_path / "a")(**batch).logits, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(adapter.given.x is None for adapter in adapters(twin, "default").values())  # no activations in copies
        torch.testing.assert_close(twin(**batch).logits, expected)


def test_parallel_and_prefix_are_one_method():
    model = ts.adapt(
        tiny.tiny_llama(), {"method": "combined", "parts": [{"method": "parallel-adapter", "bottleneck": 4}, {"method": "prefix-tuning", "tokens": 2}]}
    )
    model(**tiny.batch("llama")).logits.square().mean().backward()
    assert all(p.grad is not None for p in ts.trainable(model).values())


def test_parallel_in_a_block_of_torch():
    """`norm2` is before the block or behind it."""
    for first in (True, False):
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=first)
        model = ts.adapt(nn.Sequential(layer, nn.Linear(16, 16), nn.Linear(16, 2)), "parallel-adapter")
        assert ("0.norm2" in hubs(model)) == first and ("0.linear1" in hubs(model)) != first


def test_parallel_says_when_the_norm_is_not_where_it_seems():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            return x + self.norm2(self.fc2(self.fc1(x)))

    model = nn.Sequential(Block(), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(ts.TunesmithError, match=r"'0.fc2' ran before the norm"):
        ts.adapt(model, "parallel-adapter")(torch.randn(2, 3, 8))


def test_parallel_refuses_channels_that_are_not_last():
    with pytest.raises(ts.TunesmithError, match="BatchNorm2d"):
        ts.adapt(tiny.tiny_convnet(), "parallel-adapter", targets=["1"])


def test_houlsby_is_behind_both_parts_of_a_layer():
    model = ts.adapt(tiny.tiny_gpt2(), ts.SeriesAdapter(placement="houlsby", bottleneck=4))
    assert list(hubs(model)) == [f"transformer.h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")]
    assert list(hubs(ts.adapt(tiny.tiny_gpt2(), "series-adapter"))) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.raises(ts.TunesmithError, match="series-adapter cannot act on '0.self_attn.out_proj'"):
        ts.adapt(nn.Sequential(layer, nn.Linear(16, 2)), ts.SeriesAdapter(placement="houlsby"))


def test_series_with_biases():
    model = stir(ts.adapt(nn.Sequential(nn.Linear(8, 8)), ts.SeriesAdapter(targets=["0"], bottleneck=3, bias=True, activation="gelu", scale=0.5)))
    layer, x = model[0].tunesmith.adapters["default"], torch.randn(2, 8)
    h = F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), h + 0.5 * F.linear(F.gelu(F.linear(h, layer.down, layer.down_bias)), layer.up, layer.up_bias))
    assert len(ts.trainable(model)) == 4 and layer.up_bias.any()


def test_counts_of_llama_7b():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, intermediate_size=11008, hidden_size=4096))
    plain = {"bottleneck": 256, "bias": False}
    for config, trained in (
        (ts.ParallelAdapter(targets=["up_proj", "down_proj"], **plain), 247_463_936),
        (ts.SeriesAdapter(**plain), 67_108_864),
        (ts.SeriesAdapter(targets=["up_proj", "gate_proj"], **plain), 134_217_728),
    ):
        assert ts.summary(ts.adapt(model, config)).trainable * 16 == trained
        ts.detach(model)
