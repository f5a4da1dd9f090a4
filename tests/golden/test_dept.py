"""DePT against the authors' code: what goes into the model, its output, loss and gradients."""

import pytest
import torch
import transformers
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import names, read


def test_every_case_is_read():
    assert {"llama_m3_s7_r2_init", "t5_m4_s6_r3"} <= set(names("dept"))


@pytest.mark.parametrize("name", names("dept"))
def test_case(name):
    case, c = read("dept", name), read("dept", name).config
    cls = getattr(transformers, c["model"])
    model = cls(cls.config_class(**c["model_config"])).eval()
    model.load_state_dict(case.part("frozen"), strict=False)
    model.tie_weights()
    config = ts.DePT(tokens=c["num_virtual_tokens"], rank=c["r"], max_length=c["max_length"], alpha=c["lora_alpha"], init="random")
    layer = next(iter(adapters(ts.adapt(model, config), "default").values()))
    assert layer.scale == pytest.approx(c["scaling"])
    layer.keep = True  # the authors' outputs have the virtual positions
    parameters = {"prompt": layer.prompt, "A": layer.A, "B": layer.B}
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(case.tensors[f"param.{key}"])
    ids, mask, labels = (case.tensors[f"in.{key}"] for key in ("input_ids", "attention_mask", "labels"))
    seen = []
    first = model.encoder.block[0] if model.config.is_encoder_decoder else model.model.layers[0]
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    else:
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits[:, config.tokens - 1 : -1].flatten(0, 1), labels.flatten())
    loss.backward()
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(seen[0], case.tensors["out.inputs_embeds"], atol=0, rtol=0)
    torch.testing.assert_close(logits, case.tensors["out.logits"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    for key, p in parameters.items():
        torch.testing.assert_close(p.grad, case.tensors[f"grad.param.{key}"], **close)
