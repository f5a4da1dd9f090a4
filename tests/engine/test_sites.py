"""Which layers a method acts on: patterns over any tree of modules, overrides per layer, heads, tied weights."""

import json
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters, hubs, record_of
from tunesmith.engine.sites import find, head_paths, sites

NAMES = ["q", "v", "up", "out", "block", "q_proj", "0"]
LAYERS = {
    "linear": lambda: nn.Linear(4, 4), "embedding": lambda: nn.Embedding(5, 4), "conv": lambda: nn.Conv1d(4, 4, 1), "norm": lambda: nn.LayerNorm(4),
    "container": lambda: nn.ReLU(),
}  # fmt: skip


class Node(nn.Module):
    def __init__(self, children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, LAYERS[child]() if isinstance(child, str) else Node(child))


trees = st.recursive(st.sampled_from(list(LAYERS)), lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=4), max_leaves=12)
fuzz = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = ("linear", "embedding", "conv", "norm")


def leaves(model):
    """Path → kind, as torch tells."""
    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", nn.Conv1d: "conv", nn.LayerNorm: "norm"}
    return {path: kinds[type(m)] for path, m in model.named_modules() if type(m) in kinds}


models = trees.filter(lambda tree: isinstance(tree, dict)).map(Node).filter(leaves)


def ends(path, suffix):
    return path.split(".")[-len(suffix.split(".")) :] == suffix.split(".")


def a_pattern(draw, paths):
    """A suffix of some layer, or a regular expression, with the function that says what it matches."""
    path = draw(st.sampled_from(paths))
    parts = path.split(".")
    form = draw(st.sampled_from(["suffix", "any front", "alternatives"]))
    if form == "suffix":
        suffix = ".".join(parts[-draw(st.integers(1, len(parts))) :])
        return suffix, lambda p: ends(p, suffix)
    regex = rf"(.*\.)?{re.escape(parts[-1])}" if form == "any front" else "|".join(map(re.escape, [path, draw(st.sampled_from(paths))]))
    return regex, lambda p: re.fullmatch(regex, p) is not None


@fuzz
@given(models, st.data())
def test_find_over_any_tree(model, data):
    known = leaves(model)
    assert {s.path: s.kind for s in sites(model)} == known
    drawn = dict(a_pattern(data.draw, list(known)) for _ in range(3))
    first = {path: next((p for p, hits in drawn.items() if hits(path)), None) for path in known}
    chosen = {path for path, pattern in first.items() if pattern is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(model, list(drawn), KINDS).keys() == chosen
        for pattern, hits in drawn.items():
            assert find(model, pattern, KINDS).keys() == {path for path in known if hits(path)}
    overrides = {pattern: {"rank": i} for i, pattern in enumerate(drawn)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = find(model, overrides, KINDS)
    assert {path: over for path, (_, over) in found.items()} == {path: overrides[first[path]] for path in chosen}
    assert all(found[path][0].holder is model.get_submodule(path) for path in chosen)
    shadowed = drawn.keys() - set(first.values())
    assert len(said) == len(shadowed) and all(any(repr(p) in str(w.message) and "before it" in str(w.message) for w in said) for p in shadowed)


@fuzz
@given(models, st.lists(st.sampled_from(["zzz", "q.zzz", r"zz\d+", "(", "*q", "a{99999999999}", ""]), unique=True, min_size=1, max_size=4), st.data())
def test_what_matches_nothing_is_named(model, absent, data):
    known = leaves(model)
    with pytest.raises(ts.TunesmithError) as error:
        find(model, absent, KINDS, "lora")
    assert repr(absent[0]) in str(error.value) and "lora" in str(error.value)
    present = data.draw(st.sampled_from(list(known)))
    for targets in ([*absent, present], dict.fromkeys([*absent, present], {})):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = find(model, targets, KINDS, "lora")
        assert present in found
        assert [next(p for p in absent if f"target {p!r} " in str(w.message)) for w in said] == absent


@fuzz
@given(models, st.data())
def test_layers_of_the_wrong_kind_are_named(model, data):
    known = leaves(model)
    path = data.draw(st.sampled_from(list(known)))
    able = tuple(k for k in KINDS if k != known[path])
    with pytest.raises(ts.TunesmithError, match=f"it cannot act on {re.escape(repr(path))}, an? {known[path]} layer .*works on {', '.join(able)} layers"):
        find(model, "^" + re.escape(path), able, "it")  # as a regular expression: the path whole, and not as another's end


@fuzz
@given(models)
def test_all_linear_leaves_the_last_layer_alone(model):
    linear = [path for path, kind in leaves(model).items() if kind == "linear"]
    if len(linear) > 1:
        assert list(find(model, "all-linear", KINDS)) == linear[:-1]
    assert head_paths(model) == linear[-1:]


@pytest.mark.parametrize("kind,heads", [("llama", ["lm_head"]), ("gpt2", ["lm_head"]), ("bert", ["classifier"]), ("vit", ["classifier"]), ("t5", ["lm_head"]), ("convnet", ["8"])])
def test_all_linear_leaves_heads_alone(kind, heads):
    model = tiny.BUILDERS[kind]()
    assert head_paths(model) == heads
    chosen = find(model, "all-linear", ("linear", "conv"))
    assert chosen and not chosen.keys() & set(heads)
    if kind != "convnet":
        assert chosen.keys() == {s.path for s in sites(model) if s.kind == "linear"} - set(heads)
    if hasattr(model, "base_model") and kind != "t5":
        bare = model.base_model
        assert head_paths(bare) == []  # a backbone's last layer is no head
        assert len(find(bare, "all-linear", ("linear",))) == len(chosen)


def test_skipped_modules_are_left_out_with_all_below():
    model = tiny.tiny_llama()
    found = find(model, ["q_proj", "o_proj"], ("linear",), skip=["model.layers.0"])
    assert list(found) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]


def test_a_target_that_holds_no_weights_itself():
    with pytest.raises(ts.TunesmithError, match="'self_attn' of lora matches 'model.layers.0.self_attn', which holds no weights itself; name layers inside it, such as '.*q_proj'"):
        ts.adapt(tiny.tiny_llama(), "lora", targets=["self_attn"])


def test_adapters_are_no_part_of_the_tree():
    model = tiny.tiny_llama()
    before = [s.path for s in sites(model)]
    for method in ("lora", "series-adapter", "prompt-tuning"):
        ts.adapt(model, method, name=method)
    assert [s.path for s in sites(model)] == before


# overrides per layer

BATCH = tiny.batch("llama")


def stir(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def ranks(model):
    return {path: len(a.A) for path, a in adapters(model, "default").items()}


def test_ranks_of_their_own(tmp_path):
    targets = {r"model\.layers\.0\..*_proj": {"rank": 2, "alpha": 5}, "q_proj": {"rank": 6}, "v_proj": {}}
    model = stir(ts.adapt(tiny.tiny_llama(), ts.LoRA(rank=3, dropout=0.1, targets=targets)))
    found = ranks(model)
    assert {p.split(".")[2] for p, r in found.items() if r == 2} == {"0"} and len([r for r in found.values() if r == 2]) == 7
    assert (found["model.layers.1.self_attn.q_proj"], found["model.layers.1.self_attn.v_proj"]) == (6, 3) and len(found) == 9
    configs = record_of(model, "default").sites
    assert configs["model.layers.0.mlp.up_proj"].scale == 2.5 and configs["model.layers.1.self_attn.q_proj"].dropout == 0.1
    expected = model(**BATCH).logits
    ts.save(model, tmp_path / "a")
    other = ts.load(tiny.tiny_llama(), tmp_path / "a")
    assert ranks(other) == found and record_of(other, "default").sites == configs
    assert torch.equal(other(**BATCH).logits, expected)
    ts.save(model, tmp_path / "peft", format="peft")
    other = ts.load(tiny.tiny_llama(), tmp_path / "peft")
    assert ranks(other) == found
    torch.testing.assert_close(other(**BATCH).logits, expected, atol=1e-6, rtol=0)


METHODS = {
    "q_proj": {"method": "dora", "rank": 2},
    "k_proj": {"method": "ia3"},
    "layers.0.self_attn.v_proj": {"method": "lora", "rank": 5},
    "v_proj": {},
    "down_proj": {"method": "series-adapter", "bottleneck": 3},
    "input_layernorm": {"method": "ln-tuning"},
    "embed_tokens": {"method": "full"},
}
EXPECTED = {"q_proj": "dora", "k_proj": "ia3", "down_proj": "series-adapter", "input_layernorm": "ln-tuning", "embed_tokens": "full"}


@pytest.mark.parametrize("main", [{"method": "lora", "rank": 3}, {"method": "rslora"}, {"method": "ia3"}, {"method": "series-adapter", "bottleneck": 2}])
def test_methods_of_their_own(main, tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(), main | {"targets": METHODS}))
    methods = {path: config.method for path, config in record_of(model, "default").sites.items()}
    wanted = EXPECTED | {"v_proj": main["method"]}
    assert methods == {path: "lora" if path == "model.layers.0.self_attn.v_proj" else wanted[path.split(".")[-1]] for path in methods} and len(methods) == 11
    report = ts.summary(model)
    assert {s.path: s.method for s in report.sites} == methods
    assert report.trainable == sum(c.count(hubs(model)[p].site) for p, c in record_of(model, "default").sites.items())
    expected = model(**BATCH).logits
    expected.sum().backward()
    assert all(p.grad is not None for p in ts.trainable(model).values())
    ts.save(model, tmp_path / "a")
    other = ts.load(tiny.tiny_llama(), tmp_path / "a")
    assert {path: config.method for path, config in record_of(other, "default").sites.items()} == methods
    assert torch.equal(other(**BATCH).logits, expected)
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["method"]["method"] == main["method"]


@pytest.mark.parametrize(
    "targets,message",
    [
        ({"q_proj": {"method": "lroa"}}, "unknown method 'lroa' .did you mean 'lora'"),
        ({"q_proj": {"rnak": 2}}, "no field 'rnak' .did you mean 'rank'"),
        ({"q_proj": {"rank": 0}}, "rank=0 is not valid"),
        ({"q_proj": {"method": "ln-tuning"}}, "ln-tuning cannot act on 'model.layers.0.self_attn.q_proj', a linear layer.*works on norm layers, here for instance 'model.layers.0.input_layernorm'"),
        ({"embed_tokens": {"method": "ia3"}}, "ia3 cannot act on 'model.embed_tokens', an embedding layer"),
        ({"q_proj": {"method": "prompt-tuning"}}, "prompt-tuning cannot act on"),
        ({"q_proj": {"method": "bitfit"}}, "bitfit has nothing to train at 'model.layers.0.self_attn.q_proj'"),
        ({"norm": {}}, "lora cannot act on 'model.norm', a norm layer"),
    ],
)
def test_overrides_that_cannot_be(targets, message):
    model = tiny.tiny_llama()
    with pytest.raises(ts.TunesmithError, match=message):
        ts.adapt(model, ts.LoRA(targets=targets))
    assert not hubs(model) and all(p.requires_grad for p in model.parameters())


# tied weights


def test_a_tied_weight_is_two_places_with_one_value():
    model = tiny.tiny_llama(tie=True)
    paths = {s.path: s for s in sites(model)}
    assert paths["lm_head"].parameter is paths["model.embed_tokens"].parameter
    assert paths["lm_head"].shape == paths["model.embed_tokens"].shape[::-1] == (tiny.VOCAB, 32)
    assert "lm_head" not in find(model, "all-linear", ("linear",))


@pytest.mark.parametrize("target,other", [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_lora_on_one_side_leaves_the_other(target, other, tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(tie=True), ts.LoRA(targets=target)))
    layer, site = next(iter(adapters(model, "default").values())), next(iter(hubs(model).values())).site
    inputs = torch.arange(4) if target == "embed_tokens" else torch.randn(2, 32)
    base = site.holder.weight
    change = layer.scale * layer.B @ layer.A
    side = nn.functional.embedding(inputs, base + change.T) if target == "embed_tokens" else inputs @ (base + change).T
    torch.testing.assert_close(site.holder(inputs), side, atol=1e-5, rtol=1e-5)
    assert type(model.get_submodule(other)) in (nn.Linear, nn.Embedding) and model.get_submodule(other).weight is base
    expected = model(**BATCH).logits
    ts.save(model, tmp_path)
    assert torch.equal(ts.load(tiny.tiny_llama(tie=True), tmp_path)(**BATCH).logits, expected)


def test_training_a_tied_weight_in_full_trains_it_once(tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(tie=True), ts.Full(targets=["embed_tokens", "lm_head"])))
    assert ts.summary(model).trainable == tiny.VOCAB * 32 and len(ts.trainable(model)) == 1
    assert adapters(model, "default")["lm_head"].weight is adapters(model, "default")["model.embed_tokens"].weight
    expected = model(**BATCH).logits
    ts.save(model, tmp_path)
    assert torch.equal(ts.load(tiny.tiny_llama(tie=True), tmp_path)(**BATCH).logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(ts.merge(model)(**BATCH).logits, expected, atol=1e-6, rtol=0)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # the same change on both sides: still one weight


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", ["lora", "dora", "bone", "qwha", "neuroada", "ssf", "l4q", "mola", "series-adapter"])
def test_a_linear_layer_that_does_more_goes_on_doing_it(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(Twice(12, 12), nn.Linear(12, 12)), torch.randn(3, 12)
    before, config = model(x).detach(), ts.methods.parse(method)
    ts.adapt(model, method, targets="0")
    if config.identity:
        torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    after = model(x).detach()
    assert (after - before).abs().max() > 1e-3
    if config.mergeable:
        torch.testing.assert_close(ts.merge(model)(x), after)
