"""GaLore and Natural GaLore: subspaces, moments in 8 bits, memory, states to the bit, groups beside adapters, recipes."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.train import test_resume as resume
from tunesmith import optim
from tunesmith.errors import TunesmithError
from tunesmith.optim import galore
from tunesmith.quantize.formats import BLOCK, blockwise, unblocked

TALL, WIDE = (12, 8), (8, 12)
KINDS = {"galore": optim.GaLore, "natural-galore": optim.NaturalGaLore}


def parameter(shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def gradients(p, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def stepped(optimizer, p, count=5):
    """The weight after each step."""
    after = []
    for G in gradients(p, count):
        p.grad = G
        optimizer.step()
        after.append(p.detach().clone())
    return torch.stack(after)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("proj_type", galore.PROJ_TYPES)
def test_full_rank_in_the_identity_is_adamw(shape, proj_type, monkeypatch):
    def identity(G, rank, kind):
        return tuple(torch.eye(n, dtype=G.dtype) if there else None for n, there in zip(G.shape, galore.sides(G.shape, kind), strict=True))

    monkeypatch.setattr(galore, "subspace", identity)
    p, q, r = parameter(shape), parameter(shape), parameter(shape)
    found = stepped(optim.GaLore([p], rank=8, proj_type=proj_type, weight_decay=0.1, update_proj_gap=2), p)
    torch.testing.assert_close(found, stepped(optim.GaLore([q], weight_decay=0.1), q), atol=1e-14, rtol=1e-14)
    with torch.no_grad():
        r.copy_(q)
    torch.testing.assert_close(stepped(optim.GaLore([q], eps=1e-14), q), stepped(torch.optim.AdamW([r], eps=1e-14, weight_decay=0.0), r))


@pytest.mark.parametrize("shape", [TALL, WIDE, (8, 8), (30, 3)])
@pytest.mark.parametrize("proj_type", galore.PROJ_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_of_low_rank_and_in_the_gradients_span(kind, proj_type, shape):
    p = parameter(shape)
    optimizer, before = KINDS[kind]([p], rank=3, proj_type=proj_type, update_proj_gap=2), p.detach().clone()
    for k, G in enumerate(gradients(p, 5)):
        p.grad = G
        optimizer.step()
        update, state = p.detach() - before, optimizer.state[p]
        before = p.detach().clone()
        if k % 2 == 0:  # the subspace is this gradient's
            U, S, Vh = torch.linalg.svd(G)
            for name, Q in (("U", U), ("V", Vh.T)):
                if name in state:
                    torch.testing.assert_close(state[name] @ state[name].T, Q[:, :3] @ Q[:, :3].T)
        assert torch.linalg.matrix_rank(update, atol=1e-12, rtol=1e-9) == 3
        back = update if "U" not in state else state["U"] @ (state["U"].T @ update)
        torch.testing.assert_close(back if "V" not in state else back @ state["V"] @ state["V"].T, update)
    assert ("U" in state, "V" in state) == galore.sides(shape, proj_type)


def test_the_first_update_is_the_projected_sign():
    p, q = parameter(TALL), parameter(TALL)
    start = p.detach().clone()
    for optimizer, own in ((optim.GaLore([p], lr=0.1, scale=0.5, rank=3, eps=1e-12), p), (optim.NaturalGaLore([q], lr=0.1, scale=0.5, rank=3, eps=1e-12), q)):
        (own.grad,) = gradients(own, 1)
        optimizer.step()
        V = optimizer.state[own]["V"]
        torch.testing.assert_close(own.detach(), start - 0.1 * 0.5 * torch.sign(own.grad @ V) @ V.T)
    torch.testing.assert_close(p, q)


def test_natural_gradient():
    torch.manual_seed(0)
    history = torch.randn(5, 3, 4, dtype=torch.float64)
    rows = history.flatten(1)
    mean = rows.square().sum(1).mean()
    for relative, damping, scale in ((False, 0.3, 1.0), (True, 0.3 * mean, 1.3 * mean)):
        dense = scale * torch.linalg.solve(damping * torch.eye(12) + rows.T @ rows, rows[2]).view(3, 4)
        torch.testing.assert_close(galore.natural(history, 2, 0.3, relative), dense)
        empty = torch.cat([history, torch.zeros(2, 3, 4)])
        torch.testing.assert_close(galore.natural(empty, 2, 0.3, relative), dense)  # rows of zeros count for nothing
    torch.testing.assert_close(galore.natural(history, 2, 1e9, True), history[2])
    torch.testing.assert_close(galore.natural(history[:1], 0, 0.3, True), history[0])
    alone = galore.natural(history[:1], 0, 0.3)
    torch.testing.assert_close(alone, history[0] / (0.3 + history[0].square().sum()))
    apart = torch.linalg.qr(rows.T).Q.T.view(5, 3, 4)
    torch.testing.assert_close(galore.natural(apart, 4, 0.3), apart[4] / 1.3)  # orthogonal gradients leave each other as they are


def test_old_gradients_are_forgotten_with_their_subspace():
    p, q = parameter(TALL), parameter(TALL)
    one, other = optim.NaturalGaLore([p], rank=3, update_proj_gap=4, history=3), optim.NaturalGaLore([q], rank=3, update_proj_gap=4, history=3, clear=False)
    stepped(one, p, 5), stepped(other, q, 5)
    assert one.state[p]["history"].flatten(1).any(1).tolist() == [False, True, False] and other.state[q]["history"].flatten(1).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (300,), (3, 4, 50), ()])
def test_memory_is_the_closed_forms(shape, bits, dtype):
    for kind, proj_type, rank in [("galore", each, 6) for each in galore.PROJ_TYPES] + [
        ("natural-galore", "std", 6),
        ("natural-galore", "full", 6),
        ("galore", "std", None),
    ]:
        p = parameter(shape, dtype)
        optimizer = KINDS[kind]([p], rank=rank, proj_type=proj_type, bits=bits)
        stepped(optimizer, p, 1)
        history = 4 if kind == "natural-galore" else 0
        assert optim.state_bytes(optimizer) == optim.shape_bytes(shape, rank, proj_type, bits, history, dtype)
        held = io.BytesIO()
        torch.save(optimizer.state_dict(), held)
        assert len(held.getvalue()) < optim.state_bytes(optimizer) + 6000  # a view would bring all that it is a part of


def test_memory_of_a_large_matrix():
    numbers = {"rank": 512, "dtype": torch.float32}
    big = (2048, 2048)
    assert optim.shape_bytes(big) == 4 * 8_388_608 and optim.shape_bytes(big, **numbers) == 4 * 3_145_728
    assert optim.shape_bytes(big, proj_type="full", history=20, **numbers) == 4 * 7_864_320
    assert optim.shape_bytes(big, history=20, **numbers) == 4 * 24_117_248
    assert optim.shape_bytes(big, bits=8) == 2 * (2048**2 + 4 * 2048**2 // 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_at_any_step_ends_in_the_same_bits(kind, bits, dtype):
    def start():
        ps = [parameter((24, 40), dtype), parameter((40, 24), dtype, 2), parameter((30,), dtype)]
        return ps, KINDS[kind]([{"params": ps[:2], "rank": 5}, {"params": ps[2:]}], update_proj_gap=3, bits=bits, weight_decay=0.01)

    def run(ps, optimizer, first, last):
        for k in range(first, last):
            for i, p in enumerate(ps):
                (p.grad,) = gradients(p, 1, 10 * k + i)
            optimizer.step()

    whole, optimizer = start()
    run(whole, optimizer, 0, 8)
    for cut in range(8):
        ps, first = start()
        run(ps, first, 0, cut)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        again, second = start()
        second.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            for p, q in zip(again, ps, strict=True):
                p.copy_(q)
        run(ps, first, cut, 8)  # shares nothing with the second
        run(again, second, cut, 8)
        assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
        for p, q in zip(whole, again, strict=True):
            one, other = optimizer.state[p], second.state[q]
            assert one.keys() == other.keys()
            assert all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype if torch.is_tensor(one[n]) else one[n] == other[n] for n in one)


def test_eight_bits():
    torch.manual_seed(0)
    x = torch.randn(1000) * 10.0 ** -torch.randint(0, 6, (1000,))
    for signed, value in ((True, x), (False, x.abs())):
        codes, scale = blockwise(value, galore.levels(signed))
        found = unblocked(codes, scale, galore.levels(signed))
        assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.shape == (4,)
        top = scale.repeat_interleave(BLOCK)[:1000]
        error, ratio = (found - value).abs() / top, value.abs() / top
        assert (error <= (0.9 / 128 if signed else 0.9 / 256) + 1e-6)[ratio.gt(0.1) & ratio.lt(0.99)].all()  # half a step of the highest decade
        assert error.max() < 0.01 and (found * value >= 0).all()
        assert torch.equal(blockwise(found, galore.levels(signed))[0], codes) or signed  # −1 is no level
    zeros = torch.zeros(7)
    for signed in (True, False):
        assert torch.equal(unblocked(*blockwise(zeros, galore.levels(signed)), galore.levels(signed)), zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [8, None])
def test_eight_bits_train_as_well(kind, rank):
    torch.manual_seed(0)
    target, x = torch.randn(40, 8) @ torch.randn(8, 24) / 3, torch.randn(200, 24)

    def last(bits):
        p = nn.Parameter(torch.zeros(40, 24))
        optimizer = KINDS[kind]([p], lr=0.02, rank=rank, bits=bits, update_proj_gap=20)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (x @ (p - target).T).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    first = (x @ target.T).square().mean().item()
    full, few = last(32), last(8)
    assert full < 0.2 * first and few < 1.25 * full


def test_groups_have_their_own_options():
    ps = [parameter(TALL, seed=i) for i in range(3)] + [parameter((5,))]
    together = optim.NaturalGaLore(
        [
            {"params": ps[0], "rank": 2},
            {"params": ps[1], "rank": 3, "scale": 0.5, "bits": 8, "damping": 0.1},
            {"params": ps[2:], "lr": 0.1, "betas": (0.5, 0.9)},
        ]
    )
    twins = copy.deepcopy(ps)
    apart = [
        optim.NaturalGaLore([twins[0]], rank=2), optim.NaturalGaLore([twins[1]], rank=3, scale=0.5, bits=8, damping=0.1), optim.GaLore(twins[2:], lr=0.1, betas=(0.5, 0.9))
    ]  # fmt: skip
    for k in range(3):
        for i, (p, q) in enumerate(zip(ps, twins, strict=True)):
            (p.grad,), (q.grad,) = gradients(p, 1, 10 * k + i), gradients(q, 1, 10 * k + i)
        together.step()
        [each.step() for each in apart]
    assert all(torch.equal(p, q) for p, q in zip(ps, twins, strict=True))
    assert set(together.state[ps[2]]) == {"step", "exp_avg", "exp_avg_sq"} == set(together.state[ps[3]])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_missing_zero_or_not_finite(kind):
    p, q = parameter(TALL, torch.float32), parameter(WIDE, torch.float32)
    optimizer, before = KINDS[kind]([p, q], rank=2), p.detach().clone()
    p.grad = torch.zeros_like(p)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(p, before) and q not in optimizer.state
    assert all(t.isfinite().all() for t in optimizer.state[p].values() if torch.is_tensor(t))
    q.grad = torch.full_like(q, math.nan)
    with pytest.raises(TunesmithError, match=r"gradient of a \(8, 12\) matrix"):
        optimizer.step()


@pytest.mark.parametrize("options,named", [
    ({"rank": 9}, "rank=9 is above 8"), ({"rank": 0}, "rank=0"), ({"rank": 2.5}, "rank=2.5"), ({"update_proj_gap": 0}, "update_proj_gap=0"),
    ({"scale": 0}, "scale=0"), ({"proj_type": "both"}, "one of std, reverse_std"), ({"bits": 4}, "8 or 32"), ({"lr": -1}, "lr=-1"), ({"eps": 0.0}, "eps=0.0"),
    ({"betas": (0.9, 1.0)}, "betas="), ({"weight_decay": -1}, "weight_decay=-1"), ({"rnk": 3}, "did you mean 'rank'"), ({"history": 0}, "history=0"),
    ({"damping": "x"}, "damping='x'"), ({"relative": 1}, "relative=1"),
])  # fmt: skip
def test_options_are_checked(options, named):
    with pytest.raises(TunesmithError, match=named.replace("(", r"\(")):
        optim.NaturalGaLore([parameter(TALL)], **options)
    optimizer = optim.NaturalGaLore([parameter(TALL)])
    with pytest.raises(TunesmithError):
        optimizer.add_param_group({"params": [parameter(WIDE)], "rank": 99})
    assert len(optimizer.param_groups) == 1


def test_history_is_no_option_of_galore():
    with pytest.raises(TunesmithError, match="GaLore has no option 'history'"):
        optim.GaLore([parameter(TALL)], history=3)


def paths(model, optimizer, chosen):
    names = {id(p): name for name, p in ts.trainable(model).items()}
    return {names[id(p)] for group in optimizer.param_groups if chosen(group) for p in group["params"]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_projected_in_full_fine_tuning(kind):
    model = ts.adapt(tiny.tiny_llama(), "full")
    optimizer = optim.build(model, {"optimizer": kind, "rank": 16, "bits": 8}, lr=0.02, weight_decay=0.1, betas=(0.8, 0.99))
    assert isinstance(optimizer, KINDS[kind]) and all(group["betas"] == (0.8, 0.99) for group in optimizer.param_groups)
    own = {name: p for name, p in ts.trainable(model).items()}
    projected = paths(model, optimizer, lambda group: group["rank"])
    narrow = {name for name in own if "k_proj" in name or "v_proj" in name}  # 16 rows
    vectors = {name for name, p in own.items() if p.dim() < 2}
    embeddings = {name for name in own if "embed" in name}
    assert narrow and vectors and embeddings and projected == own.keys() - narrow - vectors - embeddings
    assert paths(model, optimizer, lambda group: group["weight_decay"] == 0 and group["bits"] == 32) == vectors
    assert paths(model, optimizer, lambda group: True) == own.keys()


def test_adapters_beside_projected_matrices():
    model = ts.adapt(
        tiny.tiny_llama(),
        {"method": "lora", "rank": 4, "lr_ratio": 8, "targets": {"q_proj": {}, "down_proj": {"method": "full"}}, "modules_to_save": ["lm_head"]},
    )
    optimizer = optim.build(model, {"optimizer": "galore", "rank": 8, "update_proj_gap": 2}, lr=0.01, head_lr=0.03)
    projected = paths(model, optimizer, lambda group: group["rank"])
    assert {name.split(".tunesmith")[0].split(".")[-1] for name in projected} == {"down_proj", "lm_head"}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.08, 0.03}
    torch.manual_seed(0)
    ids, losses = torch.randint(3, tiny.VOCAB, (4, 12)), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_build_refuses():
    model = ts.adapt(tiny.tiny_llama(), "full")
    for name, named in [
        ("galore", "both sides above rank=128"), ({"optimizer": "galore", "rank": "8"}, "rank='8'"), ({"optimizer": "galor"}, "did you mean 'galore'"), ({"rank": 8}, "unknown optimizer None"),
        ({"optimizer": "galore", "history": 3}, "galore has no option 'history'"), ({"optimizer": "natural-galore", "lr": 1}, "no option 'lr'"),
        ({"optimizer": "adamw", "rank": 3}, "adamw has no option 'rank'"), ({"optimizer": "adamw", "eps": -1}, "AdamW refuses its options: Invalid epsilon value: -1"), ({"optimizer": "galore", "rank": 8, "scale": "x"}, "scale='x'"),
    ]:  # fmt: skip
        with pytest.raises(TunesmithError, match=named):
            optim.build(model, name)
    assert optim.build(model, {"optimizer": "adamw", "eps": 1e-6}).defaults["eps"] == 1e-6 and optim.build(model).defaults["fused"]
    assert optim.build(model, {"optimizer": "adamw", "foreach": True}).defaults["fused"] is None


@pytest.mark.parametrize("options", [
    {"optimizer": "galore", "rank": 8, "update_proj_gap": 4}, {"optimizer": "natural-galore", "rank": 8, "update_proj_gap": 4, "bits": 8, "history": 3},
])  # fmt: skip
def test_a_killed_run_ends_in_the_same_bits(here, models, data, options):
    resume.test_a_killed_run_ends_in_the_same_bits(here, models, data, "llama", "sums", "full", {"optimizer": options})
