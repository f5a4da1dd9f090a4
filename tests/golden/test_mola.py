"""MoLA's layer and balance loss against the authors' code."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.methods.mola import balance_loss

from .cases import linear, names, read

FOLDER = "mola"
OWN = {"router": "R", "lora_A": "A", "lora_B": "B"}
CASES = [(name, "in.x" in read(FOLDER, name).tensors) for name in names(FOLDER)]


@pytest.mark.parametrize("name", [name for name, layer in CASES if layer])
def test_layer(name):
    case = read(FOLDER, name)
    c, close = case.config, {"atol": case.tolerance, "rtol": case.tolerance}
    coefficient = c["balance_coef"] or 1.0  # with none the loss is still measured
    method = ts.MoLA(experts=c["experts"], top_k=c["top_k"], rank=c["r"], alpha=c["lora_alpha"], dropout=c["dropout"], balance=coefficient)
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), method, targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    with torch.no_grad():
        for key, value in case.part("param").items():
            getattr(adapter, OWN[key]).copy_(value)
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    task, balance = ((y - case.tensors["in.target"]) ** 2).mean(), ts.auxiliary_loss(model) / coefficient
    loss = task + c["balance_coef"] * balance
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(adapter.logits, case.tensors["out.router_logits"], **close)
    for value, key in ((balance, "balance_loss"), (task, "task_loss"), (loss, "loss")):
        torch.testing.assert_close(value, case.tensors[f"out.{key}"], **close)
    found = {"x": x.grad} | {key: getattr(adapter, OWN[key]).grad for key in case.part("param")}
    for key, expected in case.part("grad").items():  # float32 sums that nearly cancel are as wrong as their largest terms
        torch.testing.assert_close(found[key], expected, atol=case.tolerance * max(1, expected.abs().max().item()), rtol=case.tolerance)


@pytest.mark.parametrize("name", [name for name, layer in CASES if not layer])
def test_balance(name):
    case = read(FOLDER, name)
    logits = [case.tensors[f"in.logits_{i}"].clone().requires_grad_() for i in range(len(case.config["number_experts"]))]
    assert [l.shape[1] for l in logits] == case.config["number_experts"]
    loss = sum(balance_loss(l, k) for l, k in zip(logits, case.config["top_k"], strict=True))
    loss.backward()
    torch.testing.assert_close(loss, case.tensors["out.balance_loss"], atol=case.tolerance, rtol=case.tolerance)
    for i, l in enumerate(logits):
        torch.testing.assert_close(l.grad, case.tensors[f"grad.logits_{i}"], atol=case.tolerance, rtol=case.tolerance)
