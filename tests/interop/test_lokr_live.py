"""SoKA of one term against the LoKr of the installed peft: each reads what the other wrote."""

import pytest
import torch
from peft import LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

WHOLE = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 64, "alpha": 16}),
    "factor": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 64, "alpha": 16, "decompose_factor": 4}),
    "factor above the root": ("llama", {"target_modules": ["q_proj"], "r": 64, "alpha": 16, "decompose_factor": 8}),
    "alphas": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 32, "alpha": 8, "alpha_pattern": {"v_proj": 24}, "rank_pattern": {"layers.0.self_attn.q_proj": 16}}),
    "conv": ("convnet", {"target_modules": ["3", "8"], "r": 64, "alpha": 32}),
}
PRODUCTS = {
    "low rank": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 2, "alpha": 4}),
    "both low rank": ("llama", {"target_modules": ["q_proj"], "r": 1, "alpha": 4, "decompose_both": True}),
    "conv low rank": ("convnet", {"target_modules": ["3"], "r": 1, "alpha": 4}),
}


def logits(model, kind):
    model.eval()
    with torch.no_grad():
        return model(tiny.batch(kind)["pixel_values"]) if kind == "convnet" else model(**tiny.batch(kind)).logits


def stir(parameters):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


def by_peft(kind, fields, folder):
    model = get_peft_model(tiny.BUILDERS[kind](), LoKrConfig(**fields))
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return logits(model, kind)


@pytest.mark.parametrize("kind,fields", (WHOLE | PRODUCTS).values(), ids=WHOLE | PRODUCTS)
def test_reads_peft_and_writes_it_back(kind, fields, tmp_path):
    expected = by_peft(kind, fields, tmp_path / "theirs")
    model = ts.load(tiny.BUILDERS[kind](), tmp_path / "theirs")
    torch.testing.assert_close(logits(model, kind), expected, atol=2e-5, rtol=0)
    ts.save(model, tmp_path / "ours", format="peft")
    again = PeftModel.from_pretrained(tiny.BUILDERS[kind](), tmp_path / "ours")
    torch.testing.assert_close(logits(again, kind), expected, atol=2e-5, rtol=0)
    if (kind, fields) in WHOLE.values():
        before, after = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_peft_reads_an_adapter_trained_here(tmp_path):
    model = ts.adapt(tiny.tiny_llama(), ts.SoKA(rank=1, init="zero", scale=0.5))
    stir(ts.trainable(model).values())
    ts.save(model, tmp_path / "a", format="peft")
    theirs = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "a")
    torch.testing.assert_close(logits(theirs, "llama"), logits(model, "llama"), atol=2e-5, rtol=0)


@pytest.mark.parametrize("fields", [{"rank": 2, "init": "zero"}, {"rank": 1}, {"rank": 1, "init": "zero", "train_sigma": True}, {"rank": 1, "init": "zero", "shape": (8, 16)}])
def test_what_lokr_cannot_hold_is_refused(fields, tmp_path):
    model = ts.adapt(tiny.tiny_llama(), ts.SoKA(**fields), targets=["q_proj"])
    with pytest.raises(ts.TunesmithError, match="LoKr.*format='tunesmith'"):
        ts.save(model, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


def test_effective_convolutions_are_refused(tmp_path):
    by_peft("convnet", {"target_modules": ["3"], "r": 1, "alpha": 4, "use_effective_conv2d": True}, tmp_path / "a")
    with pytest.raises(ts.TunesmithError, match="use_effective_conv2d"):
        ts.load(tiny.tiny_convnet(), tmp_path / "a")
