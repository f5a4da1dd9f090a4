"""L4Q against the public code: batch 1, which is all it reads, and the gradient of the offset that its transposed grouping spoils."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import check, linear, names, read

FOLDER = "l4q"


def of(case):
    """(model, layer) with the case's weight and a new adapter."""
    c = case.config
    method = {"method": "l4q", "bits": c["bits"], "group_size": c["group_size"], "rank": c["r"], "alpha": c["lora_scale"] * c["r"]}
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), method, targets=["0"])
    return model, model[0].tunesmith.adapters["default"]


@pytest.mark.parametrize("name", names(FOLDER))
def test_layer(name):
    case = read(FOLDER, name)
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    model, layer = of(case)
    assert layer.g == pytest.approx(case.config["g"])
    own = {"lora_A": layer.A, "lora_B": layer.B, "scale": layer.step, "qbias": layer.offset}
    with torch.no_grad():
        for key, value in case.part("param").items():
            own[key].copy_(value)
    check(case, model, own)
    merged = ts.merge(model)[0].weight
    assert merged.format.group(merged.shape) == case.config["group_size"]
    if "out.codes" in case.tensors:
        codes = merged.format.unpack(merged.parts["codes"], merged.shape).view(merged.shape)
        assert torch.equal(codes.double() + case.config["Qn"], case.tensors["out.codes"].double())
    torch.testing.assert_close(merged.dequantize(), case.tensors["out.weight_q"], **close)


@pytest.mark.parametrize("name", [name for name in names(FOLDER) if "out.y_init" in read(FOLDER, name).tensors])
def test_start(name):
    case = read(FOLDER, name)
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    model, layer = of(case)
    torch.testing.assert_close(layer.step.detach(), case.tensors["out.init_scale"], **close)
    assert not layer.offset.any() and not layer.B.any()
    torch.testing.assert_close(model(case.tensors["in.x"]), case.tensors["out.y_init"], **close)
