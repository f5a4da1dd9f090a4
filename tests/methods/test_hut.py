import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.sites import sites


def site_of(out=6, into=5, bias=True, device="cpu", dtype=torch.float64):
    return sites(nn.Sequential(nn.Linear(into, out, bias, device, dtype)))[0]


def layer(site, seed=0, **config):
    torch.manual_seed(seed)
    adapter = ts.HUT(**config).layer(site)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return adapter


def test_counts():
    square, bare = (site_of(1024, 1024, bias, "meta") for bias in (True, False))  # query or value of RoBERTa-large
    assert 48 * ts.HUT(rank=8).count(square) == 884_736
    assert 48 * ts.HUT(rank=8, affine=False).count(square) == 786_432 == 48 * ts.LoRA(rank=8).count(square)
    assert ts.HUT(rank=8).count(bare) == ts.HUT(rank=8).count(square) - 1024  # β has no bias to be merged into


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_as_the_base_itself(dtype):
    site = site_of(dtype=dtype)
    W, b = ts.HUT().layer(site).merged(*site.matrix(site.values))
    assert torch.equal(W, site.holder.weight.to(W.dtype)) and torch.equal(b, site.holder.bias.to(b.dtype))


def test_decayed_to_nothing_it_is_the_base():
    site = site_of()
    adapter = layer(site)
    W, b = site.matrix(site.values)
    assert not torch.allclose(adapter.merged(W, b)[0], W)
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    assert torch.equal(adapter.merged(W, b)[0], W) and torch.equal(adapter.merged(W, b)[1], b)


def test_one_factor_of_ones_scales_inputs_or_outputs():
    site = site_of()
    W, _ = site.matrix(site.values)
    adapter = layer(site, rank=1, affine=False)
    with torch.no_grad():
        adapter.B.fill_(1)
        torch.testing.assert_close(adapter.merged(W, None)[0], W * (1 + adapter.A))  # (IA)³ on the input
        adapter.A.fill_(1), adapter.B.normal_()
        torch.testing.assert_close(adapter.merged(W, None)[0], W * (1 + adapter.B))  # (IA)³ on the output


def test_the_change_has_the_zeros_of_the_weight_and_up_to_r_times_its_rank():
    adapter = layer(site_of(20, 18), rank=2, affine=False)
    W = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 18, dtype=torch.float64)
    change = adapter.merged(W, None)[0] - W
    assert torch.linalg.matrix_rank(change) == 6
    W[3], W[:, 5], W[7, 9] = 0, 0, 0
    assert torch.equal(adapter.merged(W, None)[0] == 0, W == 0)


def test_the_mask_is_made_in_float32():
    site = site_of(dtype=torch.bfloat16)
    adapter = ts.HUT(rank=1, affine=False).layer(site)
    with torch.no_grad():
        adapter.A.fill_(1), adapter.B.fill_(2**-12)
    W = site.holder.weight
    torch.testing.assert_close(adapter.merged(W, None)[0] / W.float() - 1, torch.full(W.shape, 2.0**-12), atol=1e-7, rtol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_the_formula(affine):
    model = ts.adapt(nn.Sequential(site_of().holder), ts.HUT(rank=3, scale=0.7, affine=affine), targets=["0"])
    adapter, W, b = model[0].tunesmith.adapters["default"], model[0].weight.detach(), model[0].bias.detach()
    x, g = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    (model(x) * g).sum().backward()
    A, B, gamma = adapter.A, adapter.B, 1 + adapter.g if affine else torch.ones(6, dtype=torch.float64)
    new = W * (1 + 0.7 * B @ A)
    P = 0.7 * ((g * gamma).T @ x) * W
    torch.testing.assert_close(B.grad, P @ A.T)
    torch.testing.assert_close(A.grad, B.T @ P)
    torch.testing.assert_close(x.grad, (g * gamma) @ new)
    if affine:
        torch.testing.assert_close(adapter.g.grad, (g * (x @ new.T + b)).sum(0))
        torch.testing.assert_close(adapter.beta.grad, g.sum(0))


def test_an_embedding_is_looked_up_as_its_merged_table():
    model = ts.adapt(nn.Sequential(nn.Embedding(9, 6, dtype=torch.float64)), ts.HUT(rank=2), targets=["0"])
    adapter, ids = model[0].tunesmith.adapters["default"], torch.tensor([[1, 4, 4], [8, 0, 1]])
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    table = adapter.merged(model[0].weight.detach().T, None)[0].T
    torch.testing.assert_close(model(ids), table[ids])
    ours, theirs = (torch.autograd.grad((y * weight).sum(), list(adapter.parameters()), retain_graph=True) for y in (model(ids), table[ids]))
    torch.testing.assert_close(ours, theirs)


def fit(method, W, target, steps=250):
    """Share of target − W that a method leaves."""
    torch.manual_seed(1)
    site = site_of(*W.shape, bias=False, dtype=torch.float32)
    adapter = method.layer(site)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (adapter.merged(W, None)[0] - target).square().sum() / (target - W).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def test_fits_a_multiplied_weight_as_lora_fits_an_added_one():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(32, 32, generator=generator)
    change = torch.randn(32, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    hut, lora = ts.HUT(rank=2, affine=False), ts.LoRA(rank=2, alpha=2)
    assert fit(hut, W, W * (1 + change)) < 1e-2 < 0.5 < fit(lora, W, W * (1 + change))
    assert fit(lora, W, W + change) < 1e-2 < 0.5 < fit(hut, W, W + change)
