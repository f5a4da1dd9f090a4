"""SoKA: the rearrangement and its decomposition, the choice of ranks, both ways of computing, pruning, counts."""

import copy
from math import isqrt
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests.tiny import tiny_llama
from tunesmith import optim
from tunesmith.methods import svd
from tunesmith.methods.method import divisor
from tunesmith.methods.soka import SoKALayer, elbow, energy_rank, kpsvd, rearranged

close = torch.testing.assert_close


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kron(A, B):
    return sum(torch.kron(a, b) for a, b in zip(A, B, strict=True))


def layer(out=24, size=36, seed=0, dtype=torch.float64, W=None, **fields):
    """A linear layer with the method attached, and its adapter."""
    base = nn.Linear(size, out, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(out, size, seed=seed) if W is None else W)
        base.bias.copy_(normal(out, seed=seed + 1))
    model = ts.adapt(nn.Sequential(base), ts.SoKA(**fields), targets=["0"])
    return model, model[0].tunesmith.adapters["default"]


def stir(adapter, size=0.1):
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(size * normal(*p.shape, seed=i).to(p.dtype))


def test_rearrangement():
    A, B = normal(4, 6), normal(10, 3, seed=1)
    close(rearranged(torch.kron(A, B), 4, 6), torch.outer(A.flatten(), B.flatten()))
    W = normal(40, 18)
    assert torch.linalg.matrix_rank(rearranged(W, 4, 6)) > 1 and torch.equal(rearranged(W.T.contiguous().T, 4, 6), rearranged(W, 4, 6))


def test_truncation_error_and_full_reconstruction():
    W = normal(40, 24)
    S, U, V = kpsvd(W, 4, 6, 99)
    close(kron(S[:, None, None] * U, V), W, atol=1e-13, rtol=0)
    for r in (1, 3, 10):
        close((W - kron(S[:r, None, None] * U[:r], V[:r])).norm(), S[r:].square().sum().sqrt())
        close(kpsvd(W, 4, 6, r)[0], S[:r])
    plain = torch.linalg.svd(W.reshape(24, 40))  # what is not the rearrangement does not give W back
    wrong = kron((plain[1][:, None] * plain[0].T).view(24, 4, 6), plain[2][:24].view(24, 10, 4))
    assert (wrong - W).norm() > W.norm()


def test_large_matrices_go_through_a_random_projection(monkeypatch):
    W = kron(normal(5, 6, 8) * torch.tensor([9.0, 6, 4, 2, 1])[:, None, None], normal(5, 8, 6, seed=1)) + 1e-3 * normal(48, 48, seed=2)
    exact = kpsvd(W, 6, 8, 4)
    monkeypatch.setattr(svd, "EXACT", 10)
    for a, b in zip(exact, kpsvd(W, 6, 8, 4), strict=True):
        close(a, b, atol=1e-6, rtol=1e-6)


def test_ranks_of_worked_spectra():
    S = torch.tensor([10, 6, 3, 1, 0.5, 0.3, 0.2, 0.1])
    assert [energy_rank(S.square(), tau) for tau in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)] == [1, 2, 2, 3, 3, 5]
    assert elbow(S)[0] == 4
    halves = 2.0 ** -torch.arange(1, 11)
    assert [energy_rank(halves.square(), tau) for tau in (0.8, 0.9, 0.95, 0.99)] == [2, 2, 3, 4]
    assert elbow(halves)[0] == 4
    assert energy_rank(torch.tensor([0.5, 0.25, 0.25]), 0.75) == 2  # a tie counts as reached
    assert energy_rank(S.square(), 0.9, total=10 * S.square().sum()) == len(S)
    assert elbow(torch.linspace(9, 1, 9))[1] < 1e-6


def with_terms(count, out=48, size=48):
    """A weight of `count` terms of equal energy above a hundredth of noise."""
    m, n = divisor(out, isqrt(out)), divisor(size, isqrt(size))
    U, _, Vh = torch.linalg.svd(normal(m * n, out * size // (m * n)), full_matrices=False)
    big = kron(U[:, :count].T.unflatten(1, (m, n)), Vh[:count].unflatten(1, (out // m, size // n)))
    noise = normal(out, size, seed=2)
    return big + 0.01 * noise / noise.norm()


@pytest.mark.parametrize("rule", ["energy", "elbow", "both"])
def test_rank_of_each_layer_is_chosen_and_kept(rule, tmp_path):
    def base(weights):
        model = nn.Sequential(*[nn.Linear(48, 48, bias=False) for _ in weights])
        with torch.no_grad():
            [m.weight.copy_(W) for m, W in zip(model, weights, strict=True)]
        return model

    model = ts.adapt(base([with_terms(2), with_terms(5), with_terms(20)]), ts.SoKA(rule=rule, energy=0.999), targets=["0", "1", "2"])
    configs = model._tunesmith.records["default"].sites
    extra = rule == "elbow"  # the elbow is the first point of the floor, one after the last large value
    assert [configs[p].rank for p in "012"] == [2 + extra, 5 + extra, 16]
    assert [len(model[i].tunesmith.adapters["default"].A) for i in range(3)] == [2 + extra, 5 + extra, 16]
    [stir(m.tunesmith.adapters["default"]) for m in model]
    x = normal(4, 48, dtype=torch.float32)
    expected = model(x)
    ts.save(model, tmp_path / "a")
    assert torch.equal(ts.load(base([with_terms(2), with_terms(5), with_terms(20)]), tmp_path / "a")(x), expected)
    other = ts.load(base([with_terms(9)] * 3), tmp_path / "a", force=True)
    assert [len(m.tunesmith.adapters["default"].A) for m in other] == [2 + extra, 5 + extra, 16]


def test_flat_spectra_have_no_elbow():
    config = ts.SoKA(energy=0.5, rule="elbow")
    flat = torch.linspace(1.1, 1, 40).double()
    assert config.choose(flat, flat.square().sum()) == 16 and ts.SoKA(energy=0.2).choose(flat, flat.square().sum()) == 8


def test_energy_may_ask_for_many_terms():
    _, adapter = layer(out=144, size=144, rule="energy", energy=1.0, max_rank=100)
    assert len(adapter.A) == 100


def test_chosen_ranks_load_where_there_are_no_weights(tmp_path):
    model = ts.adapt(tiny_llama(), "soka")
    ts.save(model, tmp_path / "a")
    with torch.device("meta"):
        hollow = copy.deepcopy(tiny_llama()).to("meta")
    with pytest.raises(ts.TunesmithError, match="meta device.*set rank"):
        ts.adapt(hollow, "soka")
    ts.load(hollow, tmp_path / "a")
    assert ts.summary(hollow).trainable == ts.summary(model).trainable


def test_a_layer_of_another_methods_targets_keeps_its_own_rank(tmp_path):
    model = ts.adapt(tiny_llama(), ts.LoRA(targets={"q_proj": {"method": "soka"}, "v_proj": {"rank": 2}}))
    configs = model._tunesmith.records["default"].sites
    assert all((config.rank or 0) > 0 for config in configs.values())
    ts.save(model, tmp_path / "a")
    assert ts.summary(ts.load(tiny_llama(), tmp_path / "a")).trainable == ts.summary(model).trainable


@pytest.mark.parametrize("fields", [{}, {"train_sigma": True}, {"scale": 0.25}, {"scale": 4.0, "train_sigma": True}])
def test_start_is_the_nearest_sum_and_the_base_exactly(fields):
    model, adapter = layer(rank=3, **fields)
    W = model[0].weight.detach()
    S, U, V = kpsvd(W, *adapter.A.shape[1:], 3)
    sigma = adapter.sigma if fields.get("train_sigma") else torch.ones(3)
    close(adapter.scale * kron(sigma[:, None, None] * adapter.A, adapter.B).detach(), kron(S[:, None, None] * U, V))
    if not fields.get("train_sigma"):
        close(adapter.A.detach().flatten(1).norm(dim=1), adapter.B.detach().flatten(1).norm(dim=1))
    else:
        assert sum(p.numel() for p in adapter.parameters()) == 3 * (adapter.A[0].numel() + adapter.B[0].numel() + 1)
        close(adapter.A.detach().flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(adapter.merged(W, None)[0], W)
    for rows in (1, 64):
        x = normal(rows, 36)
        with torch.no_grad(), ts.disabled(model):
            base = model(x)
        close(model(x), base, atol=1e-12, rtol=0)


def test_change_is_that_of_the_sums():
    _, adapter = layer(rank=3)
    A0, B0 = adapter.A.detach().clone(), adapter.B.detach().clone()
    stir(adapter, 1.0)
    close(kron(*adapter.factors()), kron(adapter.A, adapter.B) - kron(A0, B0), atol=1e-12, rtol=0)
    each = torch.stack([(torch.kron(a, b) - torch.kron(c, d)).square().sum() for a, b, c, d in zip(adapter.A, adapter.B, A0, B0, strict=True)])
    close(adapter.energies(), each.detach())


@pytest.mark.parametrize("fields", [{"rank": 3}, {"rank": 2, "init": "zero"}, {"rank": 3, "train_sigma": True, "scale": 2.0}, {"rank": 3, "shape": (12, 2)}, {"rank": 3, "shape": (2, 18)}])
def test_both_ways_of_computing_agree(fields, monkeypatch):
    x, results = normal(2, 5, 36), []
    for by_token in (True, False):
        monkeypatch.setattr(SoKALayer, "_by_token", lambda self, x, way=by_token: way)
        torch.manual_seed(0)
        model, adapter = layer(**fields)
        stir(adapter)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y**2).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in adapter.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)
    close(ts.merge(model)(x), results[0][0])


def test_the_cheaper_way_is_chosen():
    def way(rank, tokens, train, **fields):
        adapter = SoKALayer(ts.SoKA(rank=rank, **fields), site(4096, 4096, device="meta"))
        with torch.set_grad_enabled(train):
            return adapter._by_token(torch.empty(tokens, 4096, device="meta"))

    assert [way(16, tokens, False) for tokens in (1, 31, 32)] == [True, True, False]  # MN / (n·p·(q+m)) = 32
    assert way(1, 512, True) and not way(16, 512, True)
    assert not way(1, 4096, True)  # what lies in between would be larger than the weight


@pytest.mark.parametrize("by_token", [True, False])
def test_backward_keeps_no_matrix_and_no_products(by_token, monkeypatch):
    monkeypatch.setattr(SoKALayer, "_by_token", lambda self, x: by_token)
    model, adapter = layer(out=48, size=36, rank=4, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(normal(40, 36, dtype=torch.float32).requires_grad_())
    own = {model[0].weight.data_ptr(), *(t.data_ptr() for t in adapter.state_dict().values())}
    assert kept and all(t.data_ptr() in own or t.numel() <= 40 * 36 for t in kept)


def test_small_changes_survive_bfloat16():
    model, adapter = layer(out=48, size=48, rank=2, dtype=torch.bfloat16)
    x = normal(1, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        assert adapter._by_token(x) and not adapter.products(x).any()
        adapter.A.mul_(1 + 1e-4)
        exact = x.double() @ kron(*adapter.factors()).double().T
        assert (adapter.products(x).double() - exact).norm() < 0.02 * exact.norm()


def test_start_from_the_gradient():
    base = nn.Sequential(nn.Linear(24, 20, dtype=torch.float64), nn.Tanh(), nn.Linear(20, 3, dtype=torch.float64))
    x, target = normal(16, 24), normal(16, 3, seed=1)

    def run(model):
        ((model(x) - target) ** 2).mean().backward()

    with pytest.raises(ts.TunesmithError, match="calibrate"):
        ts.adapt(base, ts.SoKA(init="gradient"), targets=["0"])
    before = base(x)
    grad = torch.autograd.grad(((before - target) ** 2).mean(), base[0].weight)[0]
    ts.adapt(base, ts.SoKA(init="gradient", rank=2), targets=["0"], calibrate=run)
    close(base(x), before)
    adapter = base[0].tunesmith.adapters["default"]
    S, U, V = kpsvd(grad, *adapter.A.shape[1:], 2)
    close(kron(adapter.A, adapter.B).detach(), kron(S[:, None, None] * U, V) * base[0].weight.norm() / grad.norm())


def test_pruning_puts_the_weakest_terms_back(tmp_path):
    def run(steps, resume=None):
        torch.manual_seed(0)
        model, adapter = layer(rank=6, prune=0.3)
        x, target = normal(32, 36, seed=3), normal(32, 24, seed=4)
        optimizer, stages = optim.build(model, lr=1e-2), ts.stages(model, 8)
        if resume:
            adapter.load_state_dict(resume[0]), optimizer.load_state_dict(resume[1]), stages.load_state_dict(resume[2])
        for _ in range(steps):
            optimizer.zero_grad()
            ((model(x) - target) ** 2).mean().backward()
            optimizer.step()
            stages.step()
        return adapter, [copy.deepcopy(s.state_dict()) for s in (adapter, optimizer, stages)]

    adapter, _ = run(3)
    assert adapter.energies().min() > 0
    adapter, _ = run(8)
    gone = adapter.energies() == 0
    assert 0 < gone.sum() < 6 and torch.equal(adapter.A[gone], adapter.A0[gone]) and torch.equal(adapter.B[gone], adapter.B0[gone])
    _, state = run(5)
    again, _ = run(3, state)
    assert torch.equal(again.A, adapter.A) and torch.equal(again.B, adapter.B)


@pytest.mark.parametrize("fields", [{"init": "zero"}, {"train_sigma": True}, {"init": "zero", "train_sigma": True}])
def test_dropped_terms_change_nothing(fields):
    _, adapter = layer(rank=4, **fields)
    stir(adapter)
    adapter.drop([1, 3])
    energies = adapter.energies()
    assert energies[[1, 3]].max() < 1e-24 < energies[[0, 2]].min()


def test_kernels_stay_whole():
    conv = nn.Conv2d(12, 20, 3)
    model = ts.adapt(nn.Sequential(conv), ts.SoKA(rank=2), targets=["0"])
    A, B = ts.trainable(model).values()
    assert A.shape == (2, 4, 6) and B.shape == (2, 5, 2 * 9)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ts.TunesmithError, match=r"shape \(5, 6\) does not divide '0', 24 outputs and 36 inputs"):
        layer(rank=1, shape=(5, 6))
    _, adapter = layer(out=7, size=36, rank=9)
    assert adapter.A.shape == (6, 1, 6) and adapter.B.shape == (6, 7, 6)


def site(out, size, device="meta"):
    holder = nn.Linear(size, out, bias=False, device=device)
    return ts.engine.sites.Site("x", "linear", holder, holder, "weight")


def test_counts_of_the_paper():
    one = ts.SoKA(rank=1)
    assert [(m := divisor(d, isqrt(d)), d // m) for d in (4096, 11008, 768)] == [(64, 64), (86, 128), (24, 32)]
    assert one.count(site(4096, 4096)) == 8192 == ts.LoRA(rank=1).count(site(4096, 4096))
    seven = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
    assert 32 * sum(one.count(site(*shape)) for shape in seven) == 2_363_392
    assert 32 * 2 * one.count(site(4096, 4096)) == 524_288
    assert ts.SoKA(rank=3, train_sigma=True).count(site(4096, 4096)) == 3 * 8193
    sizes = SimpleNamespace(path="x", kind="linear", out_features=6, in_features=4, parameter=None)
    assert ts.SoKA(rank=99).count(sizes) == 4 * (2 * 2 + 3 * 2)  # no more terms than the smaller factor has entries


def test_svd_start_learns_faster_than_a_start_at_zero():
    """A pretrained sin 2πx, to which 0.3 cos 3πx is to be added, with two terms at each hidden layer."""

    def fit(model, target, lr, steps):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            loss = ((model(x) - target) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 50)[:, None]
    base = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    before = torch.sin(2 * torch.pi * x)
    fit(base, before, 3e-3, 200)
    losses = {}
    for init in ("weight", "zero"):
        model = ts.adapt(copy.deepcopy(base), ts.SoKA(rank=2, init=init), targets=["2", "4"])
        assert ts.summary(model).trainable == 512
        losses[init] = fit(model, before + 0.3 * torch.cos(3 * torch.pi * x), 1e-3, 40)
    assert losses["weight"] < 0.8 * losses["zero"]
