"""QWHA against the authors' code, where it is called QHFT."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine import hadamard
from tunesmith.methods.qwha import start
from tunesmith.quantize import Format

from .cases import check, linear, names, read

CASES = {name: read("qwha", name) for name in names("qwha")}


def having(key):
    return [name for name, case in CASES.items() if key in case.tensors]


def test_every_case_is_read():
    assert set(having("param.spectrum") + having("out.spectrum")) == set(CASES)


@pytest.mark.parametrize("name", having("param.spectrum"))
def test_layer(name):
    case = CASES[name]
    config, frozen = case.config, case.part("frozen")
    if "H" in frozen:  # wht(I)
        torch.testing.assert_close(hadamard.transform(torch.eye(config["in"], dtype=frozen["H"].dtype)), frozen["H"], atol=1e-6, rtol=1e-6)
    method = ts.QWHA(n_frequency=config["n_frequency"], scaling=config["scaling"], random_loc_seed=config["random_loc_seed"])
    model = ts.adapt(nn.Sequential(linear(frozen)), method, targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    torch.testing.assert_close(model(case.tensors["in.x"]), case.tensors["out.y_init"])
    root = torch.tensor(config["in"]).sqrt().double() / config["in"] ** 0.5  # the authors take the root in float32
    flat = frozen["indices"][0] * config["in"] + frozen["indices"][1]
    with torch.no_grad():
        adapter.index.copy_(flat)
        adapter.c.copy_(case.tensors["param.spectrum"] / root)
    case.tensors["grad.spectrum"] *= root
    check(case, model, {"spectrum": adapter.c})
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    torch.testing.assert_close(adapter.change().detach(), case.tensors["out.delta_weight"], **close)
    with torch.no_grad():
        torch.testing.assert_close(model(case.tensors["in.x"]), case.tensors["out.y"], **close)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], **close)


@pytest.mark.parametrize("name", having("out.spectrum"))
def test_start(name):
    case = CASES[name]
    config, frozen, out = case.config, case.part("frozen"), case.part("out")
    W, R = frozen["weight"].double(), frozen["R"].double()
    format = Format(format=f"int{config['bits']}", group_size=config["group_size"])
    stats = format.fit(format.groups(W))
    torch.testing.assert_close(format.value(format.code(format.groups(W), stats), stats).view_as(W).float(), frozen["weight_q"], atol=1e-5, rtol=1e-4)
    error = W - frozen["weight_q"].double()
    index, c = start(error, R.T @ R, config["n"], config["ALPHA"])
    counts = torch.bincount(index // config["in"], minlength=config["out"])
    assert torch.equal(counts.sort().values, out["num_per_row"].sort().values) and (counts - out["num_per_row"]).abs().max() <= 1
    theirs = set((out["indices"][0].long() * config["in"] + out["indices"][1].long()).tolist())
    assert len(theirs & set(index.tolist())) >= len(theirs) - int((counts != out["num_per_row"]).sum())
    F = torch.zeros(W.numel(), dtype=W.dtype).index_put((index,), c).view_as(W)
    change = hadamard.transform(F, transpose=True)
    assert (R @ error.T).square().sum().item() == pytest.approx(out["err_before"].item(), rel=1e-3)
    assert (R @ (error - change).T).square().sum().item() == pytest.approx(out["err_after"].item(), rel=2e-2)
    if torch.equal(counts, out["num_per_row"]):
        torch.testing.assert_close(change.float(), out["delta_weight"], atol=1e-4, rtol=1e-3)
