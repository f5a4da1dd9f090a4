"""SHiRA layers against peft's: a random mask from its seed, and two adapters that overlap."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "shira"
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def flat(indices, width):
    return indices[0] * width + indices[1]


def test_every_case_is_read():
    assert names(FOLDER) == ["random_r2", "two_adapters_wm_snip"]


def test_random():
    case = read(FOLDER, "random_r2")
    config = ts.SHiRA(rank=case.config["r"], mask="random", same=True, seed=case.config["random_seed"])
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), config, targets=["0"])
    (adapter,) = adapters(model, "default").values()
    assert torch.equal(adapter.index.long(), flat(case.tensors["param.indices"], 24))
    assert torch.equal(adapter.index.long(), case.tensors["out.mask"].flatten().nonzero()[:, 0])
    with torch.no_grad():
        adapter.v.copy_(case.tensors["param.values"])
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y * case.tensors["in.loss_coeff"]).sum() + 0.5 * (y**2).sum()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)
    torch.testing.assert_close(adapter.v.grad, case.tensors["grad.values"], **CLOSE)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"])


@pytest.mark.parametrize("merged", [False, True])
def test_two_that_overlap(merged):
    case = read(FOLDER, "two_adapters_wm_snip")
    model = nn.Sequential(linear(case.part("frozen")))
    gradient = case.tensors["in.calibration_grad"]
    for name, mask in (("wm", "magnitude"), ("snip", "snip")):
        ts.adapt(model, ts.SHiRA(rank=case.config["r"], mask=mask), name=name, targets=["0"], calibrate=lambda model: (model[0].weight * gradient).sum().backward())
        (adapter,) = adapters(model, name).values()
        assert torch.equal(adapter.index.long(), flat(case.tensors[f"param.indices_{name}"], 20))
        with torch.no_grad():
            adapter.v.copy_(case.tensors[f"param.values_{name}"])
    base = model[0].weight.clone()
    ts.activate(model, case.config["scales"])
    if merged:
        torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.fused_weight"])
    torch.testing.assert_close(model(case.tensors["in.x"]), case.tensors["out.y"], **CLOSE)
    if merged:
        assert torch.equal(ts.unmerge(model)[0].weight, base)
