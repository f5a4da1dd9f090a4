"""VeRA, FourierFT and LoRA's starts against the installed peft, as in test_peft_live."""

import warnings

import pytest
import torch
from peft import FourierFTConfig, PeftModel, VeraConfig
from safetensors.torch import load_file

import tunesmith as ts
from tunesmith.engine.model import adapters

from .test_peft_live import BUILDERS, COPIES, by_peft, close, logits, lora, stir

pytestmark = pytest.mark.filterwarnings("ignore")

PEFT = {
    "vera": ("llama", lambda: VeraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=6, projection_prng_key=9, d_initial=0.3)),
    "vera gpt2": ("gpt2", lambda: VeraConfig(target_modules=["c_attn", "mlp.c_proj"], r=5)),
    "vera bert": ("bert", lambda: VeraConfig(target_modules=["query", "dense"], r=3, task_type="SEQ_CLS", layers_to_transform=[1])),
    "fourierft": ("llama", lambda: FourierFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=30, scaling=20.0, random_loc_seed=4)),
    "fourierft gpt2": ("gpt2", lambda: FourierFTConfig(target_modules=["c_attn", "c_fc"], n_frequency=30, scaling=20.0, init_weights=True)),
    "fourierft pattern": ("llama", lambda: FourierFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=30, scaling=20.0, n_frequency_pattern={"1.self_attn.q_proj": 7})),
    "fourierft bert": ("bert", lambda: FourierFTConfig(target_modules=["query"], n_frequency=30, scaling=20.0, task_type="SEQ_CLS")),
    "olora": ("llama", lambda: lora("q_proj", "v_proj", "down_proj", init_lora_weights="olora")),
    "olora rslora": ("bert", lambda: lora("query", init_lora_weights="olora", use_rslora=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT)
def test_reads_what_peft_wrote_and_writes_it_back(case, tmp_path):
    kind, config = PEFT[case]
    torch.manual_seed(0)
    expected = by_peft(kind, config(), tmp_path / "theirs")
    model = ts.load(BUILDERS[kind](), tmp_path / "theirs")
    close(logits(model, kind), expected)
    if case.startswith("vera"):
        assert not any(a.projections.state_dict() for path, a in adapters(model, "default").items() if hasattr(a, "projections"))  # drawn again to the bit
    ts.save(model, tmp_path / "ours", format="peft")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    before = {key: t for key, t in before.items() if not any(copy in key for copy in COPIES)}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    close(logits(PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours"), kind), expected)


OWN = {
    "vera": ("llama", {"method": "vera", "projection_prng_key": 3}),
    "vera gpt2": ("gpt2", {"method": "vera", "rank": 4}),
    "vera bert": ("bert", {"method": "vera", "rank": 4, "modules_to_save": ["classifier"]}),
    "vera one of two ends": ("ends", {"method": "vera", "rank": 4, "targets": ["^q", "^b.q"]}),
    "fourierft": ("llama", {"method": "fourierft", "modules_to_save": ["lm_head"]}),  # another α in every shape
    "fourierft t5": ("t5", {"method": "fourierft", "n_frequency": 600, "init": "zeros"}),
    "fourierft ends": ("ends", {"method": "fourierft", "scaling": 9, "targets": {"^q": {"n_frequency": 7}, "^a.q": {"n_frequency": 9}, "^b.q": {"n_frequency": 12}}}),
    "gradient": ("llama", {"method": "lora", "init": "gradient", "targets": {"q_proj": {"rank": 2}, "down_proj": {"rank": 5, "alpha": 4}, "up_proj": {}}}),
    "gradient rslora": ("gpt2", {"method": "rslora", "init": "gradient", "bias": "all"}),
    "gradient dora": ("llama", {"method": "dora", "init": "gradient", "rank": 2}),
    "olora": ("llama", {"method": "lora", "init": "olora", "rank": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_peft_reads_what_tunesmith_wrote(case, tmp_path):
    kind, method = OWN[case]
    torch.manual_seed(0)
    model = BUILDERS[kind]()
    ids = torch.arange(5, 25).view(2, 10)
    ts.adapt(model, method, calibrate=lambda model: model(input_ids=ids, labels=ids).loss.backward())
    stir(ts.trainable(model).values())
    ts.save(model, tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours")
    close(logits(theirs, kind), logits(model, kind))
    close(logits(ts.load(BUILDERS[kind](), tmp_path / "ours"), kind), logits(model, kind))
