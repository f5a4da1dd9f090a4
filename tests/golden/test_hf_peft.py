"""Adapters that peft saved: the same logits here, and the same files when written back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tunesmith as ts
from tunesmith.methods import registry

from .cases import ROOT

FOLDER = ROOT / "hf-peft"
CASES = sorted(p.parent.name for p in FOLDER.glob("*/io.json"))


def base(name: str):
    card = json.loads((FOLDER / name / "base.json").read_text())
    config = getattr(transformers, card["config_class"])(**card["config"])
    model = getattr(transformers, card["class"])(config)
    missing, unexpected = model.load_state_dict(load_file(FOLDER / name / "model.safetensors"), strict=False)
    assert not unexpected
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path):
    folder = FOLDER / name
    io, tensors = json.loads((folder / "io.json").read_text()), load_file(folder / "io.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    if not any(cls.reads_peft(fields) for cls in registry.values()):
        pytest.skip(f"no method in the registry reads {fields['peft_type']}")
    model = base(io["base"])
    inputs = {k.removeprefix("in."): t for k, t in tensors.items() if k.startswith("in.")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, tensors["out.logits_base"], atol=2e-5, rtol=0)
        ts.load(model, folder)
        logits = model(**inputs).logits
        # virtual positions are cut off here: compare the caller's own tokens
        expected = tensors["out.logits"][:, -logits.shape[1] :] if logits.dim() == 3 else tensors["out.logits"]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)

        ts.save(model, tmp_path / "back", format="peft")
        before, after = load_file(folder / "adapter_model.safetensors"), load_file(tmp_path / "back" / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = ts.load(base(io["base"]), tmp_path / "back")
        assert torch.equal(again(**inputs).logits, logits)

        if "out.logits_merged" in tensors:
            ts.merge(model)
            torch.testing.assert_close(model(**inputs).logits, logits, atol=2e-5, rtol=0)
        ts.detach(model)
        torch.testing.assert_close(model(**inputs).logits, tensors["out.logits_base"], atol=2e-5, rtol=0)
