"""WaRA: the transforms against PyWavelets, the collapses, the grid, the fixed basis, WaveFT against peft, counts."""

import numpy as np
import pytest
import pywt
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests.tiny import batch, tiny_vit
from tunesmith import optim
from tunesmith.methods.svd import leading
from tunesmith.methods.wara import collect, filters, image_grid, in_bands, matrix, spread

close = torch.testing.assert_close
WAVELETS = ["haar", "db2", "sym4", "coif1", "bior2.2", "rbio1.3"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(out=24, size=16, dtype=torch.float64, stirred=True, **fields):
    """A linear layer with the method attached, and its adapter."""
    base = nn.Linear(size, out, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(out, size)), base.bias.copy_(normal(out, seed=1))
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(base), ts.WaRA(**fields), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    if stirred:
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.add_(normal(*p.shape, seed=i + 2).to(p.dtype))
    return model, adapter


def change(model, x):
    with ts.disabled(model):
        base = model(x)
    return model(x) - base


def both(size, wavelet, like=None):
    """(F, F⁻¹), (size, size)."""
    like = torch.empty(0, dtype=torch.float64)
    analysis, synthesis = filters(wavelet)
    return matrix(size, analysis, like), matrix(size, synthesis, like).T


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [2, 4, 24])
def test_transform_is_that_of_pywavelets(wavelet, size):
    (forth, back), x = both(size, wavelet), normal(size)
    low, high = pywt.dwt(x.numpy(), wavelet, mode="periodization")
    close(forth @ x, torch.tensor(np.concatenate([low, high])))
    close(back @ x, torch.tensor(pywt.idwt(x[: size // 2].numpy(), x[size // 2 :].numpy(), wavelet, mode="periodization")))
    close(back @ forth, torch.eye(size, dtype=torch.float64), atol=1e-11, rtol=0)
    if wavelet in ("haar", "db2"):
        close(forth.T, back, atol=1e-14, rtol=0)
    f = filters(wavelet)[0][1]
    close((spread(x[: size // 2], f) * x).sum(), (x[: size // 2] * collect(x, f)).sum())


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_levels_split_every_band(wavelet):
    x = normal(24)
    nodes = pywt.WaveletPacket(x.numpy(), wavelet, mode="periodization", maxlevel=2).get_level(2, order="natural")
    close(in_bands(torch.eye(6, dtype=torch.float64), filters(wavelet)[0], 2) @ x, torch.tensor(np.concatenate([n.data for n in nodes])))


def slow_v1(x, A, B, wavelet):
    """IDWT2(BA DWT2(X)) over features × tokens, (tokens, in) → (tokens, out), by PyWavelets."""
    ll, details = pywt.dwt2(x.T.numpy(), wavelet, mode="periodization")
    ll, *details = ((B @ A).numpy() @ c for c in (ll, *details))
    return torch.tensor(pywt.idwt2((ll, details), wavelet, mode="periodization")).T


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_v1_is_a_change_of_the_weights(wavelet):
    model, adapter = layer(wavelet=wavelet, rank=3, scale=0.5)
    x = normal(8, 16, seed=9)
    update = change(model, x).detach()
    close(update, 0.5 * slow_v1(x, adapter.A.detach(), adapter.B.detach(), wavelet), atol=1e-10, rtol=1e-10)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    close(slow_v1(x[order], adapter.A.detach(), adapter.B.detach(), wavelet), 2 * update[order], atol=1e-10, rtol=1e-10)
    delta = adapter.merged(model[0].weight, None)[0] - model[0].weight
    close(x @ delta.T, update, atol=1e-12, rtol=0)
    assert torch.linalg.matrix_rank(delta) == 2 * 3


def test_v1_transforms_in_float32_over_bfloat16():
    model, adapter = layer(dtype=torch.bfloat16, rank=2)
    assert adapter.A.dtype == adapter.factors()[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        A, B = adapter.factors()
    close(A.double(), in_bands(adapter.A.double(), adapter.analysis, 1), atol=1e-6, rtol=0)
    close(B.double(), in_bands(adapter.B.T.double(), adapter.synthesis, 1).T, atol=1e-6, rtol=0)


def grid_layer(**fields):
    return layer(version="v2", **{"rank": 3, "grid": (4, 6)} | fields)


def set_gain(adapter, values):
    with torch.no_grad():
        adapter.gain.copy_(torch.tensor(values))


@pytest.mark.parametrize("wavelet,levels,grid", [("haar", 1, (4, 6)), ("db2", 2, (8, 4)), ("bior2.2", 1, (7, 5)), ("haar", 2, (7, 7)), ("haar", 3, (3, 3))])
def test_v2_with_equal_gains_is_lora_on_the_patches(wavelet, levels, grid):
    model, adapter = grid_layer(wavelet=wavelet, levels=levels, grid=grid)
    x = normal(2, 2 + grid[0] * grid[1], 16, seed=9)
    set_gain(adapter, [1.0] * (3 * levels + 1))
    update = change(model, x)
    close(update[:, 2:], x[:, 2:] @ adapter.A.T @ adapter.B.T, atol=1e-10, rtol=0)
    assert not update[:, :2].any()
    set_gain(adapter, [1.0] * (3 * levels) + [0.5])
    assert not torch.allclose(change(model, x), update) and not change(model, x)[:, :2].any()
    plain, other = grid_layer(wavelet=wavelet, levels=levels, grid=grid, gains=False)
    close(change(plain, x)[:, 2:], x[:, 2:] @ other.A.T @ other.B.T, atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
@pytest.mark.parametrize("levels", [1, 2])
def test_v2_gains_against_pywavelets(wavelet, levels):
    model, adapter = grid_layer(wavelet=wavelet, levels=levels, grid=(8, 4))
    x = normal(1, 33, 16, seed=9)
    low, *details = pywt.wavedec2((x[0, 1:] @ adapter.A.T @ adapter.B.T).detach().view(8, 4, 24).numpy(), wavelet, mode="periodization", level=levels, axes=(0, 1))
    g = adapter.gain.detach().numpy()
    # PyWavelets' order is high-low, low-high, high-high (rows, columns)
    details = [(g[3 * i + 2] * hl, g[3 * i + 1] * lh, g[3 * i + 3] * hh) for i, (hl, lh, hh) in enumerate(details)]
    expected = pywt.waverec2([g[0] * low, *details], wavelet, mode="periodization", axes=(0, 1))
    close(change(model, x)[0, 1:].detach(), torch.tensor(expected).view(32, 24), atol=1e-10, rtol=1e-10)


def test_v2_low_band_alone_is_constant_on_cells():
    for fields in ({"bands": "low"}, {}):
        model, adapter = grid_layer(**fields)
        if not fields:
            set_gain(adapter, [1.0, 0, 0, 0])
        cells = change(model, normal(2, 25, 16))[:, 1:].view(2, 2, 2, 3, 2, 24)
        close(cells, cells[:, :, :1, :, :1].expand_as(cells), atol=1e-12, rtol=0)
        assert cells.std() > 0.1
    assert "gain" not in dict(grid_layer(bands="low")[1].named_parameters())


def test_v2_activation_acts_on_the_coefficients():
    model, adapter = grid_layer(activation="gelu", gains=False)
    x = normal(1, 24, 16)
    (rows, back), (columns, across) = both(4, "haar"), both(6, "haar")
    c = F.gelu(torch.einsum("ih,hwr,jw->ijr", rows, (x @ adapter.A.T).view(4, 6, 3), columns))
    close(change(model, x).view(4, 6, 24), torch.einsum("hi,ijr,wj,or->hwo", back, c, across, adapter.B))


def test_v2_transforms_in_float32_under_autocast():
    _, adapter = grid_layer()
    adapter.float()
    u = normal(1, 4, 6, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = adapter.change(u)
    close(z, adapter.change(u.float()), atol=0, rtol=0)


def test_v2_finds_the_grid():
    model = ts.adapt(tiny_vit(), ts.WaRA(version="v2"))
    assert {config.grid for config in model._tunesmith.records["default"].sites.values()} == {(2, 2)}
    assert model(**batch("vit")).logits.shape == (3, 3)
    assert image_grid(tiny_vit(image_size=(16, 24))) == (2, 3) and image_grid(nn.Linear(2, 2)) is None
    with ts.disabled(model):
        before = model(**batch("vit")).logits
    close(model(**batch("vit")).logits, before)

    square, adapter = grid_layer(grid=None)
    x = normal(2, 4 * 4 + 5, 16)
    named, twin = grid_layer(grid=(4, 4))
    close(square(x), named(x))
    assert not change(square, x)[:, :5].any() and change(square, x)[:, 5:].any()
    close(square(x[:, 5:].reshape(2, 4, 4, 16)), square(x)[:, 5:].reshape(2, 4, 4, 24))  # a grid as it is
    with pytest.raises(ts.TunesmithError, match=r"'0' met 21 tokens, which are no grid of 2×2 .* set grid"):
        grid_layer(grid=(2, 2))[0](x)
    with pytest.raises(ts.TunesmithError, match=r"needs tokens.*met \(5, 16\)"):
        square(x[0, :5])


def test_v2_does_not_merge_and_says_why():
    model, _ = grid_layer()
    with pytest.raises(ts.TunesmithError, match="'default' \\(wara\\) cannot be merged: at '0' the update mixes the tokens of a grid"):
        ts.merge(model)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    with pytest.raises(ts.TunesmithError, match="inside nn.MultiheadAttention"):
        ts.adapt(nn.Sequential(attention), ts.WaRA(version="v2"), targets=["0.in_proj"])


@pytest.mark.parametrize("coefficients", [None, 5])
@pytest.mark.parametrize("wavelet,levels", [("haar", 1), ("bior2.2", 1), ("db2", 2)])
def test_tiny_trains_what_stands_between_the_low_bands_factors(coefficients, wavelet, levels, tmp_path):
    fields = {"version": "tiny", "rank": 3, "coefficients": coefficients, "wavelet": wavelet, "levels": levels}
    start, adapter = layer(stirred=False, **fields)
    assert sum(p.numel() for p in adapter.parameters()) == (coefficients or 3)
    assert not change(start, normal(4, 16)).any()
    model, adapter = layer(**fields)
    low_out, low_in = torch.eye(24, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    for _ in range(levels):
        low_out, low_in = both(len(low_out), wavelet)[0][: len(low_out) // 2] @ low_out, low_in @ both(low_in.shape[1], wavelet)[1][:, : low_in.shape[1] // 2]
    U, S, Vh = leading(low_out @ model[0].weight.detach() @ low_in, 3)
    R = torch.diag(adapter.m.detach()) if coefficients is None else (adapter.m.detach()[:, None, None] * adapter.P).sum(0)
    core = (U * S.sqrt()) @ R @ (S.sqrt()[:, None] * Vh)
    forth, back = in_bands(torch.eye(16 // 2**levels, dtype=torch.float64), adapter.analysis, levels), in_bands(torch.eye(24 // 2**levels, dtype=torch.float64), adapter.synthesis, levels).T
    delta = back @ torch.block_diag(*[core] * 2**levels) @ forth
    close((adapter.merged(model[0].weight, None)[0] - model[0].weight).detach(), delta, atol=1e-10, rtol=0)
    x = normal(5, 16, seed=9)
    close(change(model, x).detach(), x @ delta.T, atol=1e-10, rtol=0)

    ts.save(model, tmp_path / "a")
    again, _ = layer(**fields)
    ts.detach(again)
    assert torch.equal(ts.load(again, tmp_path / "a")(x), model(x))
    assert (tmp_path / "a" / "adapter.safetensors").stat().st_size < 200


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym4", "coif1"])
@pytest.mark.parametrize("shape", [(24, 16), (9, 15)])
def test_waveft_is_pefts(wavelet, shape):
    from peft.tuners.waveft import WaveFTConfig
    from peft.tuners.waveft.layer import WaveFTLinear

    fields = {"n_frequency": 40, "scaling": 3.0, "random_loc_seed": 5, "wavelet_family": wavelet, "init_weights": False}
    theirs = WaveFTLinear(nn.Linear(shape[1], shape[0], dtype=torch.float64), "default", WaveFTConfig(**fields), 40)
    model, adapter = layer(*shape, version="waveft", n_frequency=40, scale=3.0, seed=5, wavelet=wavelet)
    with torch.no_grad():
        theirs.waveft_spectrum["default"].data = adapter.spectrum.detach().clone()
    expected = theirs.get_delta_weight("default").detach()
    close((adapter.merged(model[0].weight, None)[0] - model[0].weight).detach(), expected, atol=1e-10, rtol=0)
    x = normal(2, 3, shape[1], seed=9).requires_grad_()
    y = change(model, x)
    close(y, x @ expected.T, atol=1e-10, rtol=0)
    g = normal(*y.shape, seed=10)
    grads = torch.autograd.grad((y * g).sum(), [x, adapter.spectrum])
    close(grads[0], g @ expected, atol=1e-10, rtol=0)
    slow = torch.autograd.grad((adapter.merged(model[0].weight, None)[0] * torch.einsum("bto,bti->oi", g, x)).sum(), adapter.spectrum)[0]
    close(grads[1], slow)


def test_waveft_keeps_the_input_alone():
    model, adapter = layer(48, 36, dtype=torch.float32, version="waveft", n_frequency=800)
    x, kept = normal(40, 36, dtype=torch.float32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), model[0].weight.data_ptr(), adapter.spectrum.data_ptr()}


def test_counts():
    holder = nn.Linear(768, 768, device="meta")
    site = ts.engine.sites.Site("x", "linear", holder, holder, "weight", "bias")
    assert 12 * 2 * ts.WaRA(rank=8).count(site) == 147_456 == 12 * ts.LoRA(rank=8).count(site)  # half of LoRA's
    assert ts.WaRA(rank=8, levels=2).count(site) == 8 * (768 + 768) // 4
    assert ts.WaRA(version="v2", rank=8).count(site) == ts.LoRA(rank=8).count(site) + 4
    assert 12 * 2 * ts.WaRA(version="tiny", rank=8).count(site) == 192 and ts.WaRA(version="tiny", coefficients=16).count(site) == 16
    assert 56 * ts.WaRA(version="waveft", n_frequency=5000).count(site) == 280_000
    for fields in ({}, {"levels": 2}, {"version": "v2", "levels": 2}, {"version": "v2", "gains": False}, {"version": "v2", "bands": "low"}, {"version": "tiny"},
                   {"version": "tiny", "coefficients": 7}, {"version": "waveft"}, {"version": "waveft", "n_frequency": 30}):  # fmt: skip
        model, adapter = layer(**fields)
        assert sum(p.numel() for p in adapter.parameters()) == ts.WaRA(**fields).count(model[0].tunesmith.site)


@pytest.mark.parametrize("version", ["v1", "v2", "tiny", "waveft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_version_starts_at_the_base_and_learns(version, dtype):
    torch.manual_seed(0)
    model, _ = layer(version=version, dtype=dtype, stirred=False)
    x, target = normal(2, 5, 16, dtype=dtype), normal(2, 5, 24, seed=3, dtype=dtype)
    with ts.disabled(model):
        before = model(x)
    close(model(x), before)
    optimizer, losses = optim.build(model, lr=1e-2), []
    for _ in range(10):
        loss = ((model(x) - target).float() ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_mistakes_are_named():
    with pytest.raises(ts.TunesmithError, match="wavelet='har' is not valid.*haar"):
        ts.WaRA(wavelet="har")
    with pytest.raises(ts.TunesmithError, match="cannot halve the 9 outputs and 16 inputs of '0' 1 times"):
        layer(out=9)
    with pytest.raises(ts.TunesmithError, match="24 outputs.*'0' 4 times"):
        layer(levels=4)


def test_v1_fits_what_it_can_express_and_lora_what_it_can():
    forth, back = both(32, "haar")
    M = normal(16, 2) @ normal(2, 16, seed=1)
    targets = {"bands": back @ torch.block_diag(M, M) @ forth, "plain": normal(32, 2, seed=2) @ normal(2, 32, seed=3)}

    def error(target, method):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, bias=False, dtype=torch.float64))
        nn.init.zeros_(model[0].weight)
        adapter = ts.adapt(model, method, targets=["0"])[0].tunesmith.adapters["default"]
        optimizer, zero = torch.optim.Adam(adapter.parameters(), lr=1e-1), model[0].weight.detach()
        for _ in range(150):
            loss = (adapter.merged(zero, None)[0] - target).square().sum() / target.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert error(targets["bands"], ts.WaRA(rank=2)) < 1e-2 < 0.3 < error(targets["bands"], ts.LoRA(rank=1))  # 64 numbers each
    assert error(targets["plain"], ts.LoRA(rank=2)) < 1e-2 < 0.5 < error(targets["plain"], ts.WaRA(rank=4))
