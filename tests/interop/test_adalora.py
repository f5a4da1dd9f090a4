"""AdaLoRA's rank allocation against the installed peft, step by step, and the pruned file that peft writes in the end."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters

pytestmark = pytest.mark.filterwarnings("ignore")
PEFT_KEY = "base_model.model.{}.lora_{}.default"


@pytest.mark.parametrize("deltaT,tinit,tfinal", [(1, 0, 4), (3, 2, 5), (2, 1, 1)])
def test_ranks_go_the_way_they_go_in_peft(deltaT, tinit, tfinal, tmp_path):
    total, shared = 14, dict(target_modules=["q_proj", "up_proj"], lora_alpha=8, orth_reg_weight=0.3, beta1=0.8, beta2=0.9)
    schedule = dict(tinit=tinit, tfinal=tfinal, deltaT=deltaT)
    theirs = get_peft_model(tiny.tiny_llama(), AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=total, **schedule, **shared))
    ours = ts.adapt(tiny.tiny_llama(), ts.AdaLoRA(rank=4, target_rank=2, alpha=8, orth_reg_weight=0.3, beta1=0.8, beta2=0.9, targets=["q_proj", "up_proj"], **schedule))
    generator, named, layers = torch.Generator().manual_seed(0), dict(theirs.named_parameters()), adapters(ours, "default")
    with torch.no_grad():
        for path, adapter in layers.items():
            for key in "AEB":
                p = getattr(adapter, key)
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
                named[PEFT_KEY.format(path, key)].copy_(p.view_as(named[PEFT_KEY.format(path, key)]))
    batch = tiny.batch("llama") | {"labels": tiny.batch("llama")["input_ids"]}
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (theirs, ours)]
    stages = ts.stages(ours, total)
    for step in range(total):
        loss, other = theirs(**batch).loss, ours(**batch).loss + ts.auxiliary_loss(ours)
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)
        for optimizer, value in zip(optimizers, (loss, other), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        stages.step()
        for path, adapter in layers.items():
            torch.testing.assert_close(adapter.E, named[PEFT_KEY.format(path, "E")].flatten(), atol=1e-5, rtol=1e-4)
    assert sum(ts.ranks(ours).values()) == 2 * len(layers) < sum(len(a.E) for a in layers.values())

    theirs.save_pretrained(tmp_path / "theirs")
    again = ts.load(tiny.tiny_llama(), tmp_path / "theirs")
    with torch.no_grad():
        expected = ours(**tiny.batch("llama")).logits
        torch.testing.assert_close(again(**tiny.batch("llama")).logits, expected, atol=2e-5, rtol=0)
        assert sum(ts.ranks(again).values()) == 2 * len(layers) == sum(r for r in (len(a.E) if hasattr(a, "E") else 0 for a in adapters(again, "default").values()))
        ts.save(again, tmp_path / "back", format="peft")
        before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            reread = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "back")
        torch.testing.assert_close(reread(**tiny.batch("llama")).logits, expected, atol=2e-5, rtol=0)
