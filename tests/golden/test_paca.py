"""PaCA layers against the authors' code, whose P is W_S·r/α + D."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "paca"
LAYERS, TRAINED = ([name for name in names(FOLDER) if key in read(FOLDER, name).tensors] for key in ("in.loss_coeff", "out.losses"))


def build(case, P=None):
    """(adapted model, its adapter) with the case's columns, and its P if given."""
    frozen = case.part("frozen")
    weight = frozen.get("weight", frozen.get("weight_dequant"))
    model = ts.adapt(
        nn.Sequential(linear(frozen | {"weight": weight})), {"method": "paca", "rank": case.config["r"], "alpha": case.config["paca_alpha"]}, targets=["0"]
    )
    (adapter,) = adapters(model, "default").values()
    with torch.no_grad():
        adapter.index.copy_(case.tensors["param.indices"])
        if P is not None:
            adapter.v.copy_(P - weight[:, adapter.index] / case.config["scaling"])
    return model, adapter


def test_every_case_is_read():
    assert LAYERS and TRAINED and sorted(LAYERS + TRAINED) == names(FOLDER)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    case = read(FOLDER, name)
    model, adapter = build(case, case.tensors["param.paca_w"])
    base = model[0].weight.clone()
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y * case.tensors["in.loss_coeff"]).sum() + 0.5 * (y**2).sum()
    loss.backward()
    close = {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    torch.testing.assert_close(adapter.v.grad, case.tensors["grad.paca_w"], **close)
    torch.testing.assert_close(base[:, adapter.index] / case.config["scaling"], case.tensors["out.paca_w_at_init"], **close)
    if "out.merged_weight" in case.tensors:
        torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], **close)


@pytest.mark.parametrize("name", TRAINED)
def test_steps_of_adam(name):
    case = read(FOLDER, name)
    model, adapter = build(case)
    start = model[0].weight[:, adapter.index] / case.config["scaling"]
    torch.testing.assert_close(start, case.tensors["param.paca_w_init"])
    optimizer = torch.optim.Adam(ts.trainable(model).values(), lr=case.config["lr"])
    for x, target, expected in zip(case.tensors["in.x"], case.tensors["in.target"], case.tensors["out.losses"], strict=True):
        loss = ((model(x) - target) ** 2).mean()
        torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(start + adapter.v, case.tensors["out.paca_w_final"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], atol=1e-6, rtol=1e-5)
