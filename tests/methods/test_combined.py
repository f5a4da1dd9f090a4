"""Several methods as one, and methods kept to some layers."""

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.contract.zoo import inputs, logits, stir, train
from tunesmith.engine.model import adapters, hubs

PARTS = [{"method": "lora", "rank": 2}, {"method": "series-adapter", "bottleneck": 3}, {"method": "prefix-tuning", "tokens": 2}, "ln-tuning"]


def build(kind="llama"):
    return tiny.BUILDERS[kind]()


def test_parts_act_as_they_would_side_by_side():
    batch, one, two = inputs("llama"), build(), build()
    ts.adapt(one, {"method": "combined", "parts": PARTS[:2]})
    for i, part in enumerate(PARTS[:2]):
        ts.adapt(two, part, name=f"part{i}")
    ts.activate(two, ["part0", "part1"])
    stir(one)
    with torch.no_grad():
        for path, layer in adapters(one, "default").items():
            for i, adapter in layer.parts.items():
                adapters(two, f"part{i}")[path].load_state_dict(adapter.state_dict())
    torch.testing.assert_close(logits(one, batch), logits(two, batch))
    assert ts.summary(one).trainable == ts.summary(two).trainable


def test_all_kinds_of_parts_train_and_come_back_from_a_file(tmp_path):
    model, batch = build(), inputs("llama")
    ts.adapt(model, {"method": "combined", "parts": PARTS, "layers": None})
    before = logits(model, batch)
    losses = train(model, batch, 4)
    assert losses[-1] < losses[0]
    after = logits(model.eval(), batch)
    assert not torch.equal(after, before)
    ts.save(model, tmp_path / "a")
    torch.testing.assert_close(logits(ts.load(build(), tmp_path / "a"), batch), after)
    with pytest.raises(ts.TunesmithError, match="cannot be merged"):
        ts.merge(model)


def test_a_part_says_how_the_base_is_rounded_and_what_is_kept():
    config = ts.methods.parse({"method": "combined", "parts": ["ln-tuning", {"method": "loftq", "rank": 2, "iterations": 3}]})
    loftq, W = ts.methods.parse({"method": "loftq", "rank": 2, "iterations": 3}), torch.randn(16, 32)
    format = ts.quantize.Format(format="nf2")
    assert config.from_original and torch.equal(config.rounding(W, format) + 0, loftq.rounding(W, format) + 0)
    assert ts.methods.parse({"method": "combined", "parts": ["qwha", "ln-tuning"]}).calibration_optional
    assert not ts.methods.parse({"method": "combined"}).from_original


def test_rates_keep_their_ratio():
    model = ts.adapt(build(), {"method": "combined", "parts": ["lora", "ln-tuning"]})
    groups = {group["lr"] for group in ts.methods.parse({"method": "combined", "parts": ["lora", "ln-tuning"]}).param_groups(adapters(model, "default"), 2e-3)}
    assert groups == {2e-3, 4e-3}


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (["combined"], "a part of combined is one method"),
        (["lorra"], "unknown method 'lorra'"),
        (["adalora"], "adalora changes while it trains"),
        ([], "parts"),
        ([{"method": "lora", "modules_to_save": ["lm_head"]}], "modules_to_save stand beside"),
    ],
)
def test_parts_that_cannot_be_are_named(parts, match):
    with pytest.raises(ts.TunesmithError, match=match):
        ts.methods.parse({"method": "combined", "parts": parts})


@pytest.mark.parametrize(("layers", "numbers"), [([0], {0}), ([-1], {1}), ([0, 1], {0, 1})])
def test_layers(layers, numbers):
    for method in ("lora", "series-adapter", {"method": "combined", "parts": ["lora", "series-adapter"]}):
        method = {"method": method} if isinstance(method, str) else method
        model = ts.adapt(build(), method | {"layers": layers})
        assert {int(path.split(".")[2]) for path in hubs(model)} == numbers
    model = ts.adapt(build(), {"method": "combined", "parts": ["lora", {"method": "ln-tuning", "layers": [1]}]})
    assert {int(path.split(".")[2]) for path in hubs(model) if "layernorm" in path} == {1}
    assert {int(path.split(".")[2]) for path in hubs(model) if "proj" in path} == {0, 1}


def test_layers_that_are_not_there_are_named():
    for layers, match in (([2], "has 2 layers, 0 to 1, and no layer 2"), ([], "leave lora nothing")):
        with pytest.raises(ts.TunesmithError, match=match):
            ts.adapt(build(), {"method": "lora", "layers": layers})
    with pytest.raises(ts.TunesmithError, match="prompt-tuning acts on the whole of"):
        ts.adapt(build(), {"method": "prompt-tuning", "layers": [0]})


@pytest.mark.parametrize("kind,parts", [("llama", [PARTS[1], PARTS[2]]), ("vit", ["convpass", "ssf"])])
def test_layers_of_parts_that_see_to_them_themselves(kind, parts, tmp_path):
    """A prefix in some layers, and bypasses that ask the layer before them for the grid of patches."""
    batch, model = inputs(kind), build(kind)
    ts.adapt(model, {"method": "combined", "parts": parts, "layers": [1]})
    one = ts.summary(model).trainable
    stir(model)
    expected = logits(model, batch)
    ts.save(model, tmp_path / "a")
    assert torch.equal(logits(ts.load(build(kind), tmp_path / "a"), batch), expected)
    assert one == sum(ts.summary(ts.adapt(build(kind), {"layers": [1]} | ({"method": p} if isinstance(p, str) else p))).trainable for p in parts)
    with pytest.raises(ts.TunesmithError, match="which can have them once"):
        ts.adapt(build("llama"), {"method": "combined", "parts": [{**PARTS[2], "layers": [0]}], "layers": [1]})


def test_a_module_that_is_trained_in_full_is_none_of_the_parts():
    model = ts.adapt(tiny.tiny_bert(), {"method": "combined", "parts": ["bitfit", "lora"], "modules_to_save": ["classifier"]})
    record = model.__dict__["_tunesmith"].records["default"]
    assert "classifier" not in record.sites and "classifier" in adapters(model, "default")


def test_a_prompt_enters_before_a_prefix_in_any_order():
    batch, found = inputs("llama"), []
    for parts in (["prompt-tuning", "prefix-tuning"], ["prefix-tuning", "prompt-tuning"]):
        torch.manual_seed(0)
        model = ts.adapt(build(), {"method": "combined", "parts": parts})
        with torch.no_grad():
            for path, p in ts.trainable(model).items():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) * (2 if "prompt" in path else 1))
        found.append(logits(model, batch))
        model(**batch).logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ts.trainable(model).values())
    torch.testing.assert_close(*found)


def test_virtual_tokens_inside_do_not_share_a_cache():
    model = build()
    for name in ("a", "b"):
        ts.adapt(model, {"method": "combined", "parts": ["prefix-tuning", "lora"]}, name=name)
    ids = inputs("llama")["input_ids"][:2]
    with ts.mixed(model, ["a", "b"]), pytest.raises(ts.TunesmithError, match="cannot share a KV cache"):
        model.generate(ids, max_new_tokens=2)


def test_combined_as_the_method_of_some_layers():
    model = ts.adapt(build(), {"method": "lora", "targets": {"q_proj": {"method": "combined", "parts": ["lora", "ia3"]}, "v_proj": {}}})
    for path, layer in adapters(model, "default").items():
        trained = sum(p.numel() for p in layer.parameters())
        assert trained == sum(site.trainable for site in ts.summary(model).sites if site.path == path) > 0
