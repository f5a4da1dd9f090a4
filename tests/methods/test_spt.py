"""SPT: the budget, where modules land, and what trains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs, record_of
from tunesmith.methods.spt import Candidate, choose, ranked

MIXED = {"budget": 1200, "rank": 2, "ease": 2, "vector_ease": 2}  # modules, single entries and vectors
METHODS = pytest.mark.parametrize("method", ["spt-lora", "spt-adapter"])


def backward(model):
    model(**tiny.batch("bert")).logits.square().mean().backward()


def adapted(method="spt-lora", **fields):
    return ts.adapt(tiny.tiny_bert(), {"method": method, **fields}, calibrate=backward)


def stir(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logits(model):
    return model(**tiny.batch("bert")).logits


@METHODS
@pytest.mark.parametrize("budget", [50, 500, 1500])
def test_the_budget_is_nearly_met_and_counted(method, budget):
    model = adapted(method, budget=budget, rank=2, ease=1, vector_ease=1)
    total = ts.summary(model).trainable
    assert total == sum(p.numel() for p in ts.trainable(model).values()) and 0.7 * budget < total < 1.3 * budget


def test_the_default_budget_is_of_the_base_alone():
    single = {"ease": 1e-6, "vector_ease": 1e-6}
    model = adapted(**single)
    first, base = ts.summary(model).trainable, sum(p.numel() for p in tiny.tiny_bert().parameters())
    assert first == base // 200
    ts.adapt(model, ts.LoRA(rank=64), name="wide")
    assert ts.summary(ts.adapt(model, ts.SPTLoRA(**single), name="again", calibrate=backward)).trainable == first


@METHODS
def test_starts_as_the_base_and_loads(method, tmp_path):
    model = adapted(method, **MIXED)
    layers = adapters(model, "default").values()
    assert any(a.module for a in layers) and any(hasattr(a, "v") for a in layers) and any(a.vectors for a in layers)
    assert not any(config._chosen for config in record_of(model, "default").sites.values())
    torch.testing.assert_close(logits(model), logits(tiny.tiny_bert()))
    expected = logits(stir(model))
    ts.save(model, tmp_path / "a")
    assert torch.equal(logits(ts.load(tiny.tiny_bert(), tmp_path / "a")), expected)
    if method == "spt-lora":
        torch.testing.assert_close(logits(ts.merge(model)), expected)
    else:
        with pytest.raises(ts.TunesmithError, match="an adapter with an activation follows the layer"):
            ts.merge(model)


def test_single_entries_of_spt_adapter_merge():
    model = stir(adapted("spt-adapter", budget=300, ease=1e-6, vector_ease=1e-6))
    assert not any(a.module for a in adapters(model, "default").values())
    expected = logits(model)
    torch.testing.assert_close(logits(ts.merge(model)), expected)


def test_ranks_are_exact_with_ties_to_the_earlier():
    scores = [torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(n)).float() for n in (10, 30, 0, 20)]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([len(s) for s in scores]))
    order = owner[torch.cat(scores).sort(descending=True, stable=True).indices]
    for most in (1, 7, 20, 59, 60, 100):
        assert torch.equal(ranked(scores, most), order[:most])


def test_hits_grow_with_tau_and_of_two_totals_as_near_the_larger_is_taken():
    (site,) = ts.engine.sites.sites(nn.Sequential(nn.Linear(5, 4)))
    scores = {"weight": torch.rand(20, generator=torch.Generator().manual_seed(0)), "bias": torch.rand(4, generator=torch.Generator().manual_seed(1))}
    candidates = [Candidate(ts.SPTLoRA(ease=0.01, vector_ease=0.01), site, name, s) for name, s in scores.items()]
    hits = [[count for count, _ in choose(candidates, [tau], 1)[1]] for tau in range(1, 25)]
    assert [sum(each) for each in hits] == list(range(1, 25)) and all(a <= b for x, y in zip(hits, hits[1:], strict=False) for a, b in zip(x, y, strict=True))
    assert choose(candidates, [4, 8], 6)[0] == 8


@pytest.mark.parametrize("hits,ease,plan", [(11, 1, (11, False)), (27, 1, (18, True)), (18, 1, (18, True)), (1, 18, (18, True)), (0, 100, (0, False))])
def test_a_module_where_there_are_enough_hits(hits, ease, plan):
    (site,) = ts.engine.sites.sites(nn.Sequential(nn.Linear(5, 4)))
    assert Candidate(ts.SPTLoRA(rank=2, ease=ease), site, "weight", torch.zeros(20)).plan(hits) == plan
    adapter = Candidate(ts.SPTAdapter(rank=2, ease=1), site, "weight", torch.zeros(20))
    assert adapter.plan(22) == (2 * 2 * 4 + 2 + 4, True) and adapter.plan(21) == (21, False)
    assert Candidate(ts.SPTLoRA(), site, "bias", torch.zeros(4)).plan(1) == (4, True)


def test_chosen_entries_are_the_most_sensitive_ones():
    model, dense = adapted(budget=400, ease=0.5, vector_ease=0.5), tiny.tiny_bert()
    backward(dense)
    kept, left = [], []
    for path, module in dense.named_modules():
        layer = hubs(model)[path].adapters["default"] if path in hubs(model) else None
        if path.startswith("classifier") or not isinstance(module, nn.Linear | nn.LayerNorm):
            continue
        for name, p in module.named_parameters():
            matrix = p.dim() == 2
            scores, chosen = p.grad.square().flatten(), torch.zeros(p.numel(), dtype=torch.bool)
            if layer is not None and (hasattr(layer, "v") if matrix else name in layer.vectors):
                chosen[getattr(layer, "index" if matrix else f"index_{name}").long()] = True
            if not chosen.all() and not (matrix and layer is not None and layer.module):
                kept.append(scores[chosen])
                left.append(scores[~chosen])
    assert torch.cat(kept).min() >= torch.cat(left).max()


def test_an_entrys_gradient_is_the_dense_one():
    model, dense = adapted(budget=300, ease=1, vector_ease=1), tiny.tiny_bert()
    backward(model)
    backward(dense)
    seen = 0
    for path, hub in hubs(model).items():
        adapter = hub.adapters["default"]
        trained = {name: (v, f"index_{name}") for name, v in adapter.vectors.items()} | ({"weight": (adapter.v, "index")} if hasattr(adapter, "v") else {})
        for name, (v, index) in trained.items():
            torch.testing.assert_close(v.grad, dense.get_parameter(f"{path}.{name}").grad.flatten()[getattr(adapter, index).long()])
            seen += 1
    assert seen > 1


def test_a_head_at_zero_tells_nothing():
    model = tiny.tiny_bert()
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ts.TunesmithError, match="start the head at random"):
        ts.adapt(model, "spt-lora", calibrate=lambda m: logits(m).sum().backward())
    with pytest.raises(ts.TunesmithError, match="calibrate"):
        ts.adapt(model, "spt-lora")
    assert not hubs(model)


def test_targets_bound_the_choice_and_each_has_its_own_fields():
    fields = {"query": {"rank": 1, "ease": 1e3}, "value": {"rank": 3, "ease": 1e3}}
    model = ts.adapt(tiny.tiny_bert(), ts.SPTLoRA(budget=600, targets=fields), calibrate=backward)
    assert {path.split(".")[-1] for path in hubs(model)} == set(fields)
    for path, config in record_of(model, "default").sites.items():
        layer = adapters(model, "default")[path]
        assert sum(p.numel() for p in layer.parameters()) == config.count(hubs(model)[path].site)
        assert not layer.module or len(layer.D) == fields[path.split(".")[-1]]["rank"]
    assert any(layer.module for layer in adapters(model, "default").values())


def test_beside_another_method_and_again_from_what_was_alloted():
    targets = {"query": {"method": "spt-lora", "budget": 100}, "value": {}}
    model = ts.adapt(tiny.tiny_bert(), {"method": "lora", "targets": targets}, calibrate=backward)
    assert {type(a).__name__ for a in adapters(model, "default").values()} == {"SPTLayer", "LoRALayer"}
    first = adapted(**MIXED)
    filled = next(config for config in record_of(first, "default").sites.values() if config.structured)
    again = ts.adapt(tiny.tiny_bert(), filled, calibrate=backward)
    assert {p: t.shape for p, t in ts.trainable(again).items()} == {p: t.shape for p, t in ts.trainable(first).items()}


class Parts(nn.Module):
    """Three blocks, each with inputs of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(sum(block(part) for block, part in zip(self.blocks, x.chunk(3, -1), strict=True)))


@METHODS
def test_modules_land_where_the_change_is(method):
    torch.manual_seed(0)
    student, batches = Parts(), torch.randn(16, 64, 24)
    teacher = copy.deepcopy(student)
    for layer in (teacher.blocks[1][0], teacher.blocks[1][2]):
        nn.init.normal_(layer.weight, std=0.5)

    def loss(model):
        return F.mse_loss(model(batches), teacher(batches))

    before = loss(student).item()

    def calibrate(model):
        for x in batches:
            F.mse_loss(model(x), teacher(x)).backward()

    ts.adapt(student, {"method": method, "rank": 4, "budget": 250}, calibrate=calibrate)
    modules = [path for path, a in adapters(student, "default").items() if a.module]
    assert modules and all(path.startswith("blocks.1") for path in modules)
    optimizer = torch.optim.Adam(ts.trainable(student).values(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(student).backward()
        optimizer.step()
    assert loss(student).item() < before / 3
