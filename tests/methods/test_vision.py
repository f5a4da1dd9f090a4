"""The baselines of vision transformers: counts of ViT-B/16, what trains, where tokens and layers go."""

import pytest
import torch
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs

BATCH = tiny.batch("vit")
METHODS = ["parallel-adapter", "series-adapter", "ssf", "convpass", "vpt", "fact-tt", "fact-tk", "repadapter"]


@pytest.fixture(scope="module")
def vit_b():
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig())


COUNTS = [
    ({"method": "vpt", "tokens": 50}, 460_800),
    ({"method": "vpt", "tokens": 50, "deep": False}, 38_400),
    ({"method": "series-adapter", "bottleneck": 8, "bias": True}, 156_768),
    ({"method": "series-adapter", "bottleneck": 8, "bias": True, "placement": "houlsby"}, 313_536),
    ({"method": "parallel-adapter", "bottleneck": 8}, 156_768),
    ({"method": "parallel-adapter"}, 1_189_632),
    ({"method": "convpass"}, 327_552),
    ({"method": "convpass", "placement": "attention"}, 163_776),
    ({"method": "ssf"}, 205_824),
    ({"method": "fact-tt", "rank": 8}, 21_504),
    ({"method": "fact-tt"}, 61_440),
    ({"method": "fact-tk", "rank": 16}, 30_976),
    ({"method": "fact-tk"}, 86_528),
    ({"method": "repadapter"}, 239_808),
]


@pytest.mark.parametrize("config,trained", COUNTS, ids=str)
def test_counts(vit_b, config, trained):
    assert ts.summary(ts.adapt(vit_b, config)).trainable == trained
    ts.detach(vit_b)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_dead(method):
    """Every trained tensor has a gradient after two steps."""
    model = ts.adapt(tiny.tiny_vit(), method)
    optimizer = torch.optim.SGD(ts.trainable(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**BATCH).logits.square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for p in ts.trainable(model).values())


def lengths(model):
    """Tokens that each block gives."""
    return [h.shape[1] for h in model(**BATCH, output_hidden_states=True).hidden_states[1:]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_between_the_class_token_and_the_patches(deep, attention):
    model = tiny.tiny_vit(layers=3, attn_implementation=attention)
    with torch.no_grad():
        before = model(**BATCH).logits
    ts.adapt(model, ts.VPT(tokens=2, deep=deep))
    prompt = adapters(model, "default")["vit"].prompt
    assert prompt.shape == (3 if deep else 1, 2, 32) and prompt.abs().max() <= (6 / (3 * 8 * 8 + 32)) ** 0.5
    given = []
    hooks = [model.vit.layers[i].layernorm_before.register_forward_pre_hook(lambda _, args: given.append(args[0])) for i in range(3)]
    assert not torch.equal(model(**BATCH).logits, before)
    assert all(x.shape[1] == 1 + 2 + 4 for x in given)
    for i, p in enumerate(prompt):
        torch.testing.assert_close(given[i][:, 1:3], p.expand(3, -1, -1))
    assert deep or not torch.equal(given[1][:, 1:3], given[0][:, 1:3])
    for hook in hooks:
        hook.remove()
    assert model.vit(**BATCH).last_hidden_state.shape[1] == 1 + 4


def test_rows_with_and_without_prompts_share_a_batch():
    model = tiny.tiny_vit()
    ts.adapt(model, ts.VPT(tokens=2), name="a")
    ts.adapt(model, ts.VPT(tokens=5, deep=False), name="b")
    alone = {}
    for name in ("a", "b", None):
        ts.activate(model, name or [])
        alone[name] = model(**BATCH).logits
    with ts.mixed(model, ["b", None, "a"]):
        together = model(**BATCH).logits
    for i, name in enumerate(["b", None, "a"]):
        torch.testing.assert_close(together[i], alone[name][i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["vpt", "convpass"])
def test_other_models_are_refused(method):
    for model in (tiny.tiny_llama(), tiny.tiny_convnet()):
        with pytest.raises(ts.TunesmithError, match=f"{method} acts on a vision transformer"):
            ts.adapt(model, method)


def test_prompts_are_refused_where_blocks_know_the_place_of_every_token():
    config = BeitConfig(image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_relative_position_bias=True)
    with pytest.raises(ts.TunesmithError, match="know the place of every token .*relative_position_bias"):
        ts.adapt(BeitForImageClassification(config), "vpt")


def test_prompts_and_bypasses_are_not_for_single_layers():
    with pytest.raises(ts.TunesmithError, match="acts on the whole"):
        ts.adapt(tiny.tiny_vit(), ts.VPT(layers=[0]))
    with pytest.raises(ts.TunesmithError, match="method of the whole model"):
        ts.adapt(tiny.tiny_vit(), "lora", targets={"fc1": {"method": "convpass"}})
    assert len(hubs(ts.adapt(tiny.tiny_vit(), ts.Convpass(layers=[-1])))) == 5  # two blocks, and where patches are made


class Attention(nn.Module):
    """Queries, keys and values in one, as timm has them."""

    def __init__(self, d, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedViT(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.cls_token, self.patch_embed = nn.Parameter(torch.zeros(d)), nn.Conv2d(3, d, 8, 8)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"attn": Attention(d, 4), "mlp": nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))}) for _ in range(2)]
        )
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)
        for block in self.blocks:
            x = x + block["attn"](x)
            x = x + block["mlp"](x)
        return self.head(x[:, 0])


def test_layers_that_hold_queries_keys_and_values_in_one():
    ends = {"convpass": {"attn.qkv", "attn.proj", "mlp.0", "mlp.2"}, "repadapter": {"attn.qkv", "mlp.0"}}
    more = {"convpass": {"patch_embed"}, "repadapter": set()}
    for method, expected in ends.items():
        model = ts.adapt(FusedViT(), method)
        assert set(hubs(model)) == {f"blocks.{i}.{name}" for i in range(2) for name in expected} | more[method]
        model(BATCH["pixel_values"]).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in ts.trainable(model).values())


def test_convpass_runs_over_the_grid():
    """A patch reaches its neighbours and the class token nothing but itself, whatever the image's shape."""
    model = ts.adapt(tiny.tiny_vit(image_size=40), ts.Convpass(bottleneck=4))
    layer = adapters(model, "default")["vit.layers.0.mlp.fc2"]
    nn.init.normal_(layer.up)
    model(torch.randn(1, 3, 40, 24), interpolate_pos_encoding=True)
    assert layer.given.grid == (5, 3)
    z = torch.randn(1, 16, 32)
    for token, reached in ((0, {0}), (1 + 4, {1 + i for i in range(9)}), (1 + 14, {1 + 10, 1 + 11, 1 + 13, 1 + 14})):
        other = z.clone()
        other[0, token] += 1
        changed = (layer.branch(other) - layer.branch(z))[0].abs().amax(1) > 1e-6
        assert set(changed.nonzero().flatten().tolist()) == reached


def test_convpass_takes_no_prompts_for_patches():
    """With five of them a sequence has 1 + 3·3 tokens."""
    model = tiny.tiny_vit()
    ts.adapt(model, "convpass", name="bypass")
    ts.adapt(model, ts.VPT(tokens=5), name="prompt")
    ts.activate(model, ["bypass", "prompt"])
    with pytest.raises(ts.TunesmithError, match="all patches, 1 \\+ 2·2 tokens; here it met 10"):
        model(**BATCH)


def test_ssf_starts_at_the_base_or_as_the_authors_do():
    model = tiny.tiny_vit()
    with torch.no_grad():
        before = model(**BATCH).logits
    assert torch.equal(ts.adapt(model, "ssf")(**BATCH).logits, before)
    assert "vit.embeddings.patch_embeddings.projection" in hubs(model) and "classifier" not in hubs(model)
    ts.detach(model)
    ts.adapt(model, ts.SSF(init="normal"))
    scale = torch.cat([p for path, p in ts.trainable(model).items() if path.endswith("scale")])
    assert abs(scale.mean() - 1) < 0.005 and 0.015 < scale.std() < 0.025 and not torch.equal(model(**BATCH).logits, before)


def test_ssf_knows_which_dimension_channels_are():
    """As many rows of pixels as channels, in every layout."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(2, 4, 4, 4)
    ts.adapt(model, "ssf", targets=["0", "1", "2"])
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(torch.randn_like(p))
    expected = x
    for layer, shape in ((model[0], (4, 1, 1)), (model[1], (4, 1, 1)), (model[2], (4,))):
        own = layer.tunesmith.adapters["default"]
        with ts.disabled(model):
            expected = layer(expected)
        expected = expected * own.scale.view(shape) + own.shift.view(shape)
    torch.testing.assert_close(model[:3](x), expected, atol=1e-5, rtol=1e-5)


def test_fact_fits_layers_of_any_width():
    """Keys narrower than the stream take the first rows, of each rank's own factors."""
    model = tiny.tiny_llama()
    ts.adapt(model, "fact-tt", targets={"k_proj": {"rank": 2}, "(?:.*)(q_proj|down_proj)": {"rank": 3}})
    layers = adapters(model, "default")
    key, query, down = (layers[f"model.layers.0.{name}"] for name in ("self_attn.k_proj", "self_attn.q_proj", "mlp.down_proj"))
    assert key.shared is not query.shared and query.shared is down.shared and down.sigma.shape == (3, 6)
    nn.init.normal_(key.shared.V)
    A, B = key.factors()
    torch.testing.assert_close(B @ A, (key.shared.V @ key.sigma @ key.shared.U)[:16])
    assert ts.summary(model).trainable == sum(p.numel() for p in ts.trainable(model).values())
    ts.detach(model)
    ts.adapt(model, "lora", targets={"q_proj": {"method": "fact-tk"}, "up_proj": {}})
    assert adapters(model, "default")["model.layers.1.self_attn.q_proj"].shared.P.shape == (32, 2)


def test_fact_of_some_layers_has_their_slices_alone():
    model = ts.adapt(tiny.tiny_vit(layers=3), {"method": "fact-tk", "rank": 4, "layers": [1]})
    factors = {id(layer.shared): layer.shared for layer in adapters(model, "default").values()}
    assert [f.P.shape for f in factors.values()] == [(4, 4 + 2 + 2)]  # feed-forward blocks are twice as wide here


def test_repadapter_is_shared_by_what_reads_one_input():
    model = ts.adapt(tiny.tiny_vit(), "repadapter")
    inner = {path.split("vit.layers.")[1]: layer.inner for path, layer in adapters(model, "default").items()}
    assert set(inner) == {f"{i}.{name}" for i in range(2) for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1")}
    assert inner["0.attention.q_proj"] is inner["0.attention.v_proj"] is not inner["1.attention.q_proj"] and len(set(inner.values())) == 4


def test_repadapter_of_one_group_is_dense_and_groups_must_divide():
    model = ts.adapt(nn.Sequential(nn.Linear(6, 4)), ts.RepAdapter(bottleneck=2, groups=1), targets=["0"])
    inner = model[0].tunesmith.adapters["default"].inner
    assert inner.dense().shape == inner.B.shape == (6, 2)
    with pytest.raises(ts.TunesmithError, match="groups=4 must divide"):
        ts.adapt(nn.Sequential(nn.Linear(6, 4)), ts.RepAdapter(groups=4), targets=["0"])


def test_backbones_without_a_head():
    model = ViTModel(
        ViTConfig(image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4), add_pooling_layer=False
    ).eval()
    for method in ("vpt", "convpass"):
        assert ts.adapt(model, method, name=method)(**BATCH).last_hidden_state.shape == (3, 5, 32)


def test_ssf_scales_what_a_norm_multiplies_by():
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    norm = GemmaForCausalLM(config).eval().model.layers[0].input_layernorm
    x, model = torch.randn(2, 3, 32), torch.nn.Sequential(norm)
    before = model(x)
    ts.adapt(model, "ssf", targets="0")
    with torch.no_grad():
        next(iter(ts.trainable(model).values())).fill_(3)
    torch.testing.assert_close(model(x), 3 * before)
    torch.testing.assert_close(ts.merge(model)(x), 3 * before)
