import functools
import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tunesmith as ts
from tests import tiny
from tunesmith.engine.sites import sites
from tunesmith.methods.transformed_lora import balanced, ring_matrix, ring_vectors

F64 = torch.float64


def site_of(into, out, device="cpu", dtype=F64):
    return sites(nn.Sequential(nn.Linear(into, out, bias=False, device=device, dtype=dtype)))[0]


def stirred(method, site, size=0.3):
    torch.manual_seed(0)
    adapter = method.layer(site)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn_like(p))
    return adapter


def rings(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


FACTORS = {320: [4, 8, 10], 640: [8, 8, 10], 768: [8, 8, 12], 1280: [8, 10, 16]}
DIFFUSION = [(w, w) for w, blocks in ((320, 5), (640, 5), (1280, 6)) for _ in range(6 * blocks)]  # attention of Stable Diffusion 1.5
DIFFUSION += [(768, w) for w, blocks in ((320, 5), (640, 5), (1280, 6)) for _ in range(2 * blocks)]
COUNTS = {
    "LoRA r=4": (ts.TransformedLoRA(transform="none", residual="lora", rank=4), 797_184),
    "TLoRA*(2,4)": (ts.TransformedLoRA(residual="lora", rank=4, in_factors=FACTORS), 941_440),
    "TLoRA(2,6)": (ts.TransformedLoRA(in_factors=FACTORS, out_factors=FACTORS), 400_288),
    "DoRA r=4": (ts.TransformedLoRA(transform="diagonal", residual="lora", rank=4), 896_640),  # 0.90 M, as DoRA itself with a scale per output
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_of_the_paper(case):
    method, expected = COUNTS[case]
    assert len(DIFFUSION) == 128
    assert sum(method.count(site_of(*shape, "meta")) for shape in DIFFUSION) == expected


def test_splits_sizes_evenly():
    assert [balanced(n, 3) for n in (640, 768, 1280, 2048, 24, 4)] == [(8, 8, 10), (8, 8, 12), (8, 10, 16), (8, 16, 16), (2, 3, 4), (2, 2)]
    assert balanced(64, 2) == (8, 8) and balanced(64, 1) == (64,) and balanced(13, 3) == (13,)


def test_a_ring_is_the_trace_of_the_product_of_its_cores():
    A, B = rings((2, 2, 3, 3), (3, 3, 3, 3), (4, 4, 3, 3)), rings((2, 3, 3), (3, 3, 3), (4, 3, 3))
    split = [(n % 2, n // 2 % 3, n // 6) for n in range(24)]
    T = [[(A[0][i[0], j[0]] @ A[1][i[1], j[1]] @ A[2][i[2], j[2]]).trace() for j in split] for i in split]
    torch.testing.assert_close(ring_matrix(A), torch.tensor(T, dtype=F64))
    torch.testing.assert_close(ring_vectors(B), torch.stack([B[0][i[0]] @ B[1][i[1]] @ B[2][i[2]] for i in split]))


def test_rank_one_is_a_kronecker_product_and_one_core_any_matrix():
    A = rings((2, 2, 1, 1), (3, 3, 1, 1), (4, 4, 1, 1))
    torch.testing.assert_close(ring_matrix(A), torch.kron(A[2][..., 0, 0], torch.kron(A[1][..., 0, 0], A[0][..., 0, 0])))
    torch.testing.assert_close(ring_matrix(A[2:]), A[2][..., 0, 0])


def test_products_of_rings_are_rings():
    X, Y = rings((2, 2, 2, 2), (3, 3, 2, 2)), rings((2, 2, 2, 2), (3, 3, 2, 2), seed=1)
    product = [torch.einsum("ilab,jlcd->ijacbd", a, b).reshape(len(a), len(a), 4, 4) for a, b in zip(X, Y, strict=True)]
    torch.testing.assert_close(ring_matrix(product), ring_matrix(X) @ ring_matrix(Y).T)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("init", ["identity_broken", "prop1", "prop1_noise"])
def test_starts_at_the_identity(init, order, rank):
    torch.manual_seed(0)
    adapter = ts.TransformedLoRA(init=init, order=order, transform_rank=rank).layer(site_of(24, 40))
    gap = adapter.change().norm()
    assert 1e-4 < gap < 0.2 if init == "prop1_noise" else gap < 1e-12
    A, B = adapter.factors()
    assert torch.equal(B @ A, torch.zeros(40, 24, dtype=F64)) and A.norm() > 0


def test_the_start_of_the_paper_keeps_all_slices_alike():
    def spread(init):
        torch.manual_seed(0)
        W, target = torch.randn(12, 12, dtype=F64), torch.randn(12, 12, dtype=F64)
        adapter = ts.TransformedLoRA(init=init, residual="none").layer(site_of(12, 12))
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (adapter.merged(W, None)[0] - target).square().sum().backward()
            optimizer.step()
        return max((E - E[..., :1, :1]).abs().max().item() for E in adapter.E)

    assert spread("prop1") < 1e-12 and spread("identity_broken") > 1e-2


SLOTS = [s for s in itertools.product(["ring", "rotation", "diagonal", "none"], ["ring", "lora", "none"]) if s != ("none", "none")]
LAYERS = {
    "linear": lambda: (nn.Linear(12, 18), torch.randn(2, 5, 12)),
    "Conv1D": lambda: (Conv1D(18, 12), torch.randn(2, 5, 12)),
    "conv": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("transform,residual", SLOTS)
def test_every_pair_of_slots(transform, residual, layer, monkeypatch):
    torch.manual_seed(0)
    module, x = LAYERS[layer]()
    model, x = nn.Sequential(module).double(), x.double().requires_grad_()
    before = model(x)
    method = ts.TransformedLoRA(transform=transform, residual=residual, rank=2, block_size=4)
    ts.adapt(model, method, targets=["0"])
    adapter, site = model[0].tunesmith.adapters["default"], model[0].tunesmith.site
    torch.testing.assert_close(model(x), before)
    assert sum(p.numel() for p in adapter.parameters()) == method.count(site)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    y = model(x)
    g = torch.randn_like(y)
    grads = torch.autograd.grad((y * g).sum(), [x, *adapter.parameters()])
    assert all(grad.abs().sum() > 0 for grad in grads)
    monkeypatch.setattr(adapter, "_by_tokens", lambda *sizes: False)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(torch.autograd.grad((model(x) * g).sum(), [x, *adapter.parameters()]), grads)
    W = site.matrix(site.values)[0].detach()
    with torch.no_grad():
        assert not torch.allclose(adapter.merged(W, None)[0], W, atol=1e-3)
        for E in adapter.E:
            E.zero_()  # as weight decay does
        A, B = adapter.factors() if residual != "none" else (W[:1], W[:, :1] * 0)
        torch.testing.assert_close(adapter.merged(W, None)[0], W + B @ A)


def test_known_methods_are_special_cases():
    site = site_of(12, 10)
    W = site.matrix(site.values)[0].detach()
    lora = stirred(ts.TransformedLoRA(transform="none", residual="lora", rank=3), site)
    torch.testing.assert_close(lora.merged(W, None)[0], W + lora.B[0] @ lora.A[0])
    dora = stirred(ts.TransformedLoRA(transform="diagonal", residual="lora", rank=3), site)
    torch.testing.assert_close(dora.merged(W, None)[0], W * (1 + dora.E[0]) + dora.B[0] @ dora.A[0])
    oft = stirred(ts.TransformedLoRA(transform="rotation", residual="none", block_size=5), site)  # 4 divides 12, 5 does not
    T = oft.merged(torch.eye(12, dtype=F64), None)[0]
    torch.testing.assert_close(T @ T.T, torch.eye(12, dtype=F64))
    inside = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert (T[inside] != 0).all() and not T[~inside].any()


def test_the_residual_ring_has_the_rank_of_its_two_cut_bonds():
    A, B = stirred(ts.TransformedLoRA(rank=2), site_of(24, 40)).factors()
    assert torch.linalg.matrix_rank(B @ A) == 4
    torch.testing.assert_close(ts.TransformedLoRA(rank=2).layer(site_of(24, 40)).B[0], torch.zeros(2, 2, 2, dtype=F64), check_dtype=False)


@pytest.mark.parametrize("count", [2, 200])
@pytest.mark.parametrize("transform,residual", SLOTS)
def test_keeps_no_matrix_for_backward(transform, residual, count):
    model = ts.adapt(nn.Sequential(nn.Linear(48, 36)), ts.TransformedLoRA(transform=transform, residual=residual, rank=2, block_size=4), targets=["0"])
    x, kept = torch.randn(count, 48, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    given = {t.untyped_storage().data_ptr() for t in (x, model[0].weight)}
    assert kept and all(t.numel() < 36 * 36 or t.untyped_storage().data_ptr() in given for t in kept)


def test_chooses_the_cheaper_side():
    square, wide, narrow = (ts.TransformedLoRA().layer(site_of(*shape, "meta")) for shape in ((64, 64), (64, 192), (192, 64)))
    assert square._by_tokens(95, 64, 64) and not square._by_tokens(97, 64, 64)
    assert wide._by_tokens(10**9, 192, 64)
    assert narrow._by_tokens(71, 64, 192) and not narrow._by_tokens(73, 64, 192)
    with torch.no_grad():
        assert square._by_tokens(63, 64, 64) and not square._by_tokens(64, 64, 64)


def test_half_precision_keeps_small_changes():
    site = site_of(24, 40, dtype=torch.bfloat16)
    adapter = stirred(ts.TransformedLoRA(residual="none"), site, 1e-4)
    W = site.matrix(site.values)[0].detach()
    T = adapter.change().double() + torch.eye(24)
    assert adapter.merged(W, None)[0].dtype == torch.float32
    torch.testing.assert_close(adapter.merged(W, None)[0].double(), W.double() @ T, atol=1e-6, rtol=0)
    assert (adapter.change() != 0).any() and adapter.change().abs().max() < 2**-8


@pytest.mark.parametrize("regularizer", ["identity", "orthogonal"])
def test_regularizers_are_zero_with_no_gradient_at_the_start_of_the_paper(regularizer):
    model = nn.Sequential(nn.Linear(24, 40, dtype=F64), nn.Linear(40, 7, dtype=F64))
    ts.adapt(model, ts.TransformedLoRA(init="prop1", regularizer=regularizer, regularization=0.5), targets=["0", "1"])
    loss = ts.auxiliary_loss(model)
    loss.backward()
    E = [E for layer in model for E in layer.tunesmith.adapters["default"].E]
    assert loss.item() < 1e-12 and all(torch.isfinite(e.grad).all() for e in E)
    with torch.no_grad():
        for e in E:
            e.add_(0.1 * torch.randn_like(e)), e.grad.zero_()
    value = ts.auxiliary_loss(model)
    value.backward()
    assert value > 0.1
    with torch.no_grad():
        for e in E:
            e.sub_(1e-3 * e.grad)
        assert ts.auxiliary_loss(model) < value


def test_no_regularizer_unless_asked():
    assert ts.auxiliary_loss(ts.adapt(nn.Sequential(nn.Linear(24, 40)), "transformed-lora", targets=["0"])) is None


def test_orthogonal_regularizer_is_zero_at_orthogonal_kronecker_products():
    adapter = ts.TransformedLoRA(transform_rank=1, regularizer="orthogonal", regularization=1.0, residual="none").layer(site_of(24, 40))
    with torch.no_grad():
        for E in adapter.E:
            E[..., 0, 0] = torch.linalg.qr(torch.randn(len(E), len(E), dtype=F64)).Q - torch.eye(len(E))
    T = adapter.change() + torch.eye(24)
    assert adapter.penalty() < 1e-12 and (T - torch.eye(24)).norm() > 1
    torch.testing.assert_close(T @ T.T, torch.eye(24, dtype=F64))


def test_a_prime_input_leaves_the_ring_out():
    method = ts.TransformedLoRA(residual="ring", rank=2)
    site = site_of(13, 12)
    assert method.layer(site).transform == "none" and method.count(site) == 4 * (13 + 2 + 2 + 3) == sum(p.numel() for p in method.layer(site).parameters())
    assert ts.TransformedLoRA(in_factors={13: [13]}).layer(site).transform == "ring"
    with pytest.raises(ts.TunesmithError, match="nothing to train at '0'"):
        ts.adapt(nn.Sequential(nn.Linear(13, 12)), ts.TransformedLoRA(residual="none"), targets=["0"])


def test_refuses_what_does_not_fit():
    with pytest.raises(ts.TunesmithError, match="factors of 24 must be positive and multiply"):
        ts.TransformedLoRA(in_factors={24: [5, 5]})
    with pytest.raises(ts.TunesmithError, match="only transform='ring'"):
        ts.TransformedLoRA(transform="diagonal", regularization=0.1)


def test_acts_on_attention_by_default():
    def ends(model):
        return {path.split(".")[-1] for path in model.__dict__["_tunesmith"].records["default"].sites}

    assert ends(ts.adapt(tiny.tiny_llama(), "transformed-lora")) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert ends(ts.adapt(tiny.tiny_gpt2(), "transformed-lora")) == {"c_attn", "c_proj"}
    assert ends(ts.adapt(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3)), "transformed-lora")) == {"0"}


def test_a_transformed_weight_is_fitted_by_a_transform_and_an_added_one_by_lora():
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    W, T = draw(64, 64), torch.eye(64)
    for _ in range(2):
        T = T + 0.5 * functools.reduce(torch.kron, [torch.eye(4) + 0.5 * draw(4, 4) for _ in range(3)])

    def left(target, steps=100, **config):
        torch.manual_seed(1)
        adapter = ts.TransformedLoRA(**config).layer(site_of(64, 64, dtype=torch.float32))
        optimizer = torch.optim.Adam(adapter.parameters(), lr=4e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = (adapter.merged(W, None)[0] - target).square().sum() / (W - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    lora, ring = {"residual": "lora", "rank": 2}, {"residual": "ring", "rank": 3}
    transformed = W @ T + draw(64, 1) @ draw(1, 64)
    alone = left(transformed, residual="none")
    assert left(transformed, **lora) < left(transformed, **ring) < alone < left(transformed, residual="none", init="prop1")
    assert alone < 0.5 * min(left(transformed, transform="none", **lora), left(transformed, transform="none", **ring))
    added = W + draw(64, 2) @ draw(2, 64)
    assert left(added, transform="none", **lora) < 0.1 < left(added, residual="none")
