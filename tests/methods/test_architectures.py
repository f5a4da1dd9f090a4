"""Where adapters sit in the architectures of transformers, what they start from there, and which of them they refuse."""

import inspect
import re

import pytest
import torch
import transformers
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs
from tunesmith.engine.sites import head_paths

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2}
DEBERTA = TEXT | {"relative_attention": True, "pos_att_type": ["c2p"]}
LFM = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
MODELS = {
    "Swin": ("SwinForImageClassification", "SwinConfig", STAGES),
    "Swinv2": ("Swinv2ForImageClassification", "Swinv2Config", STAGES),
    "ConvNext": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "CLIP": ("CLIPModel", "CLIPConfig", {"vision_config": IMAGE, "text_config": WORDS, "projection_dim": 16}),
    "CLIP classifier": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": IMAGE, "text_config": WORDS}),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "Phi3 of coinciding sizes": ("Phi3ForCausalLM", "Phi3Config", LLAMA | {"intermediate_size": 64}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 2}),
    "DeepseekV3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LLAMA | MLA | {"num_key_value_heads": 4}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 8}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "LFM2": ("Lfm2ForCausalLM", "Lfm2Config", LLAMA | LFM),
    "Deberta": ("DebertaModel", "DebertaConfig", DEBERTA),
    "DebertaV2": ("DebertaV2Model", "DebertaV2Config", DEBERTA),
    "Longformer": ("LongformerModel", "LongformerConfig", TEXT | {"attention_window": 4}),
    "ModernBert": ("ModernBertModel", "ModernBertConfig", TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "MPT": ("MptForCausalLM", "MptConfig", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "XLNet": ("XLNetModel", "XLNetConfig", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
}


def make(name):
    model, config, fields = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()


def stirred(model, method, size=0.3, **options):
    ts.adapt(model, method, **options)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn_like(p))
    return model


HOUSLBY = {"method": "series-adapter", "placement": "houlsby"}
PLACES = [
    ("Swin", "series-adapter", ["blocks.#.mlp.fc2"]),
    ("Swin", "parallel-adapter", ["blocks.#.layernorm_after", "blocks.#.mlp.fc2"]),
    ("Swinv2", "series-adapter", ["blocks.#.output.dense"]),
    ("Swinv2", "parallel-adapter", ["blocks.#.intermediate.dense", "blocks.#.output.dense"]),
    ("ConvNext", "series-adapter", ["layers.#.pwconv2"]),
    ("CLIP", "series-adapter", ["layers.#.mlp.fc2"]),
    ("Phi3", "parallel-adapter", ["layers.#.post_attention_layernorm", "layers.#.mlp.down_proj"]),
    ("Phi3 of coinciding sizes", "parallel-adapter", ["layers.#.post_attention_layernorm", "layers.#.mlp.down_proj"]),
    ("ModernBert", "parallel-adapter", ["layers.#.mlp_norm", "layers.#.mlp.Wo"]),
    ("MPT", "parallel-adapter", ["blocks.#.norm_2", "blocks.#.ffn.down_proj"]),
    ("XLNet", "parallel-adapter", ["layer.#.ff.layer_1", "layer.#.ff.layer_2"]),
    ("Deberta", HOUSLBY, ["layer.#.attention.output.dense", "layer.#.output.dense"]),
    ("DebertaV2", HOUSLBY, ["layer.#.attention.output.dense", "layer.#.output.dense"]),
    ("Longformer", HOUSLBY, ["layer.#.attention.output.dense", "layer.#.output.dense"]),
]


@pytest.mark.parametrize("name,method,expected", PLACES, ids=str)
def test_one_adapter_for_each_block(name, method, expected):
    model = make(name)
    found = [re.sub(r"\.\d+\.", ".#.", path) for path in hubs(ts.adapt(model, method))]
    assert all(any(path.endswith(end) for end in expected) for path in found)
    assert len(found) == len(expected) * (3 if name == "CLIP" else 2)  # blocks
    size = 32 if name in ("Swin", "Swinv2", "ConvNext") else 16
    inputs = {"pixel_values": torch.randn(2, 3, size, size), "input_ids": torch.randint(3, 99, (2, 8))}
    inputs = {key: value for key, value in inputs.items() if key in inspect.signature(model.forward).parameters}
    with torch.no_grad():
        before = model(**inputs)[0]
        stirred(model, method, name="other")
        ts.activate(model, "other")
        assert not torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("name,method,message", [
    ("Mixtral", "series-adapter", "no feed-forward block of linear layers"), ("Mixtral", "parallel-adapter", "no feed-forward block of linear layers"),
    ("XLNet", HOUSLBY, "no attention's output projection"), ("ConvNext", HOUSLBY, "no attention's output projection"),
    ("Mamba", "prefix-tuning", "attention in every layer"), ("LFM2", "prefix-tuning", "attention in every layer"), ("CLIP", "prefix-tuning", "attention in every layer"),
    ("DeepseekV3", "prefix-tuning", "keys and values of one width"), ("Mistral", {"method": "prefix-tuning", "layers": [1]}, "does not work with sliding windows"),
    ("Phi3", {"method": "parallel-adapter", "input": "model.layers.0.mlp.down_proj"}, "leave input out"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_one_sentence(name, method, message):
    model = make(name)
    with pytest.raises(ts.TunesmithError, match=message) as error:
        ts.adapt(model, method)
    assert "\n" not in str(error.value) and not hubs(model)


def test_the_classifier_of_a_model_without_a_backbone_is_its_head():
    assert head_paths(make("CLIP classifier")) == ["classifier"] and head_paths(make("CLIP")) == []
    assert "classifier" not in hubs(ts.adapt(make("CLIP classifier"), "ssf"))


@pytest.mark.parametrize("name", ["Mamba", "LFM2"])
@pytest.mark.parametrize("method", ["ssf", "lora"])
def test_weights_that_are_read_past_their_layer_are_left_alone(name, method):
    """Nothing runs in such a layer, so that nothing would train there and merging would change the output."""
    model, ids = stirred(make(name), method), torch.randint(3, 99, (2, 9))
    out = model(ids).logits
    out.square().mean().backward()
    assert all(p.grad is not None for p in ts.trainable(model).values())
    torch.testing.assert_close(ts.merge(model)(ids).logits, out, atol=1e-4, rtol=1e-4)


def test_layers_with_the_batch_second_take_no_rows():
    model = ts.adapt(make("XLNet"), "series-adapter")
    with pytest.raises(ts.TunesmithError, match="batch second"), ts.mixed(model, ["default", None, None]):
        pass


def test_a_norms_offset_is_known_before_its_weights_are():
    config = transformers.GemmaConfig(**LLAMA, head_dim=8)
    with torch.device("meta"):
        model = transformers.GemmaForCausalLM(config)
    assert adapters(ts.adapt(model, "ssf"), "default")["model.norm"].offset == 1


def test_a_scale_near_one_counts_in_half_precision():
    """In bfloat16 γ = 1.003 is 1; the product is rounded once."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).bfloat16()
    ts.adapt(layer, "ssf", targets=["0"])
    x = torch.randn(512, 64).bfloat16()
    with torch.no_grad():
        layer[0].tunesmith.adapters["default"].scale.fill_(1.003)
        expected = F.linear(x, layer[0].weight).float() * 1.003
        assert torch.equal(layer(x), expected.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind,method,message", [
    ("bert", {"method": "p-tuning", "after": 0}, "adapt with modules_to_save"),
    ("bert", {"method": "prefix-tuning", "modules_to_save": ["classifier"]}, "no prefix in an encoder"),
    ("backbone", "prompt-tuning", "without the head of a task"),
], ids=str)  # fmt: skip
def test_virtual_tokens_that_peft_would_leave_out_are_not_written(kind, method, message, tmp_path):
    model = tiny.tiny_bert() if kind == "bert" else tiny.tiny_llama().model
    with pytest.raises(ts.TunesmithError, match=message):
        ts.save(ts.adapt(model, method), tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "dept"])
def test_virtual_tokens_attend_within_longformers_window(method):
    """Its heads attend from the first token to all, the prompt's behind it too."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**TEXT, attention_window=4)
    model, ids = transformers.LongformerForSequenceClassification(config).eval(), torch.randint(3, 99, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        assert not torch.allclose(stirred(model, method, 1.0)(ids).logits, before)
        with ts.disabled(model):
            assert torch.equal(model(ids).logits, before)
