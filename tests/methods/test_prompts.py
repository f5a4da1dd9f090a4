"""Prompts and prefixes: starts, encoders that drop out, offsets by position, caches, padding, two rates."""

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    Gemma2Config,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.engine.model import adapters, virtual_tokens
from tunesmith.engine.store import checksum
from tunesmith.models import generate
from tunesmith.train import recipe as recipes
from tunesmith.train.folder import open_run
from tunesmith.train.loop import run

DEPT = {"method": "dept", "tokens": 3, "rank": 4, "max_length": 20}
PROJECTED = {"method": "prefix-tuning", "tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
LSTM = {"method": "p-tuning", "tokens": 3, "encoder": "lstm", "encoder_hidden_size": 6}
DEEP = LSTM | {"encoder_num_layers": 3}
ENCODED = {"mlp": {"method": "p-tuning", "tokens": 3}, "lstm": LSTM, "prefix": PROJECTED}
UPPER = {"method": "prefix-tuning", "tokens": 3, "layers": [1]}
ALL = {"prompt": {"method": "prompt-tuning", "tokens": 3}, "dept": DEPT, "upper prefix": UPPER, **ENCODED}
each = pytest.mark.parametrize("method", ALL.values(), ids=ALL)


SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 64}


def stirred(model, method, seed=0):
    torch.manual_seed(seed)
    ts.adapt(model, method)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def layer(model):
    return next(iter(adapters(model, "default").values()))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


# Counts


COUNTS = [  # of T5-base's width, by the shipped configurations
    ({"tokens": 80, "rank": 15}, 76_800), ({"tokens": 60, "rank": 30}, 76_800), ({"tokens": 40, "rank": 45}, 76_800), ({"tokens": 20, "rank": 60}, 76_800),
    ({"tokens": 60, "rank": 24, "max_length": 512}, 76_800), ({"tokens": 60, "rank": 30, "max_length": 348}, 79_560), ({}, 76_800),
]  # fmt: skip


@pytest.mark.parametrize("fields,trained", COUNTS, ids=str)
def test_counts_of_dept(fields, trained):
    model = BertModel(BertConfig(hidden_size=768, num_hidden_layers=1, vocab_size=50, intermediate_size=8))
    assert ts.summary(ts.adapt(model, ts.DePT(**fields))).trainable == trained


def test_counts_of_p_tuning():
    model = BertModel(BertConfig(hidden_size=768, num_hidden_layers=1, vocab_size=50, intermediate_size=8))
    assert ts.summary(ts.adapt(model, ts.PTuning(tokens=20))).trainable == 1_787_136
    assert ts.summary(ts.drop_encoder(model)).trainable == 15_360


@pytest.mark.parametrize("method", [*ALL.values(), DEEP], ids=[*ALL, "deep"])
def test_counts_in_closed_form(method):
    model = ts.adapt(tiny.tiny_llama(), method)
    record = model._tunesmith.records["default"]
    assert sum(config.count(model.get_submodule(path).tunesmith.site) for path, config in record.sites.items()) == ts.summary(model).trainable


# Starts


def test_starts_of_a_prompt(tmp_path):
    words = tiny.tiny_llama().get_input_embeddings().weight
    vocabulary = layer(ts.adapt(tiny.tiny_llama(), ts.PromptTuning(tokens=5))).prompt
    assert all((row == words).all(1).any() for row in vocabulary)
    torch.manual_seed(0)
    random = layer(ts.adapt(tiny.tiny_llama(), ts.PromptTuning(tokens=50, init="random"))).prompt
    assert abs(random.mean()) < 0.1 and abs(random.std() - 1) < 0.1
    for method in (ts.PromptTuning, ts.DePT):
        text = layer(ts.adapt(tiny.tiny_llama(), method(tokens=5, init="text", init_text=[9, 7]))).prompt
        assert torch.equal(text, words[[9, 7, 9, 7, 9]])
    assert torch.equal(layer(ts.adapt(tiny.tiny_llama(), ts.PromptTuning(tokens=1, init="text", init_text=[9, 7]))).prompt, words[[9]])


def test_a_text_is_read_by_the_models_tokenizer(tmp_path):
    folder = tiny.save_tiny(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ts.adapt(model, {"method": "prompt-tuning", "tokens": 40, "init": "text", "init_text": "my card"})
    ids = tiny.tiny_tokenizer().encode("my card", add_special_tokens=False)
    assert torch.equal(layer(model).prompt[: len(ids)], model.get_input_embeddings().weight[ids])
    ts.save(model, tmp_path / "a")
    loaded = ts.load(tiny.tiny_llama(), tmp_path / "a")  # where there is no tokenizer
    assert torch.equal(layer(loaded).prompt, layer(model).prompt)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"init": "text"}, "init_text go together"),
        ({"init_text": "good"}, "init_text go together"),
        ({"init": "text", "init_text": []}, "init_text go together"),
        ({"init": "text", "init_text": "good"}, "no tokenizer.*list of token ids"),
        ({"init": "text", "init_text": [3, 320]}, "token id 320.*0 to 319"),
        ({"init": "normal"}, "init='normal'"),
    ],
)
@pytest.mark.parametrize("method", ["prompt-tuning", "dept"])
def test_starts_that_are_refused(method, fields, message):
    model = tiny.tiny_llama()
    with pytest.raises(ts.TunesmithError, match=message):
        ts.adapt(model, {"method": method, **fields})
    assert not hasattr(model, "_tunesmith")


# DePT


def test_starts_of_the_pair():
    pair = layer(ts.adapt(tiny.tiny_llama(), ts.DePT(rank=16)))
    assert pair.A.shape == (256, 16) and pair.A.abs().max() <= 0.25 and pair.A.std() > 0.1
    assert pair.B.shape == (16, 32) and not pair.B.any()
    assert pair.scale == 2 and layer(ts.adapt(tiny.tiny_llama(), ts.DePT(alpha=None))).scale == 1


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_without_the_pair_it_is_prompt_tuning(kind):
    dept, prompt = ts.adapt(tiny.BUILDERS[kind](), DEPT), ts.adapt(tiny.BUILDERS[kind](), {"method": "prompt-tuning", "tokens": 3})
    with torch.no_grad():
        layer(dept).prompt.copy_(layer(prompt).prompt)
    assert torch.equal(logits(dept, **tiny.batch(kind)), logits(prompt, **tiny.batch(kind)))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_it_adds_the_offsets_of_the_positions(kind):
    """As the same prompt before embeddings that have the offsets already."""
    model, batch = stirred(tiny.BUILDERS[kind](), DEPT), tiny.batch(kind)
    dept, T = layer(model), batch["input_ids"].shape[1]
    expected = logits(model, **batch)
    moved = model.get_input_embeddings()(batch["input_ids"]) + 8 / 4**0.5 * (dept.A @ dept.B)[:T]
    with torch.no_grad():
        dept.B.zero_()
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    torch.testing.assert_close(logits(model, inputs_embeds=moved, **rest), expected, atol=1e-5, rtol=1e-5)


def test_at_the_start_a_step_moves_the_prompt_and_b_alone():
    model = ts.adapt(tiny.tiny_llama(), DEPT)
    logits_of = model(**tiny.batch("llama")).logits
    logits_of.square().sum().backward()
    assert layer(model).prompt.grad.any() and layer(model).B.grad.any() and not layer(model).A.grad.any()


def test_two_rates():
    model = ts.adapt(tiny.tiny_llama(), DEPT | {"lr_ratio": 0.1})
    groups = optim.build(model, lr=0.3).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [rates[id(p)] for p in (layer(model).prompt, layer(model).A, layer(model).B)] == pytest.approx([0.3, 0.03, 0.03])


def test_texts_that_are_too_long():
    model = ts.adapt(tiny.tiny_llama(), DEPT | {"max_length": 8})
    with pytest.raises(ts.TunesmithError, match="max_length=8 tokens, and this one has 10"):
        model(**tiny.batch("llama", length=10))
    ids, mask = torch.full((2, 10), 5), torch.tensor([[1] * 7 + [0] * 3, [1] * 8 + [0] * 2])
    assert torch.isfinite(logits(model, input_ids=ids, attention_mask=mask)).all()
    ids = torch.full((1, 6), 5)
    assert model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 12)  # what it writes may go on


# All of them


@each
def test_a_cache_changes_nothing(method):
    model = stirred(tiny.tiny_llama(), method)
    ids = tiny.batch("llama")["input_ids"][1:]
    whole = logits(model, input_ids=ids)
    cache = None
    for start, end in ((0, 6), (6, 7), (7, 10)):
        with torch.no_grad():
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits, whole[:, start:end], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, **options)
    assert torch.equal(written, model.generate(ids, use_cache=False, **options))
    assert torch.equal(model.generate(ids, num_beams=2, **options), model.generate(ids, num_beams=2, use_cache=False, **options))


@pytest.mark.parametrize("method", [ALL[name] for name in ("prompt", "dept", "mlp")], ids=["prompt", "dept", "mlp"])
def test_an_encoder_decoder_writes(method):
    model = stirred(tiny.tiny_t5(), method)
    inputs = {k: v for k, v in tiny.batch("t5").items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(**inputs, **options)
    assert torch.equal(written, model.generate(**inputs, use_cache=False, **options))
    best = logits(model, **inputs, decoder_input_ids=written).argmax(-1)
    assert torch.equal(best[:, :-1], written[:, 1:])


@each
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing_written(method, kind):
    model = stirred(tiny.BUILDERS[kind](), method)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15]]
    tokenizer = tiny.tiny_tokenizer()
    together = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]


@each
def test_padding_on_the_right_has_no_influence(method):
    model, batch = stirred(tiny.tiny_llama(), method), tiny.batch("llama")
    before = logits(model, **batch)[0, :8]
    batch["input_ids"][0, -2:] = 99
    assert torch.equal(logits(model, **batch)[0, :8], before)
    torch.testing.assert_close(logits(model, input_ids=batch["input_ids"][:1, :8])[0], before, atol=1e-5, rtol=1e-5)


def tiny_mistral():
    return AutoModelForCausalLM.from_config(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)).eval()


@pytest.mark.parametrize("method", [ALL[name] for name in ("prompt", "dept")] + [{"method": "prefix-tuning", "tokens": 3}], ids=["prompt", "dept", "prefix"])
def test_padding_does_not_push_virtual_tokens_out_of_a_window(method):
    model, prompts = stirred(tiny_mistral(), method), [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]
    together = generate(model, tiny.tiny_tokenizer(), prompts, max_new_tokens=6, virtual=3)
    assert together == [generate(model, tiny.tiny_tokenizer(), [p], max_new_tokens=6, virtual=3)[0] for p in prompts]


@pytest.mark.parametrize("method", [ALL["prompt"], {"method": "prefix-tuning", "tokens": 3}], ids=["prompt", "prefix"])
def test_a_table_of_positions_holds_virtual_tokens_too(method):
    model = stirred(tiny.tiny_gpt2(n_positions=16), method)
    assert virtual_tokens(model) == 3
    texts = generate(model, tiny.tiny_tokenizer(), [list(range(5, 17)), [5]], max_new_tokens=6, virtual=virtual_tokens(model))
    assert texts[0] == generate(model, tiny.tiny_tokenizer(), [list(range(10, 17))], max_new_tokens=6, virtual=3)[0]  # its end
    with ts.disabled(model):
        assert virtual_tokens(model) == 0


@each
def test_opt_whose_heads_call_the_decoder_inside_its_backbone(method):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=0)).eval()
    ids = tiny.batch("llama")["input_ids"][1:]
    before = logits(base, input_ids=ids)
    model = stirred(base, method)
    assert not torch.equal(logits(model, input_ids=ids), before)
    ts.causal_lm_loss(model, ids, ids).backward()
    assert all(p.grad is not None and p.grad.any() for p in ts.trainable(model).values())
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_offsets_of_left_padded_texts_where_a_model_takes_no_positions():
    torch.manual_seed(0)
    model = stirred(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)).eval(), DEPT)
    ids, pads = torch.tensor([[5, 6, 7, 8]]), torch.zeros(1, 3, dtype=torch.long)
    padded = logits(model, input_ids=torch.cat([pads, ids], 1), attention_mask=torch.cat([pads, torch.ones_like(ids)], 1))
    torch.testing.assert_close(padded[:, -1], logits(model, input_ids=ids)[:, -1], atol=1e-5, rtol=1e-5)


def test_a_prompt_starts_as_scaled_embeddings_where_a_model_scales_them():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    ids, embeddings = [5, 9, 7], model.get_input_embeddings()
    ts.adapt(model, {"method": "prompt-tuning", "tokens": 3, "init": "text", "init_text": ids})
    assert torch.equal(layer(model).prompt, embeddings(torch.tensor(ids))) and not torch.equal(layer(model).prompt, embeddings.weight[ids])


@pytest.mark.parametrize("after", [0, 1, None])
@pytest.mark.parametrize("method", [ALL["prompt"], ALL["mlp"]], ids=["prompt", "mlp"])
def test_where_a_prompt_stands_in_an_encoder(method, after):
    model, base, batch = stirred(tiny.tiny_bert(), method | {"after": after}), tiny.tiny_bert(), tiny.batch("llama")
    types, places = (batch["input_ids"] > 100).long(), torch.arange(10).expand(3, -1)
    found = logits(model, **batch, token_type_ids=types)
    assert torch.equal(found, logits(model, **batch, token_type_ids=types, position_ids=places))
    k = 0 if after == 0 else 1
    virtual = layer(model).vectors().detach().expand(3, -1, -1)

    def whole(text, fill):
        return torch.cat([text[:, :k], fill, text[:, k:]], 1)

    inputs = {
        "inputs_embeds": whole(base.get_input_embeddings()(batch["input_ids"]).detach(), virtual),
        "attention_mask": whole(batch["attention_mask"], torch.ones(3, 3)), "token_type_ids": whole(types, torch.zeros(3, 3).long()),
    }  # fmt: skip
    assert torch.equal(found, logits(base, **inputs))
    if k:
        states = model.bert(**batch, token_type_ids=types, output_hidden_states=True)
        assert torch.equal(states.pooler_output, model.bert.pooler(states.last_hidden_state))
        assert {h.shape[1] for h in states.hidden_states} == {10}


def test_positions_of_a_prompt_go_on_where_the_first_token_is():
    """RoBERTa counts from 2."""
    ids = torch.tensor([[0, 7, 8, 2]])
    model = stirred(RobertaModel(RobertaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)).eval(), ALL["prompt"])
    assert torch.equal(model(input_ids=ids)[0], model(input_ids=ids, position_ids=torch.tensor([[2, 3, 4, 5]]))[0])


@pytest.mark.parametrize("method", [UPPER, *ENCODED.values()], ids=["upper prefix", *ENCODED])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_an_encoders_gradients(method, reentrant):
    def gradients(checkpointing):
        model = stirred(tiny.tiny_llama().train(), method)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**tiny.batch("llama")).logits.square().mean().backward()
        return {path: p.grad for path, p in ts.trainable(model).items()}

    plain, saved = gradients(False), gradients(True)
    assert all(grad.any() for grad in plain.values())
    for path, grad in plain.items():
        torch.testing.assert_close(saved[path], grad, atol=1e-6, rtol=1e-4)


# Encoders


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_makes_the_prompt(encoder):
    model = stirred(tiny.tiny_llama(), {"method": "p-tuning", "tokens": 3, "encoder": encoder})
    prompt = layer(model)
    if encoder == "mlp":
        first, _, second, _, third = prompt.encoder
        expected = third(torch.relu(second(torch.relu(first(prompt.prompt)))))
    else:
        expected = prompt.encoder.head(prompt.encoder.lstm(prompt.prompt[None])[0])[0]
    torch.testing.assert_close(prompt.vectors(), expected)


def test_the_projection_makes_the_prefix():
    prefix = adapters(stirred(tiny.tiny_llama(), PROJECTED), "default")["model"]
    first, _, second = prefix.encoder
    expected = nn.functional.linear(torch.tanh(nn.functional.linear(prefix.prefix, first.weight, first.bias)), second.weight, second.bias)
    torch.testing.assert_close(prefix.table(), expected)
    assert prefix.table().shape == (3, 2 * 2 * 16)  # keys and values of two layers with two heads of eight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("training", [False, True])
def test_a_prefix_in_some_layers(kind, training):
    batch, first = tiny.batch(kind), {"llama": "model.layers.0", "gpt2": "transformer.h.0", "bert": "bert.encoder.layer.0"}[kind]

    def build(**method):
        model = tiny.BUILDERS[kind](**{"attn_implementation": "eager"} if kind == "gpt2" else {})
        return ts.adapt(model, {"method": "prefix-tuning", "tokens": 3} | method) if method else model

    def prefix(model):
        return next(p for path, p in ts.trainable(model).items() if path.endswith("prefix"))

    def states(model, given=None, **more):
        """What the first layer makes, or is made to, and the logits."""
        seen = []

        def hook(module, args, out):
            seen.append(out[0] if isinstance(out, tuple) else out)
            if given is not None:
                return (given, *out[1:]) if isinstance(out, tuple) else given

        handle = model.get_submodule(first).register_forward_hook(hook)
        found = model.train(training)(**batch, **more).logits.detach()
        handle.remove()
        return seen[0].detach(), found

    shifted = {"position_ids": torch.arange(3, 13).expand(3, -1)}  # the text's positions are the same in all layers
    plain, whole, below, above = states(build(), **shifted), build(layers=[0, -1]), build(layers=[0]), build(layers=[1])
    for model, part in zip((below, above), prefix(whole).detach().chunk(2, 1), strict=True):
        prefix(model).data.copy_(part)
    found = {"plain": plain} | {name: states(model) for name, model in (("whole", whole), ("below", below), ("above", above))}
    for one, other in (("above", "plain"), ("below", "whole")):
        torch.testing.assert_close(found[one][0], found[other][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["below"][1], states(build(), found["below"][0], **shifted)[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["whole"][1], states(above, found["below"][0])[1], atol=1e-5, rtol=1e-5)
    assert all(not torch.allclose(a, b, atol=1e-4) for (_, a), (_, b) in itertools.combinations(found.values(), 2))


def test_prefixes_of_other_layers_side_by_side():
    model, batch, expected = tiny.tiny_llama(), tiny.batch("llama"), [logits(tiny.tiny_llama(), **tiny.batch("llama"))[0]]
    for row, layers in ((1, [0]), (2, [1])):
        ts.adapt(model, UPPER | {"layers": layers}, name=str(row))
        expected.append(logits(model, **batch)[row])
    with ts.mixed(model, [None, "1", "2"]):
        torch.testing.assert_close(logits(model, **batch), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_layers_of_a_prefix_that_cannot_be(tmp_path):
    for layers, match in (([2], "has 2 layers, 0 to 1, and no layer 2"), ([], "leave prefix-tuning nothing")):
        with pytest.raises(ts.TunesmithError, match=match):
            ts.adapt(tiny.tiny_llama(), UPPER | {"layers": layers})
    with pytest.raises(ts.TunesmithError, match="a prefix in every layer"):
        ts.save(ts.adapt(tiny.tiny_llama(), UPPER), tmp_path / "a", format="peft")
    ts.save(model := stirred(tiny.tiny_llama(), UPPER), tmp_path / "b")
    assert torch.equal(logits(ts.load(tiny.tiny_llama(), tmp_path / "b"), **tiny.batch("llama")), logits(model, **tiny.batch("llama")))
    slides = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, layer_types=["sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=4)
    with pytest.raises(ts.TunesmithError, match="does not work with sliding windows"):
        ts.adapt(Qwen3ForCausalLM(slides), UPPER)


@pytest.mark.parametrize("method", ENCODED.values(), ids=ENCODED)
def test_an_encoder_drops_out(method, tmp_path):
    model, batch = stirred(tiny.tiny_llama(), method), tiny.batch("llama")
    expected = logits(model, **batch)
    ts.save(model, tmp_path / "whole")
    assert torch.equal(logits(ts.load(tiny.tiny_llama(), tmp_path / "whole"), **batch), expected)
    ts.save(model, tmp_path / "peft", format="peft")
    assert ts.drop_encoder(model) is model
    assert torch.equal(logits(model, **batch), expected)
    assert len(ts.trainable(model)) == 1
    ts.save(model, tmp_path / "plain")
    for folder in ("plain", "peft"):
        again = ts.load(tiny.tiny_llama(), tmp_path / folder)
        assert torch.equal(logits(again, **batch), expected)
        assert [p.shape for p in ts.trainable(again).values()] == [p.shape for p in ts.trainable(model).values()]
    with pytest.raises(ts.TunesmithError, match="no encoder to drop"):
        ts.drop_encoder(model)


def test_saving_for_peft_draws_no_random_numbers(tmp_path):
    model = stirred(tiny.tiny_llama(), LSTM)
    before = torch.get_rng_state()
    ts.save(model, tmp_path / "a", format="peft")
    assert torch.equal(torch.get_rng_state(), before)


def test_dept_has_no_words_in_the_format_of_peft(tmp_path):
    with pytest.raises(ts.TunesmithError, match=r"cannot hold.*dept"):
        ts.save(ts.adapt(tiny.tiny_llama(), DEPT), tmp_path / "a", format="peft")


def test_a_file_without_the_pair_is_refused(tmp_path):
    ts.save(ts.adapt(tiny.tiny_llama(), DEPT), tmp_path / "a")
    card, tensors = json.loads((tmp_path / "a" / "adapter.json").read_text()), load_file(tmp_path / "a" / "adapter.safetensors")
    save_file({key: t for key, t in tensors.items() if key.endswith("prompt")}, tmp_path / "a" / "adapter.safetensors")
    card["sha256"] = hashlib.sha256((tmp_path / "a" / "adapter.safetensors").read_bytes()).hexdigest()
    card["checksum"] = checksum(card)
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(card))
    with pytest.raises(ts.TunesmithError, match=r"does not (fit|hold)"):
        ts.load(tiny.tiny_llama(), tmp_path / "a")


@pytest.mark.parametrize(
    "method", [DEPT | {"rank": 0}, DEPT | {"max_length": 0}, {"method": "p-tuning", "encoder": "gru"}, PROJECTED | {"encoder_hidden_size": 0}]
)
def test_fields_that_are_refused(method):
    with pytest.raises(ts.TunesmithError, match="is not valid"):
        ts.adapt(tiny.tiny_llama(), method)


@pytest.mark.parametrize("method", [DEPT | {"init": "text", "init_text": "what is", "max_length": 64}, *ENCODED.values()], ids=["dept", *ENCODED])
def test_a_run_and_what_it_leaves(method, here, models, data):
    recipe = {"model": models["llama"], "data": data["sums"], "method": method, "epochs": 1, "batch_size": 8, "max_new_tokens": 2, "output": "run"}
    result = run(recipes.check(recipe))
    assert result.summary["steps"] == 5 and result.metrics["loss"] < 20
    again = open_run(result.folder)
    assert type(again.model._tunesmith.records["default"].config).method == method["method"]


def test_rows_of_several_prompts():
    model, batch = tiny.tiny_llama(), tiny.batch("llama")
    expected = []
    for seed, (name, method) in enumerate({"a": DEPT, "b": DEPT | {"tokens": 5, "rank": 2}, "c": DEPT | {"tokens": 1}}.items()):
        torch.manual_seed(seed)
        ts.adapt(model, method, name=name)
        with torch.no_grad():
            for p in ts.trainable(model).values():
                p.add_(0.2 * torch.randn(p.shape))
        expected.append(logits(model, **batch)[seed])
    with ts.mixed(model, ["a", "b", "c"]):
        torch.testing.assert_close(logits(model, **batch), torch.stack(expected), atol=1e-5, rtol=1e-5)
