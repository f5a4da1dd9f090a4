"""NeuroAda's bypass values against the authors' code, in a net of two trained layers and a frozen head."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "neuroada"
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.mark.parametrize("name", names(FOLDER))
def test_net(name):
    case = read(FOLDER, name)
    layers = {key: linear(case.part(f"frozen.{key}")) for key in ("q_proj", "o_proj", "lm_head")}
    model = nn.Sequential(OrderedDict(q_proj=layers["q_proj"], relu=nn.ReLU(), o_proj=layers["o_proj"], tanh=nn.Tanh(), lm_head=layers["lm_head"]))
    gradients = case.part("in.calib_grad")

    def calibrate(model):
        sum((getattr(model, key).weight * g).sum() for key, g in gradients.items()).backward()

    config = ts.NeuroAda(k=case.config["k"], choice="gradient" if gradients else "magnitude", targets=case.config["target_modules"])
    ts.adapt(model, config, calibrate=calibrate)
    own = adapters(model, "default")
    for key, adapter in own.items():
        indices = case.tensors[f"out.indices.{key}"]
        assert torch.equal(adapter.index.view_as(indices).long() % layers[key].in_features, indices)
        with torch.no_grad():
            adapter.v.copy_(case.tensors[f"param.delta.{key}"].flatten())
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y * case.tensors["in.loss_coeff"]).sum() + 0.5 * (y**2).sum()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)
    for key, adapter in own.items():
        torch.testing.assert_close(adapter.v.grad, case.tensors[f"grad.delta.{key}"].flatten(), **CLOSE)
    ts.merge(model)
    for key in own:
        torch.testing.assert_close(getattr(model, key).weight.detach(), case.tensors[f"out.merged.{key}"])
