"""SoKA against the formulas, and against peft's LoKr, which is its case of one term."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.methods.soka import elbow, energy_rank, kpsvd

from .cases import check, linear, names, read

FOLDER = "soka"
KPSVD = [n for n in names(FOLDER) if "frozen.residual" in read(FOLDER, n).tensors]
LOKR = [n for n in names(FOLDER) if {"lokr_w1", "lokr_w2"} <= read(FOLDER, n).part("param").keys()]


def adapted(case, **fields):
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), ts.SoKA(**fields), targets=["0"])
    return model, model[0].tunesmith.adapters["default"]


def compare(case, model, gradients):
    check(case, model, gradients)
    with torch.no_grad():
        torch.testing.assert_close(ts.merge(model)(case.tensors["in.x"]), case.tensors["out.y"], atol=case.tolerance, rtol=case.tolerance)


@pytest.mark.parametrize("name", KPSVD)
def test_kpsvd(name):
    case, c = read(FOLDER, name), read(FOLDER, name).config
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    W = case.tensors["frozen.weight"]
    S = kpsvd(W, c["m"], c["n"], W.numel())[0]
    torch.testing.assert_close(S, case.tensors["out.singular_values"], **close)
    assert [energy_rank(S.square(), tau.item()) for tau in case.tensors["in.taus"]] == case.tensors["out.energy_ranks"].tolist()
    assert elbow(S)[0] == case.tensors["out.elbow_rank"].item()

    model, adapter = adapted(case, rank=c["r_kp"], shape=(c["m"], c["n"]))
    assert adapter.B.shape[1:] == (c["p"], c["q"])
    torch.testing.assert_close(adapter.A.detach(), case.tensors["param.A"], **close)
    torch.testing.assert_close(adapter.B.detach(), case.tensors["param.B"], **close)
    part = sum(torch.kron(A, B) for A, B in zip(adapter.A.detach(), adapter.B.detach(), strict=True))
    torch.testing.assert_close(W - part, case.tensors["frozen.residual"], **close)
    compare(case, model, {"A": adapter.A, "B": adapter.B})


@pytest.mark.parametrize("name", LOKR)
def test_one_term_is_lokr(name):
    case = read(FOLDER, name)
    w1, w2 = case.tensors["param.lokr_w1"], case.tensors["param.lokr_w2"]
    model, adapter = adapted(case, rank=1, init="zero", shape=tuple(w1.shape), scale=case.config["scaling"])
    with torch.no_grad():
        adapter.A.copy_(w1[None]), adapter.B.copy_(w2[None])
    W = case.tensors["frozen.weight"]
    torch.testing.assert_close(adapter.merged(W, None)[0].detach() - W, case.tensors["out.delta"], atol=case.tolerance, rtol=case.tolerance)
    compare(case, model, {"lokr_w1": adapter.A, "lokr_w2": adapter.B})
