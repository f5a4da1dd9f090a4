"""MiSS between tunesmith and the installed peft, and files of peft's older name for it."""

import json

import pytest
import torch
from peft import MissConfig, PeftModel
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tunesmith.methods import registry

from .test_peft_live import BUILDERS, by_peft, close, logits, stir

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["q_proj", "v_proj", "down_proj"]

# name: (model, what peft is told)
PEFT = {
    "plain": ("llama", dict(r=8, target_modules=LINEAR)),
    "padded": ("llama", dict(r=7, target_modules=LINEAR)),
    "bat": ("llama", dict(r=8, target_modules=LINEAR, init_weights="bat")),
    "bat with a dropout that does nothing": ("llama", dict(r=8, target_modules=LINEAR, init_weights="bat", miss_dropout=0.1)),
    "mini": ("llama", dict(r=7, target_modules=LINEAR, init_weights="mini", mini_r=4)),
    "mini at its default": ("llama", dict(r=8, target_modules=LINEAR, init_weights="mini")),
    "dropout": ("llama", dict(r=8, target_modules=["q_proj"], miss_dropout=0.3)),
    "regex": ("llama", dict(r=8, target_modules=r".*layers\.1.*(q|up)_proj")),
    "modules_to_save": ("bert", dict(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "random start": ("llama", dict(r=8, target_modules=LINEAR, init_weights=False)),
}  # fmt: skip
OWN = {
    "miss": ("llama", {"method": "miss", "rank": 8, "dropout": 0.2}),
    "bone": ("llama", {"method": "bone", "rank": 7}),
    "bat": ("llama", {"method": "bat", "rank": 16}),
    "mini": ("llama", {"method": "miss", "rank": 8, "init_weights": "mini", "mini_r": 16}),
    "bone where every layer has 32 inputs": ("llama", {"method": "bone", "targets": ["q_proj", "up_proj"]}),
    "with a head": ("bert", {"method": "miss", "rank": 8, "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", PEFT)
def test_reads_what_peft_wrote_and_writes_it_back(case, tmp_path):
    kind, config = PEFT[case]
    torch.manual_seed(0)
    expected = by_peft(kind, MissConfig(**config), tmp_path / "theirs")
    model = BUILDERS[kind]()
    base = logits(model, kind)
    ts.load(model, tmp_path / "theirs")
    close(logits(model, kind), expected)
    assert not torch.equal(logits(model, kind), base)

    ts.save(model, tmp_path / "ours", format="peft")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    close(logits(PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours"), kind), expected)
    assert torch.equal(logits(ts.load(BUILDERS[kind](), tmp_path / "ours"), kind), logits(model, kind))


@pytest.mark.parametrize("case", OWN)
def test_peft_reads_what_tunesmith_wrote(case, tmp_path):
    kind, method = OWN[case]
    model = ts.adapt(BUILDERS[kind](), method)
    stir(ts.trainable(model).values())
    ts.save(model, tmp_path / "ours", format="peft")
    theirs = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours")
    close(logits(theirs, kind), logits(model, kind))
    theirs.save_pretrained(tmp_path / "theirs")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(ts.load(BUILDERS[kind](), tmp_path / "ours"), kind), logits(model, kind))


@pytest.mark.parametrize("case", ["padded", "bat"])
def test_reads_files_of_the_time_when_peft_called_it_bone(case, tmp_path):
    kind, config = PEFT[case]
    expected = by_peft(kind, MissConfig(**config), tmp_path)
    weights, card = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({key.replace("miss_block", "bone_block"): t for key, t in load_file(weights).items()}, weights)
    fields = {k: v for k, v in json.loads(card.read_text()).items() if k not in ("mini_r", "miss_dropout")}
    card.write_text(json.dumps(fields | {"peft_type": "BONE"}))
    close(logits(ts.load(BUILDERS[kind](), tmp_path), kind), expected)


@pytest.mark.parametrize("fields", [{"peft_type": "MISS", "init_weights": mode} for mode in (True, False, "mini", "bat")] + [{"peft_type": "BONE"}])
def test_one_method_reads_each_file(fields):
    assert [name for name, cls in registry.items() if cls.reads_peft(fields)] == ["miss"]


@pytest.mark.parametrize(
    "kind,method,message",
    [
        ("llama", "bone", "one init_weights, r and mini_r"),  # 32 and 64 inputs
        ("llama", {"method": "miss", "rank": 8, "targets": {"q_proj": {}, "v_proj": {"init_weights": "bat"}}}, "one init_weights, r and mini_r"),
        ("llama", {"method": "bat", "axis": "in"}, "no word for bat with axis='in'"),
        ("gpt2", {"method": "bone", "rank": 8}, "nn.Linear alone, not on 'transformer.h.0.attn.c_attn'"),
        ("convnet", {"method": "bone", "rank": 8, "targets": ["3"]}, "nn.Linear alone, not on '3'"),
    ],
)
def test_refuses_to_write_what_peft_cannot_hold(kind, method, message, tmp_path):
    with pytest.raises(ts.TunesmithError, match=message):
        ts.save(ts.adapt(BUILDERS[kind](), method), tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())
