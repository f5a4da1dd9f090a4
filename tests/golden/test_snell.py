"""SNELL, its dense kernel, SNELLA and the allocator against the authors' code."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import names, read

CASES = [(folder, name) for folder in ("snell", "snella") for name in names(folder)]
LAYERS = [case for case in CASES if case[1] != "snella_alloc"]


def method_of(folder, config, scale):
    common = {"rank": config["r"], "scale": scale}
    return ts.SNELL(**common, sparsity=config["sparsity"] or 0) if folder == "snell" else ts.SNELLA(**common, init_sparsity=config["sparsity"])


def test_every_case_is_read():
    assert [name for _, name in CASES] == ["klora_dense", "snell_s060", "snella_alloc", "snella_layer"]


@pytest.mark.parametrize("folder,name", LAYERS)
def test_layer(folder, name):
    case = read(folder, name)
    close = {"atol": 1e-12, "rtol": 1e-12} if case.tensors["in.x"].dtype == torch.float64 else {"atol": 2e-6, "rtol": 1e-5}
    model = nn.Sequential(nn.Linear(24, 40, bias=False, dtype=case.tensors["in.x"].dtype))
    nn.init.zeros_(model[0].weight)
    ts.adapt(model, method_of(folder, case.config, float(case.tensors["frozen.alpha_p"].flatten()[0])), targets=["0"])
    (adapter,) = adapters(model, "default").values()
    parameters = {"In_Qs": adapter.A, "Out_Qs": adapter.B, **{key: getattr(adapter, key) for key in ("alpha", "gamma", "beta") if f"param.{key}" in case.tensors}}
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(case.tensors[f"param.{key}"].view_as(p))
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y * case.tensors["in.c"]).sum()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    for key, p in parameters.items():
        torch.testing.assert_close(p.grad, case.tensors[f"grad.{key}"].view_as(p), **close)
    merged = case.tensors["out.merged_sparse" if "out.merged_sparse" in case.tensors else "out.merged_dense"]
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), merged.T, **close)


def test_allocator():
    case = read("snella", "snella_alloc")
    c = case.config
    model = nn.Sequential(*(nn.Linear(*shape) for shape in c["shapes_in_out"]))
    config = ts.SNELLA(
        rank=c["r"], init_sparsity=c["init_sparsity"], target_sparsity=c["target_sparsity"], rounds=c["total_epochs"], warmup=c["init_warmup"],
        final=c["final_warmup"], beta1=c["beta1"], beta2=c["beta2"], min_density=0, targets=["0", "1", "2"],
    )  # fmt: skip
    layers = list(adapters(ts.adapt(model, config), "default").values())
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.A.copy_(case.tensors[f"param.In_Qs.m{i}"])
            layer.B.copy_(case.tensors[f"param.Out_Qs.m{i}"])
    (allocator,) = ts.stages(model, c["total_epochs"] * c["steps_per_epoch"]).parts.values()
    for epoch in range(c["total_epochs"]):
        torch.testing.assert_close(torch.stack([layer.sparsity for layer in layers]), case.tensors["out.sparsity"][epoch].double(), atol=1e-7, rtol=0)
        for step in range(c["steps_per_epoch"]):
            for i, layer in enumerate(layers):
                layer.A.grad, layer.B.grad = (case.tensors[f"in.grad_{key}.e{epoch}s{step}m{i}"] for key in ("In_Qs", "Out_Qs"))
            allocator.step()
    for i in range(3):
        for j, key in enumerate(("In_Qs", "Out_Qs")):
            torch.testing.assert_close(allocator.mean[2 * i + j], case.tensors[f"out.ema_ipt.{key}.m{i}"])
            torch.testing.assert_close(allocator.spread[2 * i + j], case.tensors[f"out.ema_unc.{key}.m{i}"])
