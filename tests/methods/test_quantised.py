"""What PEQA, SketchTune, LoftQ and QWHA promise beyond the contract."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.engine import hadamard
from tunesmith.engine.model import adapters
from tunesmith.methods import LoftQ
from tunesmith.methods.qwha import BASES, start
from tunesmith.quantize import Format, PackedWeight, packed_weights, quantize


def base(format, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))
    return quantize(net, format, targets=["0", "2"], **options)


def fit(model, steps=20, lr=None):
    torch.manual_seed(1)
    x, y = torch.randn(64, 48), torch.randn(64, 4)
    optimizer = optim.build(model, lr=lr)
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, x


def test_two_tasks_of_peqa_share_the_integers():
    model = base({"format": "int4", "group_size": 16})
    codes = {path: w.parts["codes"].clone() for path, w in packed_weights(model).items()}
    x = torch.randn(5, 48)
    alone = model(x)
    outputs = {}
    for name in ("a", "b"):
        ts.adapt(model, "peqa", name=name, targets=["0", "2"])
        assert torch.equal(model(x), alone)  # scales begin as they were
        losses, _ = fit(model, 5 if name == "a" else 15, lr=2e-2)
        assert losses[-1] < losses[0]
        outputs[name] = model(x).detach()
    for name, wanted in outputs.items():
        ts.activate(model, name)
        assert torch.equal(model(x), wanted)
    assert all(torch.equal(w.parts["codes"], codes[path]) for path, w in packed_weights(model).items())
    before = packed_weights(model)["0.weight"]
    ts.merge(model)
    after = packed_weights(model)["0.weight"]
    assert after.nbytes == before.nbytes and torch.equal(after.parts["codes"], before.parts["codes"]) and torch.equal(model(x), outputs["b"])


def test_scales_keep_their_sign():
    model = ts.adapt(base({"format": "int4", "group_size": "row"}), "peqa", targets=["0", "2"])
    before = {path: adapter.read(packed_weights(model)[f"{path}.weight"])[1] for path, adapter in adapters(model, "default").items()}
    fit(model, 30, lr=0.3)
    for path, adapter in adapters(model, "default").items():
        now = adapter.read(packed_weights(model)[f"{path}.weight"])[1]
        assert (now > 0).all() and not torch.equal(now, before[path])


def test_peqa_counts_of_llama():
    """1,359,872 scales of LLaMA-7B, a row each: the paper's 1.36M."""
    layers = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(size, out, bias=False) for out, size in layers))
    counts = [ts.methods.parse("peqa").count(site) for site in ts.engine.sites.sites(net)]
    assert 32 * sum(counts) == 1_359_872
    for groups, count in ((1, 21_757_952), (2, 43_515_904), (4, 87_031_808), (8, 174_063_616)):
        method = ts.methods.parse({"method": "sketchtune", "groups_per_row": groups})
        assert 32 * sum(method.count(site) for site in ts.engine.sites.sites(net)) == count


def test_sketchtune_changes_buckets_whole():
    model = base("sketch3")
    x = torch.randn(5, 48)
    alone = model(x)
    W = packed_weights(model)["0.weight"].dequantize()
    ts.adapt(model, "sketchtune", targets=["0", "2"])
    assert torch.equal(model(x), alone)
    losses, _ = fit(model, 30, lr=3e-3)
    assert losses[-1] < 0.9 * losses[0]
    ts.merge(model)
    change = packed_weights(model)["0.weight"].dequantize() - W
    assert torch.linalg.matrix_rank(change) > 20
    for old, new in zip(W, change, strict=True):
        assert len(old.unique()) <= 8
        assert all(len(new[old == value].unique()) == 1 for value in old.unique())


@pytest.mark.parametrize(("method", "format"), [("peqa", "nf4"), ("peqa", "sketch4"), ("sketchtune", "int4")])
def test_a_base_without_the_part_is_refused(method, format):
    with pytest.raises(ts.TunesmithError, match=f"is in {format}, which has no (scale|table) to train; quantise the base to"):
        ts.adapt(base(format), method, targets=["0", "2"])


def test_loftq_starts_nearer_to_the_model():
    torch.manual_seed(0)
    x, errors = torch.randn(100, 48), {}
    for name, options, method in (
        ("lora", {}, "lora"),
        ("loftq", {"keep": True}, LoftQ(rank=8)),
        ("loftq in five turns", {"keep": True, "rounding": LoftQ(rank=8, iterations=5).rounding}, LoftQ(rank=8, alpha=32)),
    ):
        plain, model = dequantised_net(), base("nf3", **options)
        ts.adapt(model, method, targets=["0", "2"])
        errors[name] = (model(x) - plain(x)).square().mean().item()
    assert errors["loftq in five turns"] < errors["loftq"] < errors["lora"]
    full = ts.adapt(base("nf3", keep=True), LoftQ(rank=48), targets=["0", "2"])
    assert torch.allclose(full(x), dequantised_net()(x), atol=1e-4)


def dequantised_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def test_qwha_undoes_more_than_loftq_and_random_entries():
    torch.manual_seed(0)
    x = torch.randn(200, 48) @ torch.randn(48, 48)
    plain, errors = dequantised_net(), {}

    def calibrate(model):
        model(x).square().mean().backward()

    for name, method, given in (
        ("nothing", "lora", {}), ("loftq", {"method": "loftq", "rank": 4}, {}),
        ("qwha without data", {"method": "qwha", "rank": 4}, {}), ("qwha", {"method": "qwha", "rank": 4}, {"calibrate": calibrate}),
    ):  # fmt: skip
        model = base("int2", keep=True)
        ts.adapt(model, method, targets=["0", "2"], **given)
        errors[name] = (model(x) - plain(x)).square().mean().item()
    assert errors["qwha"] < errors["qwha without data"] < errors["nothing"]
    assert errors["qwha"] < errors["loftq"] < errors["nothing"]


def test_moments_of_a_large_model_are_gathered_in_parts(monkeypatch):
    x, calls, found = torch.randn(50, 48), [], []
    for at_once in (2**30, 2500):  # two layers with 48² and 64²
        monkeypatch.setattr("tunesmith.engine.calls.AT_ONCE", at_once)
        model, before = base("int2", keep=True), len(calls)
        ts.adapt(model, {"method": "qwha", "rank": 4}, targets=["0", "2"], calibrate=lambda model: calls.append(model(x)))
        found.append((len(calls) - before, ts.trainable(model)))
    assert [n for n, _ in found] == [1, 2]
    assert all(torch.equal(p, found[1][1][path]) for path, p in found[0][1].items())


@pytest.mark.parametrize("n", [2, 8, 12, 20, 24, 28, 36, 40, 44, 48, 52, 60, 76, 96, 104, 108, 140, 148, 156, 172, 344, 576])
def test_hadamard_matrices(n):
    H = hadamard.transform(torch.eye(n, dtype=torch.float64))
    assert (H.abs() == 1).all() and torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(hadamard.transform(x), x @ H) and torch.allclose(hadamard.transform(x, transpose=True), x @ H.T)


def test_the_cosine_baseline():
    x = torch.eye(30, dtype=torch.float64)
    C = BASES["cosine"](x)
    assert torch.allclose(C @ C.T, 30 * x) and torch.allclose(BASES["cosine"](x, transpose=True), C.T)
    error = torch.randn(6, 30, dtype=torch.float64)
    index, c = start(error, None, error.numel(), 1.0, "cosine")  # all entries: nothing is left
    F = torch.zeros(error.numel(), dtype=error.dtype).index_put((index,), c).view(error.shape)
    assert torch.allclose(BASES["cosine"](F, transpose=True), error)
    model = ts.adapt(nn.Sequential(nn.Linear(30, 6)), {"method": "qwha", "basis": "cosine"}, targets="0")
    assert ts.summary(model).trainable == min(8 * 36, 6 * 30)


def test_lengths_without_a_matrix_go_to_the_next():
    assert hadamard.length(30) == 32 and hadamard.length(11) == 12 and hadamard.length(18944) == 18944
    with pytest.raises(ValueError, match="order 30"):
        hadamard.transform(torch.randn(30))
    model = ts.adapt(nn.Sequential(nn.Linear(30, 6)), "qwha", targets="0")
    with torch.no_grad():
        model[0].tunesmith.adapters["default"].c.normal_()
        few = model(x := torch.randn(3, 30))
    assert torch.allclose(few, model(x), atol=1e-5)


def test_qwha_entries_of_llama():
    """As many as LoRA of rank 64 trains in LLaMA-3.2-3B: 3,473,408 a layer."""
    layers = [(3072, 3072), (1024, 3072), (1024, 3072), (3072, 3072), (8192, 3072), (8192, 3072), (3072, 8192)]
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(size, out, bias=False) for out, size in layers))
    assert sum(ts.methods.parse({"method": "qwha", "rank": 64}).count(site) for site in ts.engine.sites.sites(net)) == 3_473_408


def test_quantised_training_keeps_one_matrix_at_a_time(tmp_path):
    model = quantize(tiny.BUILDERS["llama"](), "int4")
    ts.adapt(model, "peqa")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**tiny.batch("llama", 2)).logits.sum()
    shapes = {tuple(w.shape) for w in packed_weights(model).values()}
    assert not [t for t in kept if tuple(t.shape) in shapes and not isinstance(t, PackedWeight) and t.dim() == 2 and t.is_floating_point() and not t.requires_grad]
    assert Format(format="int4").bytes((64, 64)) == 64 * 64 // 2 + 64 * 3


@pytest.mark.parametrize("format", [None, "int4"])
def test_what_stands_for_the_whole_weight_is_put_first(format):
    model = tiny.BUILDERS["llama"]()
    if format:
        ts.quantize(model, format)
    ts.adapt(model, "lora", name="l")
    ts.adapt(model, "peqa", name="p")
    with pytest.raises(ts.TunesmithError, match="'p' stands for the whole weight of .*'l' would have no effect"):
        ts.activate(model, ["l", "p"])
    ts.activate(model, ["p", "l"])
    ts.merge(ts.activate(model, "l") or model)
    with pytest.raises(ts.TunesmithError, match="'p' stands for the whole weight"):
        ts.activate(model, "p")
    ts.adapt(model, "peqa", name="later")  # rounds what the merge left
    with pytest.raises(ts.TunesmithError, match="PEQALayer stands for the whole weight"):
        ts.adapt(tiny.BUILDERS["llama"](), {"method": "combined", "parts": ["lora", "peqa"]})
    ts.adapt(tiny.BUILDERS["llama"](), {"method": "combined", "parts": ["peqa", "lora"]})


def test_tables_do_not_decay():
    model = ts.adapt(tiny.BUILDERS["llama"](), "sketchtune")
    assert all(group["weight_decay"] == 0 for group in optim.build(model, weight_decay=0.1).param_groups)


@pytest.mark.parametrize("width", [5, 6])
def test_qwha_with_every_coefficient_free_leaves_nothing(width):
    torch.manual_seed(0)
    error = torch.randn(64, width, dtype=torch.float64)
    order = hadamard.length(width)
    index, c = start(error, None, 64 * order, 1.0)
    F = torch.zeros(64 * order, dtype=torch.float64).index_put((index,), c).view(64, order)
    torch.testing.assert_close(BASES["hadamard"](F, transpose=True)[:, :width], error, atol=1e-6, rtol=1e-6)
