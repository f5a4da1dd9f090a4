"""Generated text does not depend on what else is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tunesmith.models import encode_prompt, evaluating, generate

torch.set_num_threads(1)
TOKENIZER = tiny.tiny_tokenizer()
MODELS = {"llama": tiny.tiny_llama(), "gpt2": tiny.tiny_gpt2()}
PROMPTS = ["how do I", "x", "my card was stolen yesterday and I want my money back, please!", "what is the rate", "", "12 + 30"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_alone_and_in_an_uneven_batch(kind, num_beams):
    model = MODELS[kind]
    alone = [generate(model, TOKENIZER, [p], 12, 1, num_beams=num_beams)[0] for p in PROMPTS]
    assert len(set(alone)) > 3
    for batch_size in (2, 6):
        assert generate(model, TOKENIZER, PROMPTS, 12, batch_size, num_beams=num_beams) == alone


@given(st.lists(st.text("abc 12", max_size=20), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_any_batch(prompts, batch_size):
    model = MODELS["llama"]
    assert generate(model, TOKENIZER, prompts, 5, batch_size) == [generate(model, TOKENIZER, [p], 5, 1)[0] for p in prompts]


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_tokens_as_a_loop_without_cache_or_padding(kind):
    model, ids = MODELS[kind], encode_prompt(TOKENIZER, PROMPTS[2])
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 12 and (ids[-1] != 2 or len(ids) == start):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert generate(model, TOKENIZER, PROMPTS, 12, 6)[2] == TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def test_stop_strings_end_a_row_and_are_left_out():
    model = MODELS["gpt2"]
    whole = generate(model, TOKENIZER, PROMPTS, 16, 3)
    stop = whole[2][4:7]
    cut = [text.split(stop)[0] for text in whole]
    assert cut != whole and generate(model, TOKENIZER, PROMPTS, 16, 3, stop=[stop, "never written"]) == cut


def test_the_end_token_ends_a_row():
    model = tiny.tiny_llama()
    ends = model.generate(torch.tensor([encode_prompt(TOKENIZER, PROMPTS[0])]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, -6:].tolist()
    model.generation_config.eos_token_id = [2, ends[3]]
    assert generate(model, TOKENIZER, PROMPTS[:1], 6, 1) == [TOKENIZER.decode(ends[: ends.index(ends[3])])]


def test_sampling_settings_of_the_model_are_ignored(caplog):
    model = tiny.tiny_llama()
    before = generate(model, TOKENIZER, PROMPTS, 8, 3)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.5, no_repeat_ngram_size=1)
    assert generate(model, TOKENIZER, PROMPTS, 8, 3) == before and not caplog.records


def test_modes_come_back_and_progress_is_told():
    model = tiny.tiny_llama().train()
    model.model.layers[0].eval()
    TOKENIZER.padding_side = "right"
    before, told = [m.training for m in model.modules()], []
    generate(model, TOKENIZER, PROMPTS, 2, 4, progress=lambda done, total: told.append((done, total)))
    assert [m.training for m in model.modules()] == before and told == [(4, 6), (6, 6)] and TOKENIZER.padding_side == "right"
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(m.training for m in model.modules()) and torch.is_inference_mode_enabled()
        raise RuntimeError
    assert [m.training for m in model.modules()] == before
    assert generate(model, TOKENIZER, [], 2, 4) == []


def test_a_prompt_longer_than_the_model_takes_keeps_its_end():
    model = tiny.tiny_gpt2(n_positions=32)
    long = [5 + i % 300 for i in range(100)]
    assert generate(model, TOKENIZER, [long], 8, 1) == generate(model, TOKENIZER, [long[-24:]], 8, 1)
    assert generate(model, TOKENIZER, [long], 80, 1) == generate(model, TOKENIZER, [long[-1:]], 31, 1)


def test_a_leading_bos_is_added_once_and_no_end_token():
    classifier = tiny.tiny_tokenizer(classifier=True)  # adds <bos> and <eos>
    ids = TOKENIZER.encode("my card")
    assert encode_prompt(TOKENIZER, "my card") == ids
    assert encode_prompt(classifier, "my card") == encode_prompt(classifier, "<bos>my card") == [1, *ids]
