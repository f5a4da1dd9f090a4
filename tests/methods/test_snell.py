"""SNELL and SNELLA: the kernel's gradient and rank, what is kept, the zeroed entries, and how they are given out."""

import copy

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.methods.snell import kernel, sparsified


def one(m=20, n=16, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(nn.Linear(n, m, dtype=dtype)), {"method": "snell", **fields}, targets=["0"])
    return model, model[0].tunesmith.adapters["default"]


def factors(m, n, half, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, k, half, generator=generator, dtype=dtype, requires_grad=True) for k in (n, m))


def test_kernel():
    A, B = factors(5, 4, 3)
    d = [(B[p][:, None] - A[p][None]).norm(dim=-1) for p in (0, 1)]
    torch.testing.assert_close(kernel(A, B, 0.1), 0.1 * (d[0] - d[1]))
    assert torch.autograd.gradcheck(lambda A, B: kernel(A, B, 0.1), (A, B))


def test_rows_that_coincide_have_no_gradient_and_no_nan():
    A, B = (torch.zeros(2, 3, 2, requires_grad=True) for _ in range(2))
    kernel(A, B, 0.1).sum().backward()
    assert not A.grad.any() and not B.grad.any()


def test_the_kernel_has_full_rank():
    A, B = factors(32, 48, 2)
    assert torch.linalg.matrix_rank(kernel(A, B, 0.1)) == 32
    assert torch.linalg.matrix_rank(B[0] @ A[0].T) == 2


@pytest.mark.parametrize("form", ["code", "paper", "mask"])
def test_zeroed_entries(form):
    K = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    D, t = sparsified(K, 0.75, form), K.abs().flatten().quantile(0.75)
    assert abs(float((D != 0).double().mean()) - 0.25) <= 1 / K.numel()
    above = K.abs() > t
    expected = {"code": K * K.detach().abs() * above, "mask": K * above, "paper": K * (K.abs() - K.abs().flatten().sort().values[899].detach()).relu()}[form]
    torch.testing.assert_close(D, expected)
    weight = torch.randn(30, 40, dtype=torch.float64)
    (g,) = torch.autograd.grad((D * weight).sum(), K)
    torch.testing.assert_close(g, torch.autograd.grad((expected * weight).sum(), K)[0])


@pytest.mark.parametrize("form,sparsity", [("code", 0.9), ("paper", 0.5), ("mask", 0.9), ("code", 0.0)])
def test_made_again_in_backward_is_as_if_kept(form, sparsity):
    model, adapter = one(form=form, sparsity=sparsity)
    x = torch.randn(3, 16, dtype=torch.float64)
    W = model[0].weight + adapter.sparse()
    expected = torch.autograd.grad((x @ W.T + model[0].bias).square().sum(), [adapter.A, adapter.B])
    y = model(x)  # an input without a gradient
    y.square().sum().backward()
    torch.testing.assert_close((adapter.A.grad, adapter.B.grad), expected)
    assert adapter.A.grad.any() and adapter.B.grad.any()
    torch.testing.assert_close(ts.merge(model)(x), y)


def test_nothing_of_the_weights_size_is_kept():
    model, adapter = one(60, 50, torch.float32)
    x, kept = torch.randn(4, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x).sum()
    own = {p.data_ptr() for p in (model[0].weight, model[0].bias, adapter.A, adapter.B, x)}
    assert not [t.shape for t in kept if t.data_ptr() not in own and t.numel() > 4 * 60]
    y.backward()


@pytest.mark.parametrize("method", ["snell", "snella"])
def test_starts_close_to_the_base(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768))
    D = adapters(ts.adapt(model, {"method": method, "rank": 32}, targets=["0"]), "default")["0"].sparse()
    assert 0 < D.abs().max() < 1e-4 and (method == "snella" or D.norm() / model[0].weight.norm() < 1e-4)


def test_counts():
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    vit = nn.Sequential(*(nn.Linear(*shape, device="meta") for shape in shapes))
    assert 12 * ts.summary(ts.adapt(copy.deepcopy(vit), ts.SNELL(rank=32, targets=["[0-5]"]))).trainable == 5_308_416
    assert 12 * ts.summary(ts.adapt(vit, ts.SNELLA(rank=32, targets=["[0-5]"]))).trainable == 5_308_632


def test_density():
    model, _ = one(sparsity=0.75)
    assert ts.density(model) == {"0": pytest.approx(0.25, abs=1 / 320)}


# SNELLA's entries over layers


class Run:
    def __init__(self, total, **fields):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 10))
        ts.adapt(self.model, {"method": "snella", "targets": ["0", "2", "4"], **fields})
        self.optimizer, self.stages, self.t = torch.optim.Adam(ts.trainable(self.model).values(), lr=0.01), ts.stages(self.model, total), 0
        (self.allocator,) = self.stages.parts.values()

    def go(self, steps):
        for _ in range(steps):
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(self.t))
            self.optimizer.zero_grad()
            (self.model(x) - x).square().mean().backward()
            self.optimizer.step()
            self.stages.step()
            self.t += 1
        return self

    @property
    def sparsity(self):
        return [float(layer.sparsity) for layer in self.allocator.layers]


def test_the_budget_falls_to_the_target_and_is_kept_to():
    run, sizes = Run(12, rounds=6, init_sparsity=0.1, target_sparsity=0.8), [200, 200, 100]
    assert run.sparsity == [0.1] * 3
    seen = []
    for _ in range(6):
        run.go(2)
        seen.append(sum((1 - s) * n for s, n in zip(run.sparsity, sizes, strict=True)))
    assert seen == sorted(seen, reverse=True) and 100 - 3 <= seen[-1] <= 100 + 1e-6 and not run.allocator.mean
    budgets = [run.allocator.budget(r) for r in range(6)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] == 450 and budgets[-1] in (99, 100)


def test_equal_layers_get_equal_parts_and_full_layers_pass_theirs_on():
    allocator = Run(10).allocator
    assert allocator.given(250, [1 / 3] * 3) == [83, 83, 83]
    assert allocator.given(350, [0.0, 0.5, 0.5])[1:] == [200, 100]
    assert allocator.given(100, [1.0, 0.0, 0.0]) == [100, 1, 1]
    assert allocator.scores() == [1 / 3] * 3


def test_steps_that_overflowed_do_not_count():
    run = Run(10).go(2)
    before = copy.deepcopy(run.allocator.mean)
    run.allocator.layers[0].A.grad.fill_(float("inf"))
    run.stages.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.allocator.mean, strict=True))


def test_resumes_and_saves_what_was_given_out(tmp_path):
    whole, first, second = Run(10, rounds=5).go(10), Run(10, rounds=5).go(5), Run(10, rounds=5)
    with torch.no_grad():
        for name, p in ts.trainable(second.model).items():
            p.copy_(ts.trainable(first.model)[name])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.stages.load_state_dict(copy.deepcopy(first.stages.state_dict()))
    second.t = 5
    assert second.go(5).sparsity == whole.sparsity
    ts.save(whole.model, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 10))
    fresh.load_state_dict({k: v for k, v in whole.model.state_dict().items() if "tunesmith" not in k})
    x = torch.randn(2, 10)
    assert torch.equal(ts.load(fresh, tmp_path / "a")(x), whole.model(x)) and len(set(whole.sparsity)) > 1
    assert torch.equal(copy.deepcopy(whole.model)(x), whole.model(x))


def test_no_rounds_left():
    with pytest.raises(ts.TunesmithError, match="no rounds left"):
        Run(4, warmup=3, final=2)


def test_in_a_model():
    model = ts.adapt(tiny.tiny_llama(), ts.SNELL(rank=4, sparsity=0.5))
    assert set(ts.density(model)) == set(adapters(model, "default")) and all(abs(d - 0.5) < 0.01 for d in ts.density(model).values())
