"""Files of peft's older name for MiSS, and what peft's files of it cannot hold."""

import json

import pytest
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tunesmith.methods import registry

from .test_peft_live import BUILDERS, PEFT, by_peft, close, logits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", ["miss padded", "miss bat"])
def test_reads_files_of_the_time_when_peft_called_it_bone(case, tmp_path):
    kind, config = PEFT[case]
    expected = by_peft(kind, config(), tmp_path)
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
