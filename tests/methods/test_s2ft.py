"""S²FT: which units train, what is kept, and that permuting coupled weights changes nothing."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.contract.zoo import attention_net, inputs, logits
from tunesmith.engine.model import adapters
from tunesmith.methods.select import coupled

BOTH = {"method": "s2ft", "heads": 0.5, "channels": 0.1, "value_heads": 0.5, "up_channels": 0.1}


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


def test_counts_of_llama3():
    assert int(0.03 * 14336 * 32) * 4096 == 56_369_152
    down = nn.Linear(14336, 4096, device="meta")
    model = ts.adapt(nn.Sequential(down), ts.S2FT(channels=0.03), targets=["0"])
    assert ts.summary(model).trainable == int(0.03 * 14336) * 4096


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
        down.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach().abs().flatten(0, 1).mean(0)))
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
            assert kind in ("gpt2", "attention") or a.index.tolist() == list(range(int(a.index[0]), int(a.index[0]) + len(a.index)))
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
        optimizer = torch.optim.SGD(ts.trainable(model).values(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            logits(model, batch).square().mean().backward()
            optimizer.step()

    train(models[0])
    with ts.co_permuted(models[1]):
        train(models[1])
    for a, b in zip(*(ts.trainable(m).values() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_permuting_is_refused():
    model = ts.adapt(ts.adapt(make("llama"), "lora", name="other"), "s2ft")
    with pytest.raises(ts.TunesmithError, match="attach one s2ft adapter alone"), ts.co_permuted(model):
        pass
    with pytest.raises(ts.TunesmithError, match="position biases"), ts.co_permuted(ts.adapt(make("t5"), ts.S2FT(heads=0.5))):
        pass


@pytest.mark.parametrize("rows", [False, True])
def test_only_what_the_block_needs_is_kept(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40))
    config = ts.S2FT(channels=0.1, targets=["0"])
    ts.adapt(model, config)
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
