"""What IST promises: which layers train, that the others rest, and that a run can be cut anywhere."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.engine.model import hubs
from tunesmith.schedule.ist import IST, ISTStage, credit, parse


def net(layers=8):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(x):
        for layer in model.layers:
            x = x + torch.tanh(layer(x))
        return x

    model.forward = forward
    return ts.adapt(model, {"method": "lora", "rank": 2, "targets": ["layers.*"]})


def parameters(model, layer):
    return list(hubs(model)[f"layers.{layer}"].adapters["default"].parameters())


def test_only_chosen_layers_change_and_the_others_not_by_a_bit():
    model = net()
    trained = ts.trainable(model)
    optimizer = optim.build(model, lr=1e-2, weight_decay=0.1)
    x, y = torch.randn(32, 16), torch.randn(32, 16)

    def probe(index):
        with torch.no_grad():
            return (model.forward(x) - y).square().mean().item()

    stages = ts.stages(model, 60, IST(interval=4), probe)
    stage, chosen = stages.parts["selection"], set()
    for _ in range(60):
        before = {name: p.detach().clone() for name, p in trained.items()}
        active = stage.active
        assert len(active) == 2 and {i for i in range(8) if parameters(model, i)[0].requires_grad} == set(active)
        loss = (model.forward(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {int(name.split(".")[1]) for name, p in trained.items() if not torch.equal(p, before[name])}
        assert moved <= set(active)
        chosen |= set(active)
        stages.step()
    assert chosen == set(range(8)) and stage.I.abs().max() > 0 and stage.updates == 15
    assert all(hub.gate == 1 for hub in hubs(model).values())


def test_a_stage_goes_on_from_its_state():
    models = [net(), net()]
    one, two = (ISTStage(IST(interval=2), model, lambda i: 1.0 + i, seed) for model, seed in zip(models, (0, 5), strict=True))
    for _ in range(7):
        one.step()
    two.load_state_dict(one.state_dict())
    assert [p.requires_grad for p in models[0].parameters()] == [p.requires_grad for p in models[1].parameters()]
    for _ in range(7):
        one.step(), two.step()
        assert one.active == two.active and torch.equal(one.I, two.I)


def test_credit():
    I = torch.tensor([0.0, 1.0, -1.0, 0.5])
    assert torch.equal(credit(I, [[0, 1], [0, 1], [0, 1]], [0.1, 0.2, 0.3], 10.0)[2:], I[2:])  # in no set
    in_all = credit(I, [[0, 1], [0, 2], [0, 3]], [0.1, 0.2, 0.3], 10.0)
    assert in_all[0].abs() < 1e-12 and in_all[1] > I[1] and in_all[3] < I[3]
    torch.testing.assert_close(credit(I, [[0], [1], [2]], [0.7, 0.7, 0.7], 10.0), I)


def test_what_does_not_matter_is_trained_less():
    """Layers whose adapters only harm are suppressed more."""
    model = net()
    x = torch.randn(64, 16)
    with torch.no_grad():
        for i in (0, 1, 2, 3):
            for p in parameters(model, i):
                p.normal_(std=0.5)
        with ts.disabled(model):
            y = model.forward(x)

    def probe(index):
        with torch.no_grad():
            return (model.forward(x) - y).square().mean().item()

    stage = ISTStage(IST(interval=1, factor=0.0), model, probe)
    for _ in range(60):
        stage.step()
    assert stage.I[:4].min() > stage.I[4:].max()


def test_inclusion_follows_importance():
    stage = ISTStage(IST(), net())
    stage.I = torch.linspace(5, -5, 8)
    counts = torch.zeros(8)
    for _ in range(1000):
        stage.choose()
        counts[stage.active] += 1
    assert counts[-1] > counts[4] > counts[0]


def test_a_model_of_two_layers_and_of_one():
    stage = ISTStage(IST(interval=1, probes=5), net(2), lambda i: 1.0)
    stage.step()
    assert stage.updated == 1 and stage.suppressed == 1
    with pytest.raises(ts.TunesmithError, match="of which this model has 1"):
        ISTStage(IST(), net(1))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora", "series-adapter", "shira"])
def test_methods_and_models(kind, method):
    model = ts.adapt(tiny.BUILDERS[kind](), method)
    stage = ISTStage(IST(), model)
    assert len(stage.hubs) == 2 and sum(p.requires_grad for p in model.parameters()) == len(stage.parameters[stage.active[0]])


def test_recipes_name_it():
    assert parse("ist") == IST() and parse("rst").interval is None and parse({"selection": "ist", "update": 0.5}).update == 0.5
    for value, match in (("lisa", "unknown selection 'lisa'"), ({"selection": "ist", "updates": 1}, "no field 'updates' .*update"), ({"selection": "ist", "update": 2}, "update=2")):
        with pytest.raises(ts.TunesmithError, match=match):
            parse(value)
