"""ID³'s growing mask against the authors' optimiser, and the masks that are chosen once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "id3"
PLACES = [("0", "weight"), ("0", "bias"), ("2", "weight"), ("2", "bias")]


def net(case):
    return nn.Sequential(linear(case.part("frozen.0")), nn.Tanh(), linear(case.part("frozen.2")))


def mask_of(model, path, name):
    mask = torch.zeros_like(model.get_parameter(f"{path}.{name}"), dtype=torch.uint8)
    mask.view(-1)[adapters(model, "default")[path].index(name).long()] = 1
    return mask


def test_every_case_is_read():
    assert names(FOLDER) == ["sgd_exp1", "static_masks"]


def test_growing_mask():
    case = read(FOLDER, "sgd_exp1")
    c = case.config
    model = ts.adapt(net(case), ts.ID3(budget=c["budget"], exp=c["exp"], eps=c["eps"]), targets=["0", "2"])
    optimizer, stages = torch.optim.SGD(ts.trainable(model).values(), lr=0.1), ts.stages(model, c["max_steps"])
    for t, (x, target) in enumerate(zip(case.tensors["in.x"], case.tensors["in.target"], strict=True)):
        optimizer.zero_grad()
        loss = ((model(x) - target) ** 2).mean()
        torch.testing.assert_close(loss, case.tensors["out.losses"][t])
        loss.backward()
        stages.before_step(optimizer)
        optimizer.step()
        stages.step()
        for path, name in PLACES:
            assert torch.equal(mask_of(model, path, name), case.tensors[f"out.mask.{path}.{name}"][t]), (t, path, name)
    ts.merge(model)
    for path, name in PLACES:
        torch.testing.assert_close(model.get_parameter(f"{path}.{name}").detach(), case.tensors[f"out.final.{path}.{name}"])


@pytest.mark.parametrize("mask,key", [("pafi", None), ("fisher", "out.fish_mask_flat"), ("gradient", "out.maxgrad_mask_flat")])
def test_fixed_masks(mask, key):
    case = read(FOLDER, "static_masks")
    x, y = case.tensors["in.x"], case.tensors["in.y"]

    def calibrate(model):
        for row in range(len(x)) if mask == "fisher" else [slice(None)]:
            F.cross_entropy(model(x[row][None] if mask == "fisher" else x), y[row][None] if mask == "fisher" else y).backward()

    model = ts.adapt(net(case), ts.ID3(budget=case.config["budget"], mask=mask), targets=["0", "2"], calibrate=calibrate)
    found = torch.cat([(mask_of(model, *place) if place[0] in adapters(model, "default") else torch.zeros_like(case.tensors["frozen." + ".".join(place)], dtype=torch.uint8)).flatten() for place in PLACES])
    expected = case.tensors[key] if key else torch.cat([case.tensors[f"out.pafi_mask.{path}.{name}"].flatten() for path, name in PLACES])
    assert torch.equal(found, expected)
