"""S²FT: which units train, what is kept, and that permuting coupled weights changes nothing."""

import copy

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.contract.zoo import attention_net, inputs, logits, same
from tunesmith.engine.fused import sparse_linear
from tunesmith.engine.model import adapters
from tunesmith.methods.select import coupled

BOTH = {"method": "s2ft", "heads": 0.5, "channels": 0.2, "value_heads": 0.5, "up_channels": 0.1}


def make(kind, dtype=torch.float64):
    builders = tiny.BUILDERS | {"attention": attention_net, "gqa": lambda: tiny.tiny_llama(num_key_value_heads=2)}
    return builders[kind]().to(dtype)


def stirred(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


BLOCKS = {
    "llama": {"o_proj": {"q_proj", "k_proj", "v_proj"}, "down_proj": {"gate_proj", "up_proj"}}, "gpt2": {"attn.c_proj": {"c_attn"}, "mlp.c_proj": {"c_fc"}},
    "bert": {"attention.output.dense": {"query", "key", "value"}, "layer.0.output.dense": {"dense"}, "layer.1.output.dense": {"dense"}},
    "t5": {"SelfAttention.o": {"q", "k", "v"}, "EncDecAttention.o": {"q", "k", "v"}, "wo": {"wi"}}, "attention": {"out_proj": {"in_proj"}, "linear2": {"linear1"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
def test_coupled_layers_are_found(kind):
    found = coupled(make(kind))
    for block in found:
        (inner,) = (names for end, names in BLOCKS[kind].items() if block.outer.path.endswith(end))
        assert {s.path.split(".")[-1] for s in block.inner} == inner
    assert {end for end in BLOCKS[kind]} == {end for end in BLOCKS[kind] if any(block.outer.path.endswith(end) for block in found)}


@pytest.mark.parametrize("ffn,groups,fields,total", [
    (14336, 8, {"heads": 0, "channels": 0.03}, 56_369_152), (11008, 32, {"heads": 0.052, "channels": 0.02}, 56_643_584),
])  # fmt: skip
def test_counts_of_llama(ffn, groups, fields, total):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=4096, intermediate_size=ffn, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=groups))
    assert ts.summary(ts.adapt(model, ts.S2FT(**fields))).trainable == total


def test_units_are_drawn_over_all_layers_and_whole():
    for seed in range(5):
        model = ts.adapt(make("gqa"), ts.S2FT(heads=0.5, channels=0.2, seed=seed))
        own = adapters(model, "default")
        heads = [a.index.view(-1, 16) for path, a in own.items() if path.endswith("o_proj")]  # 2 query heads of width 8 for each of 2 units
        assert sum(len(h) for h in heads) == 2 and all((h == h[:, :1] + torch.arange(16)).all() and (h[:, 0] % 16 == 0).all() for h in heads)
        widths = [s.in_features for s in (block.outer for block in coupled(model) if block.kind == "channels")]
        assert sum(len(a.index) for path, a in own.items() if path.endswith("down_proj")) == int(0.2 * sum(widths))


@pytest.mark.parametrize("choice", ["weight", "activation", "product", "gradient"])
def test_choices(choice):
    batch = inputs("llama", dtype=torch.float64)
    for largest in (False, True):
        model = ts.adapt(make("llama"), ts.S2FT(heads=0, channels=0.1, choice=choice, largest=largest), calibrate=lambda m: logits(m, batch).square().mean().backward())
        base = make("llama")
        down, seen = base.model.layers[0].mlp.down_proj, []
        down.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach().abs()[batch["attention_mask"].bool()].mean(0)))
        logits(base, batch).square().mean().backward()
        weight = down.weight.detach().norm(dim=0)
        score = {"weight": weight, "activation": seen[0], "product": seen[0] * weight, "gradient": down.weight.grad.norm(dim=0)}[choice]
        chosen = adapters(model, "default")["model.layers.0.mlp.down_proj"].index.tolist()
        assert chosen == sorted(score.argsort(descending=largest)[: len(chosen)].tolist())


def test_rows_have_no_activations_to_choose_by():
    batch = inputs("llama", dtype=torch.float64)
    with pytest.raises(ts.TunesmithError, match="choice='activation' needs the inputs"):
        ts.adapt(make("llama"), BOTH | {"choice": "activation"}, calibrate=lambda m: logits(m, batch).square().mean().backward())


@pytest.mark.parametrize("kind", ["llama", "gqa", "gpt2", "bert", "vit", "attention"])
def test_permuting_changes_nothing(kind):
    model, batch = make(kind), inputs("llama" if kind == "gqa" else kind, dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stirred(ts.adapt(model, BOTH))
    expected, saved = logits(model, batch), {path: (a.index.clone(), a.v.detach().clone()) for path, a in adapters(model, "default").items()}
    with ts.co_permuted(model):
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-12, rtol=0)
        for a in adapters(model, "default").values():
            assert a.index.max() - a.index.min() == len(a.index) - 1
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    for path, a in adapters(model, "default").items():
        assert torch.equal(a.index, saved[path][0]) and torch.equal(a.v, saved[path][1])
    ts.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_trains_permuted_is_the_same_adapter():
    models = [ts.adapt(make("gqa"), BOTH) for _ in range(2)]
    batch = inputs("llama", dtype=torch.float64)

    def train(model):
        for _ in range(3):
            optimizers[model].zero_grad()
            logits(model, batch).square().mean().backward()
            optimizers[model].step()

    optimizers = {model: torch.optim.Adam(ts.trainable(model).values(), lr=0.01) for model in models}
    for _ in range(2):  # the optimiser's state goes on across the border
        train(models[0])
        with ts.co_permuted(models[1]):
            train(models[1])
        train(models[0])
        train(models[1])
    for a, b in zip(*(ts.trainable(m).values() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


class Normed(nn.Module):
    """A feed-forward block whose channels a norm tells apart."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)


def chain():
    """Feed-forward blocks without a module of their own, of which nothing says which layer reads which."""
    return nn.Sequential(*(layer for _ in range(2) for layer in (nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))), nn.Linear(8, 8), nn.Linear(8, 2))


def olmo2():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0))


def tied():
    model = make("llama")
    one, other = model.model.layers
    other.mlp.up_proj.weight = one.mlp.up_proj.weight
    return model


def with_a_second():
    return ts.adapt(make("llama"), "lora", name="other")


@pytest.mark.parametrize("build,fields,match", [
    (with_a_second, {}, "attach one s2ft adapter alone"),
    (lambda: make("t5"), {"heads": 0.5}, "position biases.*heads=0"),
    (olmo2, {"heads": 0.5}, "a norm.*heads=0"),
    (lambda: nn.Sequential(nn.Linear(8, 8), Normed(), nn.Linear(8, 2)), {}, "channels that '1.down' reads"),
    (chain, {}, "channels that '[25]' reads"),
    (tied, {"heads": 0}, "shares their weights"),
    (lambda: make("llama"), {"targets": "all-linear"}, "cannot move what trains at 'model.layers.0.self_attn.q_proj'"),
    (lambda: make("llama"), {"targets": {"o_proj": {}, "gate_proj": {"method": "lora"}}}, "cannot move what trains at 'model.layers.0.mlp.gate_proj'"),
])  # fmt: skip
def test_permuting_is_refused(build, fields, match):
    model = ts.adapt(build(), ts.S2FT(**fields))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ts.TunesmithError, match=match), ts.co_permuted(model):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_merged_adapter_is_not_permuted_and_one_merged_inside_is_unmerged():
    model, batch = stirred(ts.adapt(make("gqa"), BOTH)), inputs("llama", dtype=torch.float64)
    before, expected = copy.deepcopy(model.state_dict()), logits(model, batch)
    with pytest.raises(ts.TunesmithError, match="unmerge default first"), ts.co_permuted(ts.merge(model)):
        pass
    ts.unmerge(model)
    with ts.co_permuted(model):
        torch.testing.assert_close(logits(ts.merge(model), batch), expected, atol=1e-12, rtol=0)  # the fused permuted model
    assert same(model.state_dict(), before) and torch.equal(logits(model, batch), expected)
    torch.testing.assert_close(logits(ts.merge(model), batch), expected, atol=1e-12, rtol=0)


def test_nothing_of_a_permuted_model_gets_out(tmp_path):
    model, batch = stirred(ts.adapt(make("gqa"), BOTH)), inputs("llama", dtype=torch.float64)
    ts.save(model, tmp_path / "before")
    with pytest.raises(RuntimeError, match="stop"), ts.co_permuted(model):
        twin = copy.deepcopy(model)
        for each in (model, twin):
            with pytest.raises(ts.TunesmithError, match="save the adapter after the block"):
                ts.save(each, tmp_path / "inside")
        with pytest.raises(ts.TunesmithError, match="other weights"):
            ts.load(model, tmp_path / "before", name="again")
        with pytest.raises(ts.TunesmithError, match="leave its block first"), ts.co_permuted(model):
            pass
        raise RuntimeError("stop")
    with pytest.raises(ts.TunesmithError, match="save the adapter after the block"):
        ts.save(twin, tmp_path / "inside")
    assert not (tmp_path / "inside").exists()
    ts.save(model, tmp_path / "after")
    assert torch.equal(logits(ts.load(make("gqa"), tmp_path / "after"), batch), logits(model, batch))


def test_what_happens_to_adapters_inside():
    model = make("gqa")
    before = copy.deepcopy(model.state_dict())
    ts.adapt(model, BOTH)
    with ts.co_permuted(model):
        ts.detach(model)
    assert same(model.state_dict(), before)
    ts.adapt(model, BOTH)
    with pytest.raises(ts.TunesmithError, match="'more' was attached inside"), ts.co_permuted(model):
        ts.adapt(model, "lora", name="more")
    ts.detach(model)
    assert same(model.state_dict(), before)


def test_shares_of_single_layers():
    model = ts.adapt(make("llama"), ts.S2FT(targets={"layers.0.mlp.down_proj": {"channels": 0.5}, "down_proj": {}, "up_proj": {"up_channels": 0.25}}))
    found = {path.removeprefix("model.layers."): (a.dim, len(a.index)) for path, a in adapters(model, "default").items()}
    assert found["0.mlp.down_proj"] == (1, 32) and found["1.mlp.down_proj"] == (1, 1) and sum(k for dim, k in found.values() if dim == 0) == 32
    with pytest.raises(ts.TunesmithError, match="nothing to train at 'model.layers.0.mlp.down_proj'"):
        ts.adapt(make("llama"), ts.S2FT(channels=0), targets=["down_proj"])


def test_fused_projections_have_units_too():
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = coupled(Phi3ForCausalLM(Phi3Config(vocab_size=9, pad_token_id=0, **sizes)))
    assert [(c.kind, c.outer.path.split(".")[-1], c.units, c.inner, c.free) for c in found] == [("heads", "o_proj", 2, (), False), ("channels", "down_proj", 48, (), False)]


@pytest.mark.parametrize("rows", [False, True])
def test_gradients(rows):
    x, W, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 6), (8, 6), (8,)))
    v, index = torch.randn((3, 6) if rows else (8, 3), dtype=torch.float64, requires_grad=True), torch.tensor([4, 1, 5])

    def run(x, W, b, v):
        return sparse_linear(x, W, b, v, index, 0 if rows else 1)

    assert torch.autograd.gradcheck(run, (x, W, b, v))
    torch.testing.assert_close(run(x, W, b, v), torch.nn.functional.linear(x, W.index_add(0 if rows else 1, index, v), b))


def test_rows_over_another_adapter_under_autocast():
    model = tiny.tiny_llama().train()
    for name in "ab":
        stirred(ts.adapt(model, BOTH, name=name))
    ts.activate(model, ["a", "b"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, inputs("llama")).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in ts.trainable(model).values())


def test_only_what_the_block_needs_is_kept():
    torch.manual_seed(0)
    model = ts.adapt(nn.Sequential(nn.Linear(50, 40)), ts.S2FT(channels=0.1), targets=["0"])
    (adapter,) = adapters(model, "default").values()
    x, kept = torch.randn(7, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum().backward()
    own = {model[0].weight.data_ptr(), adapter.v.data_ptr(), adapter.index.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 7 * 5


def test_gradients_add_up_over_parts_of_a_batch():
    model = stirred(ts.adapt(make("llama"), BOTH))
    ids = inputs("llama", rows=4)["input_ids"]
    model(input_ids=ids).logits.square().sum().backward()
    whole = {n: p.grad.clone() for n, p in ts.trainable(model).items()}
    model.zero_grad()
    for part in ids:
        model(input_ids=part[None]).logits.square().sum().backward()
    for n, p in ts.trainable(model).items():
        torch.testing.assert_close(p.grad, whole[n])


def test_disjoint_adapters_fuse_in_any_order_and_switch_back():
    model = make("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = inputs("llama", dtype=torch.float64)
    for name, choice in (("a", False), ("b", True)):
        stirred(ts.adapt(model, ts.S2FT(choice="weight", largest=choice, heads=0.5, channels=0.1), name=name))
    own = [adapters(model, name) for name in "ab"]
    assert all(not set(own[0][path].index.tolist()) & set(own[1][path].index.tolist()) for path in own[0])
    fused = []
    for order in ("ab", "ba"):
        ts.activate(model, list(order))
        fused.append(logits(ts.merge(model), batch))
        ts.unmerge(model)
    assert torch.equal(*fused)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
