"""S2-LoRA: what is shared, how it becomes sparse, and the published counts on Whisper."""

import gc

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

import tunesmith as ts
from tunesmith import optim
from tunesmith.engine.model import adapters

SHARES = ["dim", "shape", "pad"]


def net(*widths):
    torch.manual_seed(0)
    layers = [m for pair in zip(widths, widths[1:], strict=False) for m in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def adapted(config, *widths, stir=True):
    model = net(*widths)
    ts.adapt(model, config, targets=[str(i) for i in range(0, len(model), 2)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in layers(model) if stir else ():
            adapter.E.copy_(torch.randn(len(adapter.E), generator=generator))
    return model


def layers(model):
    return list(adapters(model, "default").values())


def learn(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("share,count", [("dim", 3 * (6 + 9 + 4 + 9 + 6 + 5 + 4)), ("shape", 3 * (6 + 9 + 9 + 6 + 6 + 4 + 4 + 5)), ("pad", 3 * (9 + 9))])
def test_layers_of_different_shapes_share(share, count, tmp_path):
    model = adapted(ts.S2LoRA(rank=3, share=share), 6, 9, 6, 4, 5)
    x = torch.randn(8, 6)
    assert ts.summary(model).trainable == count + 3 * 4
    shared = {id(p) for a in layers(model) for p in (a.A.weight, a.B.weight)}
    assert len(ts.trainable(model)) == len(shared) + 4 and len(shared) == {"dim": 7, "shape": 8, "pad": 2}[share]
    before = model(x)
    ts.save(model, tmp_path / "a")
    assert sum(t.numel() for t in load_file(tmp_path / "a" / "adapter.safetensors").values()) == count + 3 * 4
    again = ts.load(net(6, 9, 6, 4, 5), tmp_path / "a")
    assert torch.equal(again(x), before) and ts.trainable(again).keys() == ts.trainable(model).keys()
    learn(model, optim.build(model), x, torch.zeros(8, 5))
    after = model(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(ts.merge(model)(x), after)


def test_ranks_and_rules_may_differ_between_sites():
    model = ts.adapt(net(6, 6, 6, 6), ts.S2LoRA(rank=3), targets={"0": {}, "2": {"rank": 2}, "4": {"share": "pad", "rank": 2}})
    assert ts.summary(model).trainable == sum(2 * 6 * r + r for r in (3, 2, 2))


def test_factors_start_orthonormal():
    for adapter in layers(adapted(ts.S2LoRA(rank=3), 6, 9, 4)):
        torch.testing.assert_close(adapter.A.weight @ adapter.A.weight.T, torch.eye(3))
        torch.testing.assert_close(adapter.B.weight.T @ adapter.B.weight, torch.eye(3))


def test_one_matrix_is_a_layer_of_adalora():
    model, other = adapted(ts.S2LoRA(rank=3, alpha=5), 6, 4), adapted(ts.AdaLoRA(rank=3, alpha=5, orth_reg_weight=0.1), 6, 4, stir=False)
    (ours,), (theirs,) = layers(model), layers(other)
    with torch.no_grad():
        theirs.A.copy_(2 * ours.A.weight), theirs.B.copy_(ours.B.weight), theirs.E.copy_(ours.E)
        ours.A.weight.mul_(2)
    x = torch.randn(8, 6)
    assert torch.equal(model(x), other(x)) and ts.auxiliary_loss(model) == ts.auxiliary_loss(other) > 0.1


def test_the_gradient_of_what_is_shared_is_the_sum_over_its_sites():
    model, other = adapted(ts.S2LoRA(rank=3), 6, 6, 6), adapted(ts.AdaLoRA(rank=3), 6, 6, 6, stir=False)
    with torch.no_grad():
        for ours, theirs in zip(layers(model), layers(other), strict=True):
            theirs.A.copy_(ours.A.weight), theirs.B.copy_(ours.B.weight), theirs.E.copy_(ours.E)
    x = torch.randn(8, 6)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for key in "AB":
        torch.testing.assert_close(getattr(layers(model)[0], key).weight.grad, sum(getattr(a, key).grad for a in layers(other)))


def test_a_site_without_coefficients_keeps_its_weight_bit_for_bit():
    model = adapted(ts.S2LoRA(rank=3), 6, 6, 6)
    with torch.no_grad():
        layers(model)[0].E.zero_()
    first, second = (model[i].weight.detach().clone() for i in (0, 2))
    ts.merge(model)
    assert torch.equal(model[0].weight, first) and not torch.equal(model[2].weight, second)
    assert ts.ranks(model) == {"0": 0, "2": 3}


@pytest.mark.parametrize("make", [lambda p, lr: torch.optim.SGD(p, lr), lambda p, lr: torch.optim.AdamW(p, lr)], ids=["sgd", "adamw"])
def test_the_proximal_step_follows_the_learning_rate(make):
    model, plain = (adapted(ts.S2LoRA(rank=4, l1_weight=0.5), 6, 5) for _ in "ab")
    x, y = torch.randn(8, 6), torch.randn(8, 5)
    stages = ts.stages(model, 10)
    stages.step()  # before any optimiser step there is nothing to do
    for lr in (0.2, 0.4):
        ours, theirs = layers(model)[0], layers(plain)[0]
        with torch.no_grad():
            for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
        for each in (model, plain):
            learn(each, make(each.parameters(), lr), x, y)
        stages.step()
        expected = theirs.E.sign() * (theirs.E.abs() - 0.5 * lr).clamp(min=0)
        torch.testing.assert_close(ours.E, expected)
        kept = ours.E.detach().clone()
        stages.step()  # no optimiser step in between, as when a scaler skips one
        assert torch.equal(ours.E, kept)


def test_no_stage_outlives_its_use():
    before = len(hooks)
    model = adapted(ts.S2LoRA(rank=2), 4, 4)
    stages = ts.stages(model, 3)
    assert len(hooks) == before + 1
    del stages
    gc.collect()
    assert len(hooks) == before
    assert not ts.stages(adapted(ts.S2LoRA(sparsity="l1"), 4, 4), 3).parts


def test_a_heavy_penalty_gives_the_base_back():
    model = adapted(ts.S2LoRA(rank=3, l1_weight=1e6), 6, 6, 6)
    x = torch.randn(8, 6)
    optimizer, stages = optim.build(model), ts.stages(model, 1)
    learn(model, optimizer, x, x)
    stages.step()
    assert not any(ts.ranks(model).values())
    weight = model[0].weight
    assert torch.equal(ts.merge(model, unload=True)(x), net(6, 6, 6)(x)) and not torch.equal(weight, torch.zeros_like(weight))


def test_exact_zeros_come_from_the_proximal_step_alone():
    def zeros(sparsity):
        torch.manual_seed(0)
        model = adapted(ts.S2LoRA(rank=8, alpha=8, sparsity=sparsity), 16, 16, stir=False)
        generator = torch.Generator().manual_seed(2)
        change = torch.randn(16, 1, generator=generator) @ torch.randn(1, 16, generator=generator) / 8  # of rank one
        optimizer, stages = optim.build(model, lr=1e-3), ts.stages(model, 150)
        for _ in range(150):
            x = torch.randn(8, 16, generator=generator)
            optimizer.zero_grad()
            y = nn.functional.linear(x, model[0].weight + change, model[0].bias) + torch.randn(8, 16, generator=generator)
            (((model(x) - y) ** 2).mean() + ts.auxiliary_loss(model)).backward()
            optimizer.step()
            stages.step()
        return 8 - ts.ranks(model)["0"]

    assert zeros("proximal") > 0 == zeros("l1")


def test_coefficients_learn_faster_and_without_decay():
    model = adapted(ts.S2LoRA(rank=3, lr_ratio=5), 6, 6, 6)
    groups = optim.build(model, lr=1e-3, weight_decay=0.1).param_groups
    rule = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    A, B = layers(model)[0].A.weight, layers(model)[0].B.weight
    assert rule == {id(A): (1e-3, 0.1), id(B): (1e-3, 0.1)} | {id(a.E): (5e-3, 0.0) for a in layers(model)}
    assert sum(len(g["params"]) for g in groups) == 4


def test_an_unknown_rule_is_refused():
    with pytest.raises(ts.TunesmithError, match="share='width'"):
        ts.S2LoRA(share="width")


ATTENTION, ALL = ["q_proj", "k_proj", "v_proj", "out_proj"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
WHISPER = {"small": (768, 12, 51865, 241_734_912), "medium": (1024, 24, 51865, 763_857_920), "large-v2": (1280, 32, 51865, 1_543_304_960)}
COUNTS = [  # method, its count on small, medium and large-v2
    (lambda i: ts.BitFit(), 224_256, 593_920, 988_160),
    (lambda i: ts.LoRA(rank=8, targets=ALL), 3_244_032, 8_650_752, 14_417_920),
    (lambda i: ts.S2LoRA(rank=(32, 64, 64)[i], targets=ATTENTION), 53_760, 149_504, 188_416),
    (lambda i: ts.S2LoRA(rank=(8, 16, 32)[i], share="pad", targets=ALL), 50_688, 137_216, 344_064),
    (lambda i: ts.S2LoRA(rank=(8, 16, 32)[i], share="dim", targets=ALL), 62_976, 169_984, 425_984),
    (lambda i: ts.S2LoRA(rank=(8, 16, 32)[i], share="shape", targets=ALL), 75_264, 202_752, 507_904),
]


@pytest.mark.parametrize("size", WHISPER)
def test_counts_on_whisper(size):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    d, depth, vocabulary, total = WHISPER[size]
    with torch.device("meta"):
        config = WhisperConfig(
            vocab_size=vocabulary, d_model=d, encoder_layers=depth, decoder_layers=depth, encoder_attention_heads=d // 64,
            decoder_attention_heads=d // 64, encoder_ffn_dim=4 * d, decoder_ffn_dim=4 * d,
        )  # fmt: skip
        model = WhisperForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == total
    column = list(WHISPER).index(size)
    for method, *counts in COUNTS:
        ts.adapt(model, method(column))
        assert ts.summary(model).trainable == counts[column]
        ts.detach(model)
