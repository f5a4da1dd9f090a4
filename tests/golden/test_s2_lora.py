"""AdaLoRA's layer and rank allocator, and layers that share A and B, against peft's classes."""

import re

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "s2-lora"


def network(case, last_tanh: bool) -> nn.Sequential:
    """The case's linear layers with tanh after each, or between them."""
    frozen = case.part("frozen")
    layers = []
    for i in sorted({int(key.split(".")[0]) for key in frozen}):
        layers += [linear({k.removeprefix(f"{i}."): t for k, t in frozen.items() if k.startswith(f"{i}.")}), nn.Tanh()]
    return nn.Sequential(*(layers if last_tanh else layers[:-1]))


def having(key: str) -> list[str]:
    return [name for name in names(FOLDER) if key in read(FOLDER, name).tensors]


def fill(adapter, A, E, B):
    with torch.no_grad():
        adapter.A.copy_(A), adapter.E.copy_(E.flatten()), adapter.B.copy_(B)


@pytest.mark.parametrize("name", having("out.orth_reg"))
def test_layer(name):
    case = read(FOLDER, name)
    c, close = case.config, {"atol": case.tolerance, "rtol": case.tolerance}
    model = nn.Sequential(linear(case.part("frozen")))
    ts.adapt(model, ts.AdaLoRA(rank=c["r"], alpha=c["lora_alpha"], orth_reg_weight=c["orth_reg_weight"]), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    fill(adapter, *(case.tensors[f"param.{key}"] for key in "AEB"))
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    task, extra = ((y - case.tensors["in.target"]) ** 2).mean(), ts.auxiliary_loss(model)
    (task + extra).backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(task, case.tensors["out.task_loss"], **close)
    torch.testing.assert_close(extra, c["orth_reg_weight"] * case.tensors["out.orth_reg"], **close)
    torch.testing.assert_close(task + extra, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    for key in "AEB":
        torch.testing.assert_close(getattr(adapter, key).grad.view_as(case.tensors[f"grad.{key}"]), case.tensors[f"grad.{key}"], **close)
    W = model[0].weight.detach().clone()
    torch.testing.assert_close(ts.merge(model)[0].weight.detach() - W, case.tensors["out.delta_weight"], **close)


@pytest.mark.parametrize("name", having("out.budget_and_mask_flag"))
def test_allocator(name):
    case, c = read(FOLDER, name), read(FOLDER, name).config
    model = network(case, last_tanh=False)
    config = ts.AdaLoRA(
        rank=c["init_r"], target_rank=c["target_r"], alpha=c["lora_alpha"], tinit=c["tinit"], tfinal=c["tfinal"], deltaT=c["deltaT"], beta1=c["beta1"], beta2=c["beta2"]
    )
    paths = [str(i) for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    ts.adapt(model, config, targets=paths)
    layers = adapters(model, "default")
    for path, adapter in layers.items():
        fill(adapter, *(case.tensors[f"param.{path}.{key}"] for key in "AEB"))
    optimizer = torch.optim.SGD(ts.trainable(model).values(), lr=float(re.search(r"SGD lr ([\d.e-]+)", c["optimizer"]).group(1)))
    stages = ts.stages(model, c["total_step"])
    (allocator,) = stages.parts.values()
    for step, (budget, _) in enumerate(case.tensors["out.budget_and_mask_flag"].tolist()):
        loss = ((model(case.tensors["in.x"]) - case.tensors["in.target"]) ** 2).mean()
        torch.testing.assert_close(loss, case.tensors[f"out.loss_{step}"], atol=case.tolerance, rtol=case.tolerance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert allocator.budget(step) == budget
        stages.step()
        assert [int((layers[path].E == 0).sum()) for path in paths] == case.tensors["out.num_zeroed"][step].tolist()
    for path, adapter in layers.items():
        for key in "AEB":
            final = case.tensors[f"out.{path}.{key}_final"]
            torch.testing.assert_close(getattr(adapter, key).detach().view_as(final), final, atol=case.tolerance, rtol=case.tolerance)
    assert ts.ranks(model) == {path: int(case.tensors[f"out.{path}.E_final"].count_nonzero()) for path in paths}


@pytest.mark.parametrize("name", having("out.l1"))
@pytest.mark.parametrize("share", ["dim", "shape", "pad"])
def test_shared(name, share):
    case = read(FOLDER, name)
    c, close = case.config, {"atol": case.tolerance, "rtol": case.tolerance}
    model = network(case, last_tanh=True)
    config = ts.S2LoRA(rank=c["r"], alpha=c["lora_alpha"], sparsity="l1", l1_weight=c["l1_weight"], orth_weight=c["orth_weight"], share=share)
    ts.adapt(model, config, targets=[str(2 * i) for i in range(c["layers"])])
    layers = list(adapters(model, "default").values())
    assert len(ts.trainable(model)) == 2 + c["layers"]
    A, B = layers[0].A.weight, layers[0].B.weight
    with torch.no_grad():
        A.copy_(case.tensors["param.A"]), B.copy_(case.tensors["param.B"])
        for adapter, E in zip(layers, case.tensors["param.E"], strict=True):
            adapter.E.copy_(E)
    x = case.tensors["in.x"].clone().requires_grad_()
    h = model(x)
    task, extra = ((h - case.tensors["in.target"]) ** 2).mean(), ts.auxiliary_loss(model)
    (task + extra).backward()
    torch.testing.assert_close(h, case.tensors["out.h"], **close)
    torch.testing.assert_close(task, case.tensors["out.task_loss"], **close)
    torch.testing.assert_close(extra, c["l1_weight"] * case.tensors["out.l1"] + c["orth_weight"] * case.tensors["out.orth"], **close)
    torch.testing.assert_close(task + extra, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    torch.testing.assert_close(A.grad, case.tensors["grad.A"], **close)
    torch.testing.assert_close(B.grad, case.tensors["grad.B"], **close)
    torch.testing.assert_close(torch.stack([adapter.E.grad for adapter in layers]), case.tensors["grad.E"], **close)
    ts.merge(model)
    for i in range(c["layers"]):
        torch.testing.assert_close(model[2 * i].weight.detach(), case.tensors[f"out.{i}.merged_weight"], **close)
