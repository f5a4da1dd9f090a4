"""Bone, Bat and MiSS layers against the authors' code in Hugging Face peft."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import linear, names, read

FOLDER = "bone"
KEYS = ("bone_block", "miss_block")


def methods_of(config: dict) -> list[dict]:
    """Every way to say the case's method: as `miss`, and by its own name if it has one."""
    mode, rank = config["init_weights"], config["r"]
    mini = {"mini_r": config["mini_r"]} if mode == "mini" else {}
    own = [{"method": {True: "bone", "bat": "bat"}[mode], "rank": rank}] if mode != "mini" else []
    return [{"method": "miss", "rank": rank, "init_weights": mode} | mini, *own]


def run(case, method, start=False):
    """(adapted model, its D, x, output, loss after backward)."""
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), method, targets=["0"])
    (D,) = ts.trainable(model).values()
    if not start:
        with torch.no_grad():
            D.copy_(next(case.part("param")[key] for key in KEYS if key in case.part("param")))
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = ((y - case.tensors["in.target"]) ** 2).mean()
    loss.backward()
    return model, D, x, y, loss


CASES = [pytest.param(name, method, id=f"{name}-{method['method']}") for name in names(FOLDER) for method in methods_of(read(FOLDER, name).config)]


@pytest.mark.parametrize("name,method", CASES)
def test_layer(name, method):
    case = read(FOLDER, name)
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    model, D, x, y, loss = run(case, method)
    grads, out = case.part("grad"), case.part("out")
    torch.testing.assert_close(y, out["y"], **close)
    torch.testing.assert_close(loss, out["loss"], **close)
    torch.testing.assert_close(x.grad, grads["x"], **close)
    torch.testing.assert_close(D.grad, next(grads[key] for key in KEYS if key in grads), **close)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), out["merged_weight"], **close)


@pytest.mark.parametrize("name,method", [p for p in CASES if "out.y_init" in read(FOLDER, p.values[0]).tensors])
def test_start(name, method):
    case = read(FOLDER, name)
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    _, D, _, y, _ = run(case, method, start=True)
    assert not D.any()
    torch.testing.assert_close(y, case.tensors["out.y_init"], **close)
    torch.testing.assert_close(D.grad, next(case.tensors[f"grad.{key}_init"] for key in KEYS if f"grad.{key}_init" in case.tensors), **close)
