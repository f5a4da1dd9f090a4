"""What a forward is told and what adapters add to the loss; what changes while training; starts from gradients."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.adapter import Adapter
from tunesmith.engine.calls import score
from tunesmith.engine.sites import sites
from tunesmith.methods import Method, registry


class TaskBias(Adapter):
    """A bias per task: y = base(x) + shift[task]."""

    def __init__(self, site):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, site.out_features))
        self.start = site.gradient
        self.seen = []

    def forward(self, base, x):
        ids = base.site.holder.tunesmith.state.tasks_of(len(x))
        self.seen.append(ids)
        return base(x) if ids is None else base(x) + self.shift[ids]


class Decay:
    def __init__(self, adapters, total):
        self.adapters, self.left = adapters, total

    def step(self):
        self.left -= 1
        if not self.left:
            for adapter in self.adapters.values():
                assert adapter.shift.grad is not None
                adapter.shift.data.zero_()

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]


@pytest.fixture
def method():
    class TaskBiasMethod(Method):
        method, family, title, paper, mergeable = "task-bias", "test", "A bias per task", "none", False
        scored: bool = False

        @property
        def calibrated(self):
            return ("gradient",) if self.scored else ()

        def layer(self, site):
            return TaskBias(site)

        def count(self, site):
            return 3 * site.out_features

        def auxiliary_loss(self, adapters):
            return sum(a.shift.square().sum() for a in adapters.values())

        def stage(self, adapters, total_steps):
            return Decay(adapters, total_steps)

    yield TaskBiasMethod
    del registry["task-bias"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))


def test_rows_have_tasks_also_where_rows_are_repeated_or_split(method):
    model = ts.adapt(net(), method(), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    nn.init.normal_(adapter.shift)
    x = torch.randn(4, 4)
    with torch.no_grad():
        base = model(x)
        with ts.tasks(model, [2, 0]):
            y = model(x)
        hidden = nn.functional.linear(x, model[0].weight, model[0].bias) + adapter.shift[[2, 2, 0, 0]]
        torch.testing.assert_close(y, model[2](hidden.tanh()))
        assert torch.equal(model(x), base)
        with ts.tasks(model, [0, 1, 2, 0]), ts.mixed(model, ["default", None, "default", None]):
            part = model(x)
        assert torch.equal(adapter.seen[-1], torch.tensor([0, 2]))
        torch.testing.assert_close(part[[1, 3]], base[[1, 3]])
        with pytest.raises(ts.TunesmithError, match="3 task ids met a batch of 4 rows"), ts.tasks(model, [0, 1, 2]):
            model(x)


def test_auxiliary_loss_is_that_of_the_active_adapters(method):
    model = ts.adapt(net(), "lora", name="plain")
    assert ts.auxiliary_loss(model) is None
    ts.adapt(model, method(), targets=["0"])
    nn.init.ones_(model[0].tunesmith.adapters["default"].shift)
    assert ts.auxiliary_loss(model).item() == 15
    ts.activate(model, "plain")
    assert ts.auxiliary_loss(model) is None
    ts.adapt(model, "lora", name="both", targets={"0": {"method": "task-bias"}, "2": {}})
    nn.init.ones_(model[0].tunesmith.adapters["both"].shift)
    assert ts.auxiliary_loss(model).item() == 15 and list(ts.stages(model, 3).parts) == ["both task-bias"]


def test_stages_step_and_resume(method):
    model = ts.adapt(net(), method(), targets=["0"])
    shift = model[0].tunesmith.adapters["default"].shift
    nn.init.ones_(shift)
    shift.grad = torch.zeros_like(shift)
    first = ts.stages(model, 2)
    first.step()
    again = ts.stages(model, 2)
    again.load_state_dict(first.state_dict())
    assert shift.sum() == 15
    again.step()
    assert shift.sum() == 0


def test_a_start_from_gradients(method):
    model, x = net(), torch.randn(7, 4)

    def calibrate(model):
        model(x).square().sum().backward()

    with pytest.raises(ts.TunesmithError, match="calibrate"):
        ts.adapt(model, method(scored=True), targets=["0"])
    twin = net()
    calibrate(twin)
    model[2].bias.grad = kept = torch.ones(6)
    ts.adapt(model, method(scored=True), targets=["0"], calibrate=calibrate)
    hub = model[0].tunesmith
    torch.testing.assert_close(hub.adapters["default"].start, twin[0].weight.grad)
    assert hub.site.gradient is None and model[0].weight.grad is None and model[2].bias.grad is kept
    ts.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ts.TunesmithError, match="left no gradient at '0'"):
        ts.adapt(model, method(scored=True), targets=["0"], calibrate=lambda model: None)


def test_statistics_of_the_calibration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    found = {s.path: s for s in sites(model)}
    batches = [torch.randn(3, 4) for _ in range(2)]
    score(model, found, lambda model: [model(x).square().sum().backward() for x in batches], ("gradient", "squares", "inputs"))
    gradients = []
    for x in batches:
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for path, site in found.items():
        for name in site.names:
            each = [g[f"{path}.{name}"] for g in gradients]
            torch.testing.assert_close(site.seen["gradient"][name], sum(each))
            torch.testing.assert_close(site.seen["squares"][name], sum(g.square() for g in each))
    torch.testing.assert_close(found["0"].inputs, torch.cat(batches).abs().mean(0))
    assert found["1"].inputs is None and torch.equal(found["2"].gradient, found["2"].seen["gradient"]["weight"])


def test_a_gradient_that_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(ts.TunesmithError, match="gradient at '0' is not finite"):
        score(model, {s.path: s for s in sites(model)}, lambda model: (model(torch.ones(1, 4)) * float("inf")).sum().backward())


def test_padding_does_not_count_as_input():
    from tests import tiny
    from tunesmith.engine.sites import find

    model, ids = tiny.BUILDERS["bert"](), torch.arange(5, 13)[None]
    padded = {"input_ids": torch.cat([ids, ids.new_zeros(1, 24)], 1), "attention_mask": torch.tensor([[1] * 8 + [0] * 24])}
    found = {}
    for name, batch in (("alone", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), ("padded", padded)):
        chosen = {path: site for path, (site, _) in find(model, "all-linear", ("linear",)).items()}
        score(model, chosen, lambda model, batch=batch: model(**batch), ("moments", "inputs"))
        found[name] = {path: (site.moments, site.inputs) for path, site in chosen.items()}
    for path, each in found["alone"].items():
        for a, b in zip(each, found["padded"][path], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
