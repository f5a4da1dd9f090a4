"""MoLA: allocation, routing, balance loss, counts."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.methods.mola import MoLALayer, balance_loss, gates
from tunesmith.methods.select import layers
from tunesmith.train.prepare import prepare


def stack(depth, d=16, f=24, device=None):
    """The seven linear layers of each of `depth` decoder layers, called one after the other."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q", "k", "v", "o"):
                setattr(self, name, nn.Linear(d, d, bias=False, device=device))
            self.gate, self.up, self.down = (nn.Linear(i, o, bias=False, device=device) for i, o in ((d, f), (d, f), (f, d)))

        def forward(self, x):
            x = x + self.o(self.q(x) * self.k(x) + self.v(x))
            return x + self.down(self.gate(x).tanh() * self.up(x))

    torch.manual_seed(0)
    return nn.Sequential(nn.ModuleList([Layer() for _ in range(depth)]), nn.Linear(d, d, device=device))


def run(model, x):
    for layer in model[0]:
        x = layer(x)
    return model[1](x)


def experts(model):
    return {path: len(a.R) for path, a in adapters(model, "default").items()}


def stirred(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def one(experts=4, out=10, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(nn.Linear(12, out, dtype=dtype)), ts.MoLA(experts=experts, rank=3, **fields), targets=["0"])
    return stirred(model), model[0].tunesmith.adapters["default"], torch.randn(2, 5, 12, dtype=dtype)


@pytest.mark.parametrize("allocation,expert_layers,adapter,router,percent", [
    ("inverted-triangle", 160, 99_942_400, 5_693_440, 1.57), ("rectangle", 160, 99_942_400, 5_693_440, 1.57), ("8888", 256, 159_907_840, 9_109_504, 2.51),
])  # fmt: skip
def test_counts_of_the_paper(allocation, expert_layers, adapter, router, percent):
    model = ts.adapt(stack(32, 4096, 11008, "meta"), ts.MoLA(experts=allocation), targets=["q", "k", "v", "o", "gate", "up", "down"])
    parts = {name: sum(getattr(a, name).numel() for a in adapters(model, "default").values()) for name in "ABR"}
    assert (parts["A"] + parts["B"], parts["R"]) == (adapter, router) and sum(experts(model).values()) == 7 * expert_layers
    assert ts.summary(model).trainable == adapter + router and round(100 * (adapter + router) / 6_738_415_616, 2) == percent
    assert sum(c.count(model.get_submodule(p).tunesmith.site) for p, c in model.__dict__["_tunesmith"].records["default"].sites.items()) == adapter + router


@pytest.mark.parametrize("given,depth,expected", [
    ("inverted-triangle", 4, "2468"), ("triangle", 4, "8642"), ("hourglass", 4, "8228"), ("rectangle", 4, "5555"), ("2468", 8, "22446688"), (2468, 4, "2468"),
    ("2468", 6, "224668"), ("2468", 7, "2244668"), ("2468", 2, "26"), ("2468", 1, "2"), ("13", 3, "113"), ("7", 3, "777"), (3, 2, "33"), ([1, 5, 2], 3, "152"),
])  # fmt: skip
def test_experts_over_depth(given, depth, expected):
    model = ts.adapt(stack(depth, 2, 2, "meta"), ts.MoLA(experts=given), targets=["q", "down"])
    assert [experts(model)[f"0.{i}.q"] for i in range(depth)] == [experts(model)[f"0.{i}.down"] for i in range(depth)] == [int(e) for e in expected]


@pytest.mark.parametrize("depth", range(1, 40))
def test_blocks_differ_by_at_most_one_layer(depth):
    blocks = [ts.MoLA(experts="1234")._allotted("s", i, depth) for i in range(depth)]
    sizes = [blocks.count(b) for b in (1, 2, 3, 4)]
    assert blocks == sorted(blocks) and max(sizes) - min(sizes) <= 1


def test_layers_of_models():
    t5 = layers(tiny.tiny_t5(layers=3))
    assert t5["encoder.block.1.layer.0.SelfAttention.q"] == ("encoder.block", 1, 3) and t5["decoder.block.2.layer.1.EncDecAttention.k"] == ("decoder.block", 2, 3)
    bert = layers(tiny.tiny_bert())
    assert bert["bert.embeddings.word_embeddings"] == ("bert.encoder.layer", 0, 2) and bert["bert.encoder.layer.1.output.dense"] == bert["bert.pooler.dense"] == ("bert.encoder.layer", 1, 2)
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    nested = layers(nn.Sequential(nn.Embedding(4, 8), encoder, nn.Linear(8, 2)))
    assert nested["1.layers.1.linear1"] == ("1.layers", 1, 3) and nested["0"] == ("1.layers", 0, 3) and nested["2"] == ("1.layers", 2, 3)
    assert layers(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))["2"] == ("", 1, 2)
    assert layers(tiny.tiny_gpt2())["transformer.h.1.mlp.c_fc"] == ("transformer.h", 1, 2)


def test_a_target_may_have_its_own_experts_and_another_model_of_the_file_too(tmp_path):
    model = ts.adapt(tiny.tiny_llama(), ts.MoLA(targets={"q_proj": {"experts": 3, "top_k": 1}, "v_proj": {}, "down_proj": {"method": "lora"}}))
    assert [len(a.R) for p, a in adapters(model, "default").items() if p.endswith("q_proj")] == [3, 3]
    assert [len(a.R) for p, a in adapters(model, "default").items() if p.endswith("v_proj")] == [2, 6]
    stirred(model)
    batch = tiny.batch("llama")
    ts.save(model, tmp_path / "a")
    other = ts.load(tiny.tiny_llama(), tmp_path / "a").train()
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    assert ts.auxiliary_loss(other).item() == ts.auxiliary_loss(model).item() > 0
    mixed = ts.adapt(tiny.tiny_llama(), ts.LoRA(targets={"q_proj": {"method": "mola", "experts": 2}, "k_proj": {}}))
    assert isinstance(adapters(mixed, "default")["model.layers.0.self_attn.q_proj"], MoLALayer)


def test_what_is_refused():
    for match, fields in {
        "no allocation .did you mean 'triangle'": {"experts": "triange"},
        "'2048' is no allocation": {"experts": 2048},
        "experts.*not valid": {"experts": 0},
        "nothing but the balance loss teaches": {"top_k": 1, "balance": 0},
        "top_k=0 is not valid": {"top_k": 0},
    }.items():
        with pytest.raises(ts.TunesmithError, match=match):
            ts.MoLA(**fields)
    assert ts.MoLA(experts=1, top_k=1, balance=0).experts == 1
    with pytest.raises(ts.TunesmithError, match="experts lists 3 layers and model.layers has 2"):
        ts.adapt(tiny.tiny_llama(), ts.MoLA(experts=[1, 2, 3]))
    with pytest.raises(ts.TunesmithError, match="needs experts as one number"):
        ts.adapt(tiny.tiny_llama(), ts.LoRA(targets={"q_proj": {"method": "mola"}}))
    model = ts.adapt(tiny.tiny_llama(), ts.MoLA(experts="12"))
    with pytest.raises(ts.TunesmithError, match="'default' .mola. cannot be merged: at 'model.layers.1.*experts=1"):
        ts.merge(model)


def test_gates():
    logits = torch.randn(50, 6)
    for k in (1, 2, 5, 6, 9):
        w, p = gates(logits, k), logits.softmax(1)
        assert ((w > 0).sum(1) == min(k, 6)).all() and torch.allclose(w.sum(1), torch.ones(50))
        expected = torch.where(w > 0, p, 0) / torch.where(w > 0, p, 0).sum(1, keepdim=True)
        torch.testing.assert_close(w, expected)
        assert (p[w > 0].view(50, -1).amin(1) >= torch.where(w > 0, 0, p).amax(1)).all()
    assert gates(logits.bfloat16(), 2).dtype == torch.float32 and gates(logits.double(), 2).dtype == torch.float64


def test_one_expert_is_lora_and_merges():
    model, adapter, x = one(experts=1, dtype=torch.float64)
    lora = ts.adapt(copy.deepcopy(ts.detach(copy.deepcopy(model))), ts.LoRA(rank=3), targets=["0"])
    plain = lora[0].tunesmith.adapters["default"]
    with torch.no_grad():
        plain.A.copy_(adapter.A[0]), plain.B.copy_(adapter.B[0])
    torch.testing.assert_close(model(x), lora(x))
    expected = model(x)
    torch.testing.assert_close(ts.merge(model)(x), expected)


def test_as_many_chosen_as_there_are_is_the_softmax_mixture_and_their_order_is_free():
    model, adapter, x = one(experts=4, top_k=4)
    base = ts.detach(copy.deepcopy(model))
    p = (x @ adapter.R.T).softmax(-1)
    experts = torch.stack([x @ A.T @ B.T for A, B in zip(adapter.A, adapter.B, strict=True)], -1)
    torch.testing.assert_close(model(x), base(x) + 16 / 3 * (experts * p[..., None, :]).sum(-1))
    model, adapter, x = one(experts=4)
    y, order = model(x), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for p in (adapter.A, adapter.B, adapter.R):
            p.copy_(p[order].clone())
    torch.testing.assert_close(model(x), y)


def test_balance_loss_is_one_when_balanced():
    assert balance_loss(torch.zeros(20, 4), 4).item() == pytest.approx(1)
    assert balance_loss(torch.randn(20, 3), 3).item() == pytest.approx(1)
    assert balance_loss(torch.eye(4).repeat(5, 1), 1).item() == pytest.approx(1)
    assert balance_loss(5 * torch.eye(4)[:1].repeat(5, 1), 1).item() > 3.5


def test_the_router_learns_from_the_task_with_two_and_from_the_balance_with_one():
    model, adapter, x = one(top_k=2)
    model(x).square().mean().backward()
    assert adapter.R.grad.abs().sum() > 0
    model, adapter, x = one(top_k=1)
    model(x).square().mean().backward()
    assert adapter.R.grad.abs().max() < 1e-7
    model(x)
    ts.auxiliary_loss(model).backward()
    assert adapter.R.grad.abs().max() > 1e-6


def test_experts_without_tokens_get_no_gradient():
    model, adapter, x = one(experts=6)
    model(x[:1, :1]).square().sum().backward()
    used = adapter.A.grad.flatten(1).abs().sum(1) > 0
    assert used.sum() == 2 and torch.equal(used, adapter.B.grad.flatten(1).abs().sum(1) > 0)


def test_dropout_reaches_the_experts_and_not_the_router():
    model, adapter, x = one(dropout=0.5)
    quiet = model.eval()(x)
    logits = adapter.logits
    torch.manual_seed(1)
    noisy = torch.stack([model.train()(x) for _ in range(600)])
    torch.testing.assert_close(adapter.logits, logits)
    assert not torch.equal(noisy[0], noisy[1])
    torch.testing.assert_close(noisy.mean(0), quiet, atol=0.25 * quiet.std().item(), rtol=0)
    assert torch.equal(model.eval()(x), quiet)


def test_the_balance_loss_of_a_layer_is_that_of_all_its_modules():
    model = stirred(ts.adapt(stack(4), ts.MoLA(balance=0.5), targets=["q", "up", "1"]))
    x = torch.randn(2, 3, 16)
    run(model, x)
    run(model, torch.randn(2, 3, 16))
    loss = ts.auxiliary_loss(model)
    found = adapters(model, "default")
    assert found["1"].place == ("0", 3) and len(found["1"].R) == 8  # the layer after the last one
    by_layer = [[found[f"0.{i}.q"].logits, found[f"0.{i}.up"].logits] + [found["1"].logits] * (i == 3) for i in range(4)]
    torch.testing.assert_close(loss, 0.5 * sum(balance_loss(torch.cat(rows), 2) for rows in by_layer))
    loss.backward()
    assert all(a.R.grad.abs().max() > 1e-6 for a in found.values()) and found["1"].A.grad.abs().max() == 0


def test_logits_are_there_for_the_last_forward_only_and_never_travel():
    model, adapter, x = one()
    model(x)
    assert adapter.logits.shape == (10, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[0].tunesmith.adapters["default"].logits is None and ts.auxiliary_loss(twin) is None
    with torch.no_grad():
        model(x)
    assert adapter.logits is None and ts.auxiliary_loss(model) is None
    with torch.inference_mode():
        model(x)
    assert adapter.logits is None
    model(x[:1])
    assert adapter.logits.shape == (5, 4)
    plain, adapter, x = one(balance=0)
    plain(x)
    assert adapter.logits is None and ts.auxiliary_loss(plain) is None


def test_balance_under_gradient_checkpointing():
    batch, seen = tiny.batch("llama"), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = stirred(ts.adapt(tiny.tiny_llama(), ts.MoLA(experts=4, balance=0.1)))
        prepare(model, gradient_checkpointing=checkpointing)
        loss = model(**batch).logits.square().mean() + ts.auxiliary_loss(model)
        kept = [a.logits for a in adapters(model, "default").values()]
        loss.backward()
        assert all(a.logits is l for a, l in zip(adapters(model, "default").values(), kept, strict=True))  # not those computed anew
        seen.append({path: p.grad for path, p in ts.trainable(model).items()})
    for path, grad in seen[0].items():
        torch.testing.assert_close(seen[1][path], grad, atol=1e-6, rtol=1e-4)


def test_balance_when_compiled():
    torch._dynamo.reset()
    model, adapter, x = one(balance=0.1)
    model(x)
    expected = ts.auxiliary_loss(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    found = ts.auxiliary_loss(model)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert adapter.R.grad.abs().max() > 0


def test_over_another_adapter():
    model, adapter, x = one()
    ts.adapt(model, "dora", name="below", targets=["0"])
    with torch.no_grad():
        model[0].tunesmith.adapters["below"].B.normal_()
        ts.activate(model, "below")
        below = model(x)
        ts.activate(model, ["below", "default"])
        both = model(x)
        ts.activate(model, "default")
        change = model(x) - F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(both, below + change)


def test_learns_what_one_lora_of_that_rank_cannot():
    """Two groups of tokens whose true changes differ: rank 1 each, rank 2 together."""
    torch.manual_seed(0)
    sign = torch.ones(64, 1)
    sign[::2] = -1
    x = torch.cat([3 * sign, torch.randn(64, 7)], 1)
    u, v = torch.randn(2, 6), torch.randn(2, 8)
    which = (sign[:, 0] > 0).long()
    target = (x * v[which]).sum(1, keepdim=True) * u[which]
    final = {}
    for name, method in (("mola", ts.MoLA(experts=4, top_k=2, rank=1, alpha=1, balance=0.01)), ("lora", ts.LoRA(rank=1, alpha=1))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 6))
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        ts.adapt(model, method, targets=["0"])
        optimizer = torch.optim.Adam(ts.trainable(model).values(), lr=3e-2)
        for _ in range(150):
            loss = (model(x) - target).square().mean()
            extra = ts.auxiliary_loss(model)
            optimizer.zero_grad()
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
        final[name] = loss.item()
    assert final["mola"] < 0.25 * final["lora"]
