"""Layers of LLM-Adapters and the LoRA family against the authors' classes."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts
from tunesmith import optim

from .cases import check, linear, names, read

FOLDER = "llm-adapters"


def method_of(config: dict) -> dict:
    if "adapter_type" in config:
        place = {"mh_adapter": "before", "output_adapter": "after"}.get(config["adapter_type"])
        method = {"method": "series-adapter" if place else "parallel-adapter", "bottleneck": config["bottleneck_size"], "activation": config["non_linearity"], "scale": config["scaling"]}
        return method | ({"place": place} if place else {"bias": False})
    return {"method": "dora" if config["use_dora"] else "lora", "rank": config["r"], "alpha": config["lora_alpha"], "rslora": config["use_rslora"], "dropout": config["dropout"]}


OWN = {"lora_A": "A", "lora_B": "B", "magnitude": "magnitude", "down": "down", "up": "up"}


@pytest.mark.parametrize("name", [n for n in names(FOLDER) if "down" in read(FOLDER, n).part("param") or "lora_A" in read(FOLDER, n).part("param")])
def test_layer(name):
    case = read(FOLDER, name)
    method = method_of(case.config)
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), method, targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    if "magnitude_init" in case.part("out"):
        torch.testing.assert_close(adapter.magnitude.detach(), case.part("out")["magnitude_init"], atol=case.tolerance, rtol=0)
    with torch.no_grad():
        for key, value in case.part("param").items():
            getattr(adapter, OWN[key]).copy_(value)
    check(case, model, {key: getattr(adapter, OWN[key]) for key in case.part("param")})
    if "merged_weight" in case.part("out"):
        torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], atol=case.tolerance, rtol=case.tolerance)


@pytest.mark.parametrize("name", [n for n in names(FOLDER) if "prefix" in read(FOLDER, n).part("param")])
def test_prefix(name):
    case = read(FOLDER, name)
    model = LlamaForCausalLM(LlamaConfig(**case.config["llama"]))
    model.load_state_dict(case.part("frozen"))
    ts.adapt(model.train(), ts.PrefixTuning(tokens=case.config["num_virtual_tokens"]))
    (prefix,) = ts.trainable(model).values()
    with torch.no_grad():
        prefix.copy_(case.tensors["param.prefix"])
    output = model(input_ids=case.tensors["in.input_ids"], labels=case.tensors["in.labels"])
    output.loss.backward()
    torch.testing.assert_close(output.logits, case.tensors["out.logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, case.tensors["out.loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefix.grad, case.tensors["grad.prefix"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in names(FOLDER) if "loraplus_lr_ratio" in read(FOLDER, n).card.get("config", {})])
def test_loraplus(name):
    case, c = read(FOLDER, name), read(FOLDER, name).config
    frozen = case.part("frozen")
    layers = sorted({key.split(".")[0] for key in frozen}, key=int)
    parts = {n: linear({k.removeprefix(f"{n}."): v for k, v in frozen.items() if k.startswith(f"{n}.")}) for n in layers}
    model = nn.Sequential(*[parts.get(str(i), nn.Tanh()) for i in range(int(layers[-1]) + 1)])
    ts.adapt(model, ts.LoRA(rank=c["r"], alpha=c["lora_alpha"], lr_ratio=c["loraplus_lr_ratio"]), targets=layers)
    adapters = {n: model[int(n)].tunesmith.adapters["default"] for n in layers}
    with torch.no_grad():
        for n, adapter in adapters.items():
            adapter.A.copy_(case.tensors[f"param.{n}.lora_A"]), adapter.B.copy_(case.tensors[f"param.{n}.lora_B"])
    optimizer = optim.build(model, lr=c["lr"], weight_decay=c["weight_decay"], betas=tuple(c["betas"]), eps=c["eps"])
    for step in range(c["steps"]):
        loss = ((model(case.tensors["in.x"]) - case.tensors["in.target"]) ** 2).mean()
        torch.testing.assert_close(loss, case.tensors[f"out.loss_step{step}"], atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for n, adapter in adapters.items():
        for key in ("A", "B"):
            torch.testing.assert_close(getattr(adapter, key), case.tensors[f"out.{n}.lora_{key}_after{c['steps']}"], atol=1e-5, rtol=1e-5)
