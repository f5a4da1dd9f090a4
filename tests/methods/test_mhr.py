"""Poly and MHR: mixing by task, counts, optimiser groups, new tasks."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.engine.model import adapters
from tunesmith.methods import mhr
from tunesmith.train.prepare import prepare


def stirred(model, seed=1, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def one(config=None, seed=0, **fields):
    """(model, its adapter, input of 6 rows)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 8, dtype=torch.float64))
    config = config or ts.MHR(**{"n_tasks": 3, "n_skills": 5, "n_splits": 4, "rank": 2} | fields)
    return stirred(ts.adapt(model, config, targets=["0"])), model[0].tunesmith.adapters["default"], torch.randn(6, 7, 12, dtype=torch.float64)


def alone(model, x, task):
    with ts.tasks(model, [task]):
        return model(x)


D, FF = 2048, 5120
T5_XL = 24 * ([(D, D)] * 4 + [(D, FF)] * 2 + [(FF, D)]) + 24 * ([(D, D)] * 8 + [(D, FF)] * 2 + [(FF, D)])


@pytest.mark.parametrize("config,total", [
    (ts.LoRA(rank=1), 2_211_840),  # what MHR-μ leaves
    (ts.Poly(variant="z"), 3_456), (ts.MHR(n_splits=64, variant="z"), 221_184),
    (ts.Poly(), 17_694_720 + 3_456), (ts.MHR(n_splits=64), 17_694_720 + 221_184), (ts.MHR(n_skills=16, n_splits=8), 2 * 17_694_720 + 432 * 128),
    (ts.MHR(n_splits=64, variant="z", n_tasks=313), 313 * 221_184), (ts.Poly(variant="z", n_tasks=313), 313 * 3_456),
])  # fmt: skip
def test_counts_of_the_paper(config, total):
    assert len(T5_XL) == 432
    assert sum(config.count(SimpleNamespace(in_features=i, out_features=o)) for i, o in T5_XL) == total


def test_defaults_are_the_papers():
    poly, heads = ts.Poly(), ts.MHR()
    assert (poly.rank, poly.alpha, poly.n_skills, poly.n_splits, poly.n_tasks, poly.relaxed_bernoulli) == (1, 1, 8, 1, 1, False)
    assert heads.n_splits == 8 and heads.n_skills == 8


def test_start():
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(nn.Linear(300, 200)), ts.MHR(n_splits=4, n_tasks=2), targets=["0"])
    a, bound = model[0].tunesmith.adapters["default"], 1 / (3 * 300) ** 0.5
    assert 0.95 * bound < a.A.abs().max() <= bound and a.B.abs().max() == 0 and 5e-4 < a.Z.abs().max() <= 1e-3
    torch.testing.assert_close(a.weights([0, 1]), torch.full((2, 4, 8), 1 / 8), atol=1e-3, rtol=0)


def test_rows_of_a_batch_are_those_of_each_task_alone():
    model, a, x = one()
    torch.testing.assert_close(a.weights([0, 2]).sum(-1), torch.ones(2, 4, dtype=torch.float64))
    for x in (x, x[:, 0]):  # noqa: B020
        each = [alone(model, x, task) for task in range(3)]
        assert not torch.allclose(each[0], each[1])
        for ids in ([0, 0, 0, 0, 0, 0], [2, 0, 1, 1, 2, 0], [1, 2], [0, 2, 0]):
            with ts.tasks(model, torch.tensor(ids)):
                y = model(x)
            full = [task for task in ids for _ in range(6 // len(ids))]
            torch.testing.assert_close(y, torch.stack([each[task][row] for row, task in enumerate(full)]))
    with pytest.raises(ts.TunesmithError, match="4 task ids met a batch of 6 rows"), ts.tasks(model, [0, 1, 2, 0]):
        model(x)


def test_skills_are_averaged_before_they_are_multiplied():
    model, a, x = one(n_splits=1)
    A, B = a.blend(a.weights([1]))
    w = torch.sigmoid(a.Z[1]) / torch.sigmoid(a.Z[1]).sum()
    torch.testing.assert_close(A[0].T, torch.einsum("s,sdr->dr", w, a.A[0]))
    torch.testing.assert_close(alone(model, x, 1), F.linear(x, model[0].weight, model[0].bias) + 0.5 * x @ A[0].T @ B[0].T)
    products = sum(w[s] * a.A[0, s] @ a.B[0, s] for s in range(5))
    assert not torch.allclose(A[0].T @ B[0].T, products)


def test_the_same_weights_mix_block_q_of_a_and_of_b():
    model, a, x = one()
    w = a.weights([2])[0]
    A = torch.cat([sum(w[q, s] * a.A[q, s] for s in range(5)) for q in range(4)])
    B = torch.cat([sum(w[q, s] * a.B[q, s] for s in range(5)) for q in range(4)], 1)
    torch.testing.assert_close(alone(model, x, 2), F.linear(x, model[0].weight, model[0].bias) + 0.5 * x @ A @ B)


def test_invariants():
    heads, h, x = one()
    with torch.no_grad():  # the same weights in every block: Poly
        h.Z.copy_(h.Z.view(3, 4, 5)[:, :1].expand(3, 4, 5).reshape(3, 20))
    poly, p, _ = one(n_splits=1)
    with torch.no_grad():
        p.A.copy_(h.A.movedim(0, 1).reshape(1, 5, 12, 2)), p.B.copy_(h.B.permute(1, 2, 0, 3).reshape(1, 5, 2, 8)), p.Z.copy_(h.Z[:, :5])
        poly[0].load_state_dict({k: v for k, v in heads[0].state_dict().items() if "tunesmith" not in k}, strict=False)
    torch.testing.assert_close(alone(poly, x, 2), alone(heads, x, 2))
    # equal skills: routing has no effect and no gradient
    model, a, x = one()
    with torch.no_grad():
        a.A.copy_(a.A[:, :1].expand_as(a.A)), a.B.copy_(a.B[:, :1].expand_as(a.B))
    torch.testing.assert_close(alone(model, x, 0), alone(model, x, 1))
    alone(model, x, 0).square().mean().backward()
    assert a.Z.grad.abs().max() < 1e-12 < a.A.grad.abs().max()
    # one skill: LoRA, however many blocks
    model, a, x = one(n_skills=1)
    lora = a.A[:, 0].flatten(0, 1) @ a.B[:, 0].movedim(0, 1).flatten(1)
    torch.testing.assert_close(alone(model, x, 1), F.linear(x, model[0].weight, model[0].bias) + 0.5 * x @ lora)


def test_tasks_that_are_not_in_the_batch_get_no_gradient():
    model, a, x = one()
    with ts.tasks(model, [0, 2, 0]):
        model(x).square().mean().backward()
    assert (a.Z.grad.abs().sum(1) > 0).tolist() == [True, False, True]
    with ts.tasks(model, [0, 2, 0]):
        torch.testing.assert_close(a.Z.grad, torch.autograd.grad(sum(alone(model, x[i : i + 2], t).square().sum() for i, t in ((0, 0), (2, 2), (4, 0))) / 6 / 7 / 8, a.Z)[0])


def test_each_task_merges():
    model, _, x = one()
    each = [alone(model, x, task) for task in range(3)]
    for match, ids in (("routes by task", None), ("takes one matrix", [0, 1])):
        with pytest.raises(ts.TunesmithError, match=match), ts.tasks(model, ids) if ids else nullcontext():
            ts.merge(model)
    for task in range(3):
        with ts.tasks(model, [task]):
            ts.merge(model)
        torch.testing.assert_close(model(x), each[task])
        ts.unmerge(model)
    assert torch.equal(alone(model, x, 1), each[1])


def test_other_layers_route_too():
    ids, x = torch.tensor([1, 0, 2]), tiny.batch("convnet")["pixel_values"]
    model = stirred(ts.adapt(tiny.tiny_convnet(), ts.MHR(n_tasks=3), targets=["3"]))
    with ts.tasks(model, ids):
        y = model(x)
    torch.testing.assert_close(y, torch.cat([alone(model, x[i : i + 1], task) for i, task in enumerate(ids)]))
    assert len({tuple(alone(model, x[:1], task)[0].tolist()) for task in range(3)}) == 3
    batch = tiny.batch("llama")
    model = stirred(ts.adapt(tiny.tiny_llama(), ts.Poly(n_tasks=3), targets=["embed_tokens"]))
    with ts.tasks(model, ids):
        y = model(**batch).logits
    with ts.tasks(model, [0]):
        torch.testing.assert_close(y[1], model(**batch).logits[1], atol=1e-5, rtol=1e-5)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = stirred(ts.adapt(nn.Sequential(attention), ts.Poly(n_tasks=2), targets=["in_proj"]))
    x = torch.randn(4, 3, 8)
    with ts.tasks(model, [1]):
        one_task = attention(x, x, x)[0]
    with ts.tasks(model, [0]):
        assert not torch.allclose(attention(x, x, x)[0], one_task)
    with pytest.raises(ts.TunesmithError, match="'0.in_proj' takes one matrix"), ts.tasks(model, [0, 1]):
        attention(x, x, x)


def test_what_is_refused():
    model, _, x = one()
    with pytest.raises(ts.TunesmithError, match="'0' routes by task and knows 3.*with tunesmith.tasks.*0 to 2"):
        model(x)
    for ids, wrong in (([0, 3], 3), ([-1], -1)):
        with pytest.raises(ts.TunesmithError, match=f"knows the tasks 0 to 2, and a row of the batch is of task {wrong}"), ts.tasks(model, ids):
            model(x)
    with pytest.raises(ts.TunesmithError, match="mhr: n_splits=8 cannot cut '0' .12 inputs, 9 outputs"):
        ts.adapt(nn.Sequential(nn.Linear(12, 9)), "mhr", targets=["0"])
    with pytest.raises(ts.TunesmithError, match="poly: variant='z' routes skills that are trained already"):
        ts.adapt(tiny.tiny_llama(), ts.Poly(variant="z"))
    with pytest.raises(ts.TunesmithError, match="n_tasks=0 is not valid"):
        ts.Poly(n_tasks=0)
    single, _, x = one(ts.Poly())
    assert torch.equal(single(x), alone(single, x, 0))


def test_the_tasks_of_the_data():
    assert ts.Poly().for_tasks(4).n_tasks == 4 and ts.Poly(n_tasks=6).for_tasks(4).n_tasks == 6 and ts.Poly().for_tasks(0).n_tasks == 1
    assert ts.LoRA().for_tasks(3) == ts.LoRA()
    with pytest.raises(ts.TunesmithError, match="n_tasks=2 is fewer than the 3 tasks of the data"):
        ts.Poly(n_tasks=2).for_tasks(3)
    with pytest.raises(ts.TunesmithError, match="mhr: n_tasks=2 and the data name no tasks"):
        ts.MHR(n_tasks=2).for_tasks(0)


def test_the_routing_has_its_own_rate_and_no_weight_decay():
    model, a, _ = one()
    groups = {id(p): g for g in optim.build(model, lr=1e-3, weight_decay=0.1).param_groups for p in g["params"]}
    assert groups.keys() == {id(a.A), id(a.B), id(a.Z)}
    assert (groups[id(a.Z)]["lr"], groups[id(a.Z)]["weight_decay"]) == (pytest.approx(0.1), 0)
    assert (groups[id(a.A)]["lr"], groups[id(a.A)]["weight_decay"]) == (1e-3, 0.1)


def test_relaxed_bernoulli_draws_for_each_row_while_training():
    model, a, x = one(relaxed_bernoulli=True)
    x = x[:1].expand(6, 7, 12)
    quiet = alone(model.eval(), x, 1)
    torch.testing.assert_close(quiet[0], quiet[5])
    noisy = alone(model.train(), x, 1)
    assert not torch.allclose(noisy[0], noisy[5]) and not torch.allclose(noisy, quiet)
    assert torch.isfinite(mhr.logistic(torch.empty(100_000))).all() and 1.7 < mhr.logistic(torch.empty(100_000)).std() < 1.93  # π/√3
    with ts.tasks(model, [1]):
        torch.testing.assert_close(ts.merge(model)(x), quiet)
    single, _, x = one(ts.Poly(relaxed_bernoulli=True))
    rows = single.train()(x[:1].expand(6, 7, 12))
    assert not torch.allclose(rows[0], rows[5])
    flat = single(x[:1, :1].expand(6, 1, 12)[:, 0])
    torch.testing.assert_close(flat[0], flat[5])


def test_gradient_checkpointing():
    batch, seen = tiny.batch("llama"), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare(stirred(ts.adapt(tiny.tiny_llama(), ts.MHR(n_tasks=2, relaxed_bernoulli=True)), size=0.1), checkpointing)
        torch.manual_seed(5)
        with ts.tasks(model, [0, 1, 1]):
            model(**batch).logits.square().mean().backward()
        seen.append({path: p.grad for path, p in ts.trainable(model).items()})
    for path, grad in seen[0].items():
        torch.testing.assert_close(seen[1][path], grad, atol=1e-6, rtol=1e-4)


def test_with_other_adapters():
    model, _, x = one()
    ts.adapt(model, ts.LoRA(init="gaussian"), name="below", targets=["0"])
    with torch.no_grad():
        model[0].tunesmith.adapters["below"].B.normal_()
        base = F.linear(x, model[0].weight, model[0].bias)
        below = model(x)
        with ts.tasks(model, [0, 1, 2]):
            ts.activate(model, "default")
            change = model(x) - base
            ts.activate(model, ["below", "default"])
            torch.testing.assert_close(model(x), below + change)
        with ts.tasks(model, [0, 1, 2, 0, 1, 2]), ts.mixed(model, ["below", "default", None, "default", "below", "default"]):
            rows = model(x)
        ts.activate(model, "default")
        with ts.tasks(model, [0, 1, 2, 0, 1, 2]):
            expected = model(x)
    torch.testing.assert_close(rows[[1, 3, 5]], expected[[1, 3, 5]])
    torch.testing.assert_close(rows[[0, 4]], below[[0, 4]])
    torch.testing.assert_close(rows[2], base[2])


def start_of_new_tasks(model, x):
    """The model with the plain average of the skills."""
    a = model[0].tunesmith.adapters["default"]
    A, B = a.A.mean(1).flatten(0, 1), a.B.mean(1).movedim(0, 1).flatten(1)
    return F.linear(x, model[0].weight, model[0].bias) + a.scale * x @ A @ B


def test_new_tasks_start_from_the_average_of_the_skills():
    for variant, count, names in (("full", 12 * 2 * 5 + 8 * 2 * 5 + 20, "ABZ"), ("z", 20, "Z"), ("mu", 2 * (12 + 8), "AB")):
        model, old, x = one()
        expected = start_of_new_tasks(model, x)
        ts.few_shot(model, variant=variant)
        torch.testing.assert_close(model(x), expected, atol=0.02 * expected.std().item(), rtol=0)
        assert ts.summary(model).trainable == count and "".join(sorted(n.split(".")[-1] for n in ts.trainable(model))) == names
        adapter = model[0].tunesmith.adapters["default"]
        assert variant == "mu" or (torch.equal(adapter.A, old.A) and adapter.Z.shape == (1, 20) and adapter.Z.abs().max() <= 1e-3)
        optimizer = optim.build(model, lr=1e-2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model(x).square().mean().backward()
        optimizer.step()
        changed = {k.split(".")[-1] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == set(names)
        y = model(x)
        torch.testing.assert_close(ts.merge(model)(x), y)
    assert isinstance(model.__dict__["_tunesmith"].records["default"].config, ts.LoRA)


@pytest.mark.parametrize("variant", ["z", "mu", "full"])
def test_new_tasks_of_a_whole_model_are_saved_and_loaded(variant, tmp_path):
    batch = tiny.batch("bert")
    method = ts.MHR(n_tasks=4, n_skills=3, n_splits=4, modules_to_save=["classifier"], targets={"query": {}, "value": {"n_skills": 2}, "dense": {"method": "lora"}})
    model = stirred(ts.adapt(tiny.tiny_bert(), method), size=0.1)
    ts.adapt(model, "lora", name="other")
    head = model.classifier.tunesmith.adapters["default"]
    ts.few_shot(model, variant=variant, n_tasks=2)
    assert model.classifier.tunesmith.adapters["default"] is head and set(model.__dict__["_tunesmith"].records) == {"other", "default"}
    stirred(model, seed=3, size=0.1)
    ts.save(model, tmp_path / "a")
    other = ts.load(tiny.tiny_bert(), tmp_path / "a")
    assert ts.trainable(other).keys() == ts.trainable(model).keys()
    values = [a for p, a in adapters(other, "default").items() if p.endswith("value")]
    assert variant == "mu" or all(a.A.shape[1] == 2 and a.Z.shape == (2, 8) for a in values)
    for ids in ([0], [1]):
        with ts.tasks(model, ids), ts.tasks(other, ids):
            assert torch.equal(other(**batch).logits, model(**batch).logits)
    if variant == "mu":
        ts.save(ts.adapt(stirred(ts.few_shot(ts.adapt(tiny.tiny_llama(), "poly"), variant="mu")), "lora", name="b"), tmp_path / "b", "default", format="peft")


def test_few_shot_refuses_what_it_cannot_start_from():
    model = ts.adapt(tiny.tiny_llama(), "lora")
    with pytest.raises(ts.TunesmithError, match="'default' .lora. has no skills"):
        ts.few_shot(model)
    with pytest.raises(ts.TunesmithError, match="no adapter named 'x'"):
        ts.few_shot(model, "x")
    model, adapter, _ = one()
    with pytest.raises(ts.TunesmithError, match="no variant 'Z'.*'z', 'mu' and 'full'"):
        ts.few_shot(model, variant="Z")
    with pytest.raises(ts.TunesmithError, match="n_tasks=0 is not valid"):
        ts.few_shot(model, n_tasks=0)
    assert model[0].tunesmith.adapters["default"] is adapter


def linear_tasks(count, generator, d=16, skills=3, blocks=4):
    """(x, y) of `count` tasks whose changes are block-wise choices among common factors of rank 2."""
    U, V = torch.randn(blocks, skills, d // blocks, 2, generator=generator), torch.randn(blocks, skills, 2, d // blocks, generator=generator)
    found = []
    for _ in range(count):
        pick = torch.randint(skills, (blocks,), generator=generator)
        change = torch.cat([U[q, s] for q, s in enumerate(pick)]) @ torch.cat([V[q, s] for q, s in enumerate(pick)], 1) / 4
        x = torch.randn(32, d, generator=generator)
        found.append((x, x @ change))
    return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


def fit(model, x, y, ids, steps, lr):
    optimizer = optim.build(model, lr=lr)
    for _ in range(steps):
        with ts.tasks(model, ids):
            loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_heads_fit_tasks_made_of_blocks_best_and_help_new_ones():
    generator = torch.Generator().manual_seed(0)
    x, y = linear_tasks(12, generator)
    methods = {"mhr": ts.MHR(n_splits=4, n_skills=3, rank=2, n_tasks=10), "poly": ts.Poly(n_skills=3, rank=2, n_tasks=10), "shared": ts.Poly(n_skills=1, rank=2, n_tasks=10)}
    losses, models = {}, {}
    for name, method in methods.items():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 16))
        nn.init.zeros_(base[0].weight), nn.init.zeros_(base[0].bias)
        models[name] = ts.adapt(base, method.model_copy(update={"router_lr_ratio": 5.0}), targets=["0"])
        losses[name] = fit(models[name], x[:10], y[:10], list(range(10)), 200, 2e-2)
    assert losses["mhr"] < 0.8 * losses["poly"] and losses["poly"] < 0.9 * losses["shared"]
    untouched = y[10:].square().mean().item()
    ts.few_shot(models["mhr"], variant="z", n_tasks=2)
    assert fit(models["mhr"], x[10:, :16], y[10:, :16], [0, 1], 60, 2e-2) < 0.8 * untouched
