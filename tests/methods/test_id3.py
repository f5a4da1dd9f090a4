"""ID³: the budget is spent once, what is masked stays, growing leaves the optimiser right, and a run resumes."""

import copy

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.engine.model import adapters


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Tanh(), nn.LayerNorm(8, dtype=dtype), nn.Linear(8, 3, dtype=dtype))


class Run:
    def __init__(self, total, make=lambda p: torch.optim.Adam(p, lr=0.01), model=None, **fields):
        self.model = ts.adapt(model or net(), {"method": "id3", "targets": ["0", "2", "3"], **fields})
        self.optimizer, self.stages, self.t = make(ts.trainable(self.model).values()), ts.stages(self.model, total), 0

    def go(self, steps):
        for _ in range(steps):
            x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(self.t))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.stages.before_step(self.optimizer)
            self.optimizer.step()
            self.stages.step()
            self.t += 1
        return self

    @property
    def count(self):
        return sum(len(v) for a in adapters(self.model, "default").values() for v in a.v.values())

    @property
    def chosen(self):
        return {(path, name, i) for path, a in adapters(self.model, "default").items() for name in a.v for i in a.index(name).tolist()}


def test_the_budget_is_spent_in_equal_parts_and_no_more():
    run, before = Run(7, budget=25), set()
    for expected in (4, 8, 12, 16, 19, 22, 25, 25, 25):
        run.go(1)
        assert run.count == expected == len(run.chosen) and before <= run.chosen
        before = run.chosen
    few = Run(10, budget=3)
    assert [few.go(1).count for _ in range(10)] == [1, 2, 3] + [3] * 7


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, weight_decay=0)])
def test_steps_are_those_of_masked_dense_training(make):
    run, dense = Run(6, make, budget=20, exp=2, eps=0.01), net()
    optimizer, masks = make(dense.parameters()), {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in dense.named_parameters()}
    for t in range(6):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        dense(x).square().mean().backward()
        named = dict(dense.named_parameters())
        scores = torch.cat([(p.grad.abs() / (p.abs() + 0.01) ** 2).detach().flatten().masked_fill(masks[n], -1) for n, p in named.items()])
        chosen = torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, scores.topk(4 if t < 2 else 3).indices, True)
        for (n, p), part in zip(named.items(), chosen.split([p.numel() for p in named.values()]), strict=True):
            masks[n] |= part
            p.grad.mul_(masks[n].view_as(p))
        optimizer.step()
        run.go(1)
    ts.merge(run.model)
    for name, p in dense.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name).detach(), p.detach())


def test_a_step_without_the_choice_is_refused():
    run = Run(3, budget=5)
    with pytest.raises(ts.TunesmithError, match=r"stages\.before_step\(optimizer\)"):
        run.stages.step()


def test_resumes_as_if_nothing_had_happened():
    whole = Run(8, budget=20).go(8)
    first = Run(8, budget=20).go(3)
    saved = copy.deepcopy({"stages": first.stages.state_dict(), "optimizer": first.optimizer.state_dict(), "parameters": {n: p.detach() for n, p in ts.trainable(first.model).items()}})
    second = Run(8, budget=20)
    second.stages.load_state_dict(saved["stages"])
    with torch.no_grad():
        for name, p in ts.trainable(second.model).items():
            p.copy_(saved["parameters"][name])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.t = 3
    second.go(5)
    assert second.chosen == whole.chosen
    assert all(torch.equal(p, ts.trainable(whole.model)[name]) for name, p in ts.trainable(second.model).items())


def test_saves_and_loads_what_has_grown(tmp_path):
    run = Run(4, budget=10).go(4)
    ts.save(run.model, tmp_path / "a")
    again, x = ts.load(net(), tmp_path / "a"), torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(again(x), run.model(x)) and ts.summary(again).trainable == 10
    ts.save(Run(4, budget=10).model, tmp_path / "none")
    assert ts.summary(ts.load(net(), tmp_path / "none")).trainable == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "convnet"])
def test_grows_in_real_architectures(kind):
    model, batch = tiny.BUILDERS[kind](), tiny.batch(kind)
    first = next(iter(batch.values()))
    ts.adapt(model, ts.ID3(budget=30))
    optimizer, stages = optim.build(model, lr=1e-2), ts.stages(model, 3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        out = model(**batch).logits if hasattr(model, "config") else model(first)
        loss = out.square().mean()
        loss.backward()
        stages.before_step(optimizer)
        optimizer.step()
        stages.step()
        losses.append(loss.item())
    assert ts.summary(model).trainable == 30 and losses[-1] < losses[0]


def test_over_another_method():
    model = ts.adapt(net(), {"method": "id3", "over": {"method": "lora", "rank": 4}, "budget": 12, "targets": ["0", "3"]})
    parameters = list(ts.trainable(model).values())
    before = [p.detach().clone() for p in parameters]
    optimizer, stages = torch.optim.Adam(parameters, lr=0.01), ts.stages(model, 4)
    for t in range(5):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        stages.before_step(optimizer)
        optimizer.step()
        stages.step()
    assert sum(int((p != b).sum()) for p, b in zip(parameters, before, strict=True)) <= 12
    assert sum(int(m.sum()) for m in next(iter(stages.parts.values())).masks) == 12
    with pytest.raises(ts.TunesmithError, match="needs a budget"):
        ts.adapt(net(), {"method": "id3", "over": "lora", "targets": ["0"]})
