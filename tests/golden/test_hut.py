"""HUT against HiRA's class in peft (its Hadamard core) and against the formulas for the rest."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import check, linear, names, read

FOLDER = "hut"


@pytest.mark.parametrize("name", names(FOLDER))
def test_layer(name):
    case = read(FOLDER, name)
    given, frozen = case.part("param"), case.part("frozen")
    if "beta" in given:  # a layer without a bias is one whose bias is 0
        case.tensors.setdefault("frozen.bias", torch.zeros(len(frozen["weight"]), dtype=frozen["weight"].dtype))
    affine = case.config.get("gamma_beta", "gamma" in given)
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), ts.HUT(rank=case.config["r"], scale=case.config.get("scale", 1.0), affine=affine), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    own = {"A": adapter.A, "B": adapter.B, "gamma": adapter.g, "beta": adapter.beta}
    with torch.no_grad():
        for key, value in given.items():
            own[key].copy_(value - 1 if key == "gamma" else value)
    check(case, model, {key: own[key] for key in given})
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    merged = ts.merge(model)[0]
    torch.testing.assert_close(merged.weight.detach(), case.tensors["out.merged_weight"], **close)
    if "merged_bias" in case.part("out"):
        torch.testing.assert_close(merged.bias.detach(), case.tensors["out.merged_bias"], **close)
