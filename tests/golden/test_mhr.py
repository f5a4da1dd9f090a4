"""Layers of Poly, MHR and MHR-μ against the authors' code."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.methods import mhr

from .cases import check, linear, names, read

FOLDER = "mhr"
OTHER_ROUTERS = ("module_logits_dropout", "module_logits_l2_norm", "module_logits_straight_through", "poly_average_correction", "poly_use_shared_skill", "lora_warmup", "lora_dropout")


def adapted(case, **fields):
    c = case.config
    assert not any(c.get(flag) for flag in OTHER_ROUTERS)
    sizes = {"rank": c["lora_rank"], "alpha": c["lora_alpha"], "n_skills": c["n_skills"], "n_splits": c["n_splits"]}
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), ts.MHR(**sizes, **fields), targets=["0"]).train(bool(c.get("training")))
    adapter = model[0].tunesmith.adapters["default"]
    with torch.no_grad():
        adapter.A.copy_(case.tensors["param.lora_a"]), adapter.B.copy_(case.tensors["param.lora_b"])
    return model, adapter


def compare(case, model):
    """Output, loss and the input's gradient, with the parameters' gradients left in place."""
    check(case, model, {})
    return {"atol": case.tolerance, "rtol": case.tolerance}


@pytest.mark.parametrize("name", [n for n in names(FOLDER) if "module_logits" in read(FOLDER, n).part("param")])
def test_routing_by_task(name, monkeypatch):
    case = read(FOLDER, name)
    relaxed = bool(case.config["module_logits_relaxed_bernoulli"])
    model, adapter = adapted(case, n_tasks=case.config["n_tasks"], relaxed_bernoulli=relaxed)
    ids, shape = case.tensors["in.task_ids"], (-1, case.config["n_splits"], case.config["n_skills"])
    drawn = [t.view(shape) for key, t in case.part("in").items() if key not in ("x", "target", "task_ids")]
    noise = 0.0
    if relaxed and model.training:
        (noise,) = drawn
        noise = torch.logit(noise) if 0 < noise.min() and noise.max() < 1 else noise  # stored as u ~ U(0, 1) or as log u − log(1 − u)
        monkeypatch.setattr(mhr, "logistic", lambda like: noise.view_as(like))
    with torch.no_grad():
        adapter.Z.copy_(case.tensors["param.module_logits"])
        weights = adapter.weights(ids.tolist(), noise)
    with ts.tasks(model, ids):
        close = compare(case, model)
    torch.testing.assert_close(weights, case.tensors["out.mixing_weights"], **close)
    for key, own in (("lora_a", "A"), ("lora_b", "B"), ("module_logits", "Z")):
        torch.testing.assert_close(getattr(adapter, own).grad, case.tensors[f"grad.{key}"], **close)


@pytest.mark.parametrize("name", [n for n in names(FOLDER) if "module_logits" not in read(FOLDER, n).part("param")])
def test_average_of_skills(name):
    """One adapter in place of skills at fixed equal weights, whose gradients are each a share of the one's."""
    case = read(FOLDER, name)
    model, _ = adapted(case)
    ts.few_shot(model, variant="mu")
    adapter, skills = model[0].tunesmith.adapters["default"], case.config["n_skills"]
    close = compare(case, model)
    blocks = case.config["n_splits"], -1, case.config["lora_rank"]
    gA, gB = adapter.A.grad.T.reshape(blocks), adapter.B.grad.reshape(blocks).mT
    for own, key in ((gA, "lora_a"), (gB, "lora_b")):
        torch.testing.assert_close(own[:, None].expand(-1, skills, -1, -1) / skills, case.tensors[f"grad.{key}"], **close)
