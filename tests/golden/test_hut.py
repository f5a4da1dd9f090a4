"""HUT against HiRA's class in peft (its Hadamard core) and against the formulas for the rest."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import names, read

FOLDER = "hut"


@pytest.mark.parametrize("name", names(FOLDER))
def test_layer(name):
    case = read(FOLDER, name)
    frozen, given = case.part("frozen"), case.part("param")
    if "beta" in given:  # a layer without a bias is one whose bias is 0
        frozen.setdefault("bias", torch.zeros(len(frozen["weight"]), dtype=frozen["weight"].dtype))
    layer = nn.Linear(*reversed(frozen["weight"].shape), bias="bias" in frozen, dtype=frozen["weight"].dtype)
    layer.load_state_dict(frozen)
    affine = case.config.get("gamma_beta", "gamma" in given)
    model = ts.adapt(nn.Sequential(layer), ts.HUT(rank=case.config["r"], scale=case.config.get("scale", 1.0), affine=affine), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    own = {"A": adapter.A, "B": adapter.B, "gamma": adapter.g, "beta": adapter.beta}
    with torch.no_grad():
        for key, value in given.items():
            own[key].copy_(value - 1 if key == "gamma" else value)
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = ((y - case.tensors["in.target"]) ** 2).mean()
    loss.backward()
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    for key in given:
        torch.testing.assert_close(own[key].grad, case.tensors[f"grad.{key}"], **close)
    merged = ts.merge(model)[0]
    torch.testing.assert_close(merged.weight.detach(), case.tensors["out.merged_weight"], **close)
    if "merged_bias" in case.part("out"):
        torch.testing.assert_close(merged.bias.detach(), case.tensors["out.merged_bias"], **close)
