"""IST's importance and suppressed losses against the authors' callback."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tunesmith.engine.model import hubs
from tunesmith.schedule.ist import credit

from .cases import names, read

CASES = {name: read("ist", name) for name in names("ist")}


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Net(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("name", list(CASES))
def test_importance(name):
    case = CASES[name]
    updates = sum(key.startswith("in.I_before_") for key in case.tensors)
    assert updates
    for u in range(updates):
        before, sets, losses = (case.tensors[f"in.{key}_{u}"] for key in ("I_before", "suppressed", "losses"))
        after = credit(before, sets.tolist(), losses.tolist(), case.config["rl_lr"])
        torch.testing.assert_close(after, case.tensors[f"out.I_after_{u}"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(after.neg().sigmoid(), case.tensors["out.update_prob_weights"])
    torch.testing.assert_close(after.sigmoid(), case.tensors["out.suppress_prob_weights"])


@pytest.mark.parametrize("name", list(CASES))
def test_suppressed_losses(name):
    case, config = CASES[name], CASES[name].config
    model = Net(config["width"], config["layers"])
    frozen = case.part("frozen")
    bias = {key for key in frozen if key.endswith(".bias")}
    assert not bias
    model.load_state_dict(frozen)
    ts.adapt(model, ts.LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=["up_proj", "down_proj"]))
    places = hubs(model)
    with torch.no_grad():
        for path, hub in places.items():
            hub.adapters["default"].A.copy_(case.tensors[f"param.{path}.lora_A.weight"])
            hub.adapters["default"].B.copy_(case.tensors[f"param.{path}.lora_B.weight"])
    last = max(int(key.rpartition("_")[2]) for key in case.tensors if key.startswith("in.suppressed_"))
    for chosen, wanted in zip(case.tensors[f"in.suppressed_{last}"].tolist(), case.tensors["out.suppressed_losses"].tolist(), strict=True):
        for path, hub in places.items():
            hub.gate = config["response_suppression_factor"] if int(path.split(".")[2]) in chosen else 1.0
        with torch.no_grad():
            assert F.cross_entropy(model(case.tensors["in.batch_x"]), case.tensors["in.batch_y"]).item() == pytest.approx(wanted, abs=1e-5)
