"""The contract of a method, over the whole registry and every kind of model."""

import copy
import pickle

import pytest
import torch

import tunesmith as ts
from tunesmith.engine.fused import common
from tunesmith.engine.model import adapters, hubs
from tunesmith.engine.pack import packed_size
from tunesmith.methods import registry

from .zoo import CANNOT, CHOOSY, GIVEN, HOME, IMAGES, MODELS, PAIRS, PROMPTS, adapt, build, inputs, logits, loss, same, stir, train

pairs = pytest.mark.parametrize("method,kind", PAIRS)
methods = pytest.mark.parametrize("method", list(registry))


def a_kind(method):
    return next(kind for m, kind in PAIRS if m == method)


@pytest.mark.parametrize("method,kind", [(m, k) for m in CANNOT for k in sorted(CANNOT[m])])
def test_refuses_clearly_and_leaves_the_model_alone(method, kind):
    model = build(kind)
    before, cls = copy.deepcopy(model.state_dict()), type(model)
    with pytest.raises(ts.TunesmithError, match=method):
        adapt(model, method)
    assert same(model.state_dict(), before) and type(model) is cls and not hubs(model)


@pairs
def test_starts_where_the_base_is_and_learns(method, kind):
    model, batch = build(kind), inputs(kind)
    before = logits(model, batch)
    adapt(model, method)
    start = logits(model, batch)
    if registry[method].identity:
        torch.testing.assert_close(start, before, atol=1e-5, rtol=0)
    train(model, batch)
    assert not torch.equal(logits(model, batch), start)


@pairs
def test_only_trainable_changes_and_detach_gives_the_model_back(method, kind):
    model, batch = build(kind), inputs(kind)
    types = [(path, type(m)) for path, m in model.named_modules()]
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = logits(model, batch)
    adapt(model, method)
    trained = ts.trainable(model)
    assert trained and all(p.requires_grad for p in trained.values())
    loss(model, batch).backward()
    with_grad = {path for path, p in model.named_parameters() if p.grad is not None}
    assert with_grad <= trained.keys()
    if registry[method].identity and method != "full":  # a start at zero gives one factor no gradient only later on
        assert with_grad
    train(model, batch, steps=2)
    base = {k: v for k, v in model.state_dict().items() if ".tunesmith." not in f".{k}"}
    assert same(base, before)
    with torch.no_grad(), ts.disabled(model):
        assert torch.equal(logits(model, batch), first)
    ts.detach(model)
    assert same(model.state_dict(), before)
    assert [(path, type(m)) for path, m in model.named_modules()] == types
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    with torch.no_grad():
        assert torch.equal(logits(model, batch), first)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pairs
def test_merge_equals_the_adapter(method, kind, dtype, tolerance):
    model, batch = build(kind, dtype), inputs(kind, dtype=dtype)
    adapt(model, method)
    if registry[method].identity or dtype != torch.bfloat16:
        stir(model, size=0.05)
    expected = logits(model, batch)
    if not registry[method].mergeable:
        with pytest.raises(ts.TunesmithError, match="cannot be merged"):
            ts.merge(model)
        assert torch.equal(logits(model, batch), expected)
        return
    base = {k: v.clone() for k, v in model.state_dict().items()}
    ts.merge(model)
    torch.testing.assert_close(logits(model, batch), expected, atol=tolerance, rtol=tolerance)
    with ts.disabled(model):
        plain = logits(model, batch)
    ts.unmerge(model)
    assert same(model.state_dict(), base)
    assert torch.equal(logits(model, batch), expected)
    with ts.disabled(model):
        assert torch.equal(logits(model, batch), plain)


@methods
def test_merge_and_unload_leaves_a_plain_model(method):
    kind = a_kind(method)
    model, batch = build(kind), inputs(kind)
    keys, types = model.state_dict().keys(), [type(m) for m in model.modules()]
    stir(adapt(model, method))
    expected = logits(model, batch)
    if registry[method].mergeable:
        ts.merge(model, unload=True)
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
        assert model.state_dict().keys() == keys and [type(m) for m in model.modules()] == types


@pairs
def test_file_holds_the_adapter_and_nothing_else(method, kind, tmp_path):
    model, batch = build(kind), inputs(kind)
    stir(adapt(model, method, name="mine"))
    expected = logits(model, batch)
    ts.save(model, tmp_path / "a", name="mine")
    other = ts.load(build(kind), tmp_path / "a")
    assert torch.equal(logits(other, batch), expected)
    assert ts.trainable(other).keys() == ts.trainable(model).keys()
    header = 200 * (2 + sum(len(list(a.state_dict())) for a in adapters(model, "mine").values()))
    held = sum(packed_size(t) for t in {id(t): t for a in adapters(model, "mine").values() for t in a.state_dict(keep_vars=True).values()}.values())
    assert held <= (tmp_path / "a" / "adapter.safetensors").stat().st_size <= held + header
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.safetensors", "adapter.json"}


@pairs
def test_counts_in_closed_form(method, kind):
    model = adapt(build(kind), method)
    configs = model.__dict__["_tunesmith"].records["default"].sites
    seen, shared = set(), 0
    for path, hub in hubs(model).items():
        own = [p for p in hub.adapters["default"].parameters()]
        assert sum(p.numel() for p in own) == configs[path].count(hub.site)
        shared += sum(p.numel() for p in own if id(p) in seen)
        seen |= {id(p) for p in own}
    report = ts.summary(model)
    assert report.trainable == sum(p.numel() for p in ts.trainable(model).values())
    assert report.trainable + shared == sum(c.count(hubs(model)[path].site) for path, c in configs.items())
    stored = {id(t): t for hub in hubs(model).values() for t in hub.adapters["default"].state_dict(keep_vars=True).values()}
    assert report.bytes == sum(packed_size(t) for t in stored.values()) >= 4 * report.trainable and sum(s.trainable for s in report.sites) == report.trainable


KINDS = {"linear": ("llama", "model.layers.0.mlp.up_proj"), "Conv1D": ("gpt2", "transformer.h.0.attn.c_attn"), "embedding": ("llama", "model.embed_tokens"),
         "conv2d": ("convnet", "3"), "in-projection": ("attention", "1.layers.0.self_attn.in_proj"), "out-projection": ("attention", "1.layers.0.self_attn.out_proj"),
         "norm": ("llama", "model.layers.0.input_layernorm")}  # fmt: skip


@pytest.mark.parametrize("layer", KINDS)
@methods
def test_every_layer_type_works_or_is_refused_by_name(method, layer):
    kind, path = KINDS[layer]
    model, batch = build(kind), inputs(kind)
    before = logits(model, batch)
    if method in IMAGES or ("tokens" in registry[method].works_on and "linear" not in registry[method].works_on):
        with pytest.raises(ts.TunesmithError, match="targets"):
            adapt(model, method, targets=[path])
        return
    site = next(s for s in ts.engine.sites.sites(model) if s.path == path)
    if site.kind not in registry[method].works_on:
        with pytest.raises(ts.TunesmithError, match=f"{method} cannot act on '{path}'.*works on"):
            adapt(model, method, targets=[path])
        return
    if method == "bitfit" and site.bias is None and "bias" not in site.names:
        with pytest.raises(ts.TunesmithError, match="biases"):
            adapt(model, method, targets=[path])
        return
    adapt(model, method, targets=[path])
    assert list(hubs(model)) == [path]
    if registry[method].identity:
        torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=0)
    stir(model)
    after = logits(model, batch)
    assert not torch.equal(after, before)
    if registry[method].mergeable:
        torch.testing.assert_close(logits(ts.merge(model), batch), after, atol=1e-5, rtol=1e-5)


@pairs
def test_bfloat16_base_with_float32_adapters(method, kind):
    model, batch = build(kind, torch.bfloat16), inputs(kind, dtype=torch.bfloat16)
    adapt(model, method)
    assert all(p.dtype == torch.float32 for p in ts.trainable(model).values())
    assert logits(model, batch).dtype == torch.bfloat16
    train(model, batch)
    assert all(torch.isfinite(p).all() for p in ts.trainable(model).values())


@pairs
def test_autocast(method, kind):
    model, batch = build(kind), inputs(kind)
    adapt(model.train(), method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, batch)
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in ts.trainable(model).values() if p.grad is not None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method,kind", [(m, k) for m, k in PAIRS if k in ("llama", "gpt2", "bert", "t5", "vit")])
def test_gradient_checkpointing_keeps_the_gradients(method, kind, reentrant):
    from tunesmith.train.prepare import prepare

    def gradients(checkpointing):
        model, batch = build(kind).train(), inputs(kind)
        torch.manual_seed(0)
        stir(adapt(model, method))
        if checkpointing:
            prepare(model, gradient_checkpointing=True) if not reentrant else reentrantly(model)
        loss(model, batch).backward()
        return {path: p.grad for path, p in ts.trainable(model).items()}

    def reentrantly(model):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()

    if reentrant and kind == "vit":
        pytest.skip("transformers gives image models no input embeddings to require gradients of")
    plain, saved = gradients(False), gradients(True)
    for path, grad in plain.items():
        assert (grad is None) == (saved[path] is None), path
        if grad is not None:
            torch.testing.assert_close(saved[path], grad, atol=1e-6, rtol=1e-4)


@pairs
def test_plain_expressions_have_the_same_gradients(method, kind, monkeypatch):
    """What runs on a GPU that waits for Python."""
    model, batch = build(kind, torch.float64).train(), inputs(kind, dtype=torch.float64)
    stir(adapt(model, method))

    def gradients():
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        return {path: p.grad for path, p in ts.trainable(model).items()}

    by_hand = gradients()
    monkeypatch.setattr(common, "light", lambda x, W: True)
    for path, grad in gradients().items():
        assert (grad is None) == (by_hand[path] is None), path
        if grad is not None:
            torch.testing.assert_close(grad, by_hand[path], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in registry])
def test_compiles(method):
    kind = HOME.get(method, "llama")
    model, batch = MODELS[kind](layers=1), inputs(kind)
    stir(adapt(model, method))
    expected = logits(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    compiled(**batch).logits.sum().backward()
    ts.activate(compiled, [])
    with ts.disabled(model):
        base = logits(model, batch)
    torch.testing.assert_close(compiled(**batch).logits, base, atol=1e-5, rtol=1e-5)


@pairs
def test_deepcopy_and_pickle(method, kind):
    model, batch = build(kind), inputs(kind)
    stir(adapt(model, method))
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, batch), expected)
        stir(twin, seed=2)
        assert not torch.equal(logits(twin, batch), expected)
        ts.detach(twin)
        assert type(twin) is type(build(kind))
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("method", [m for m in registry if m not in CHOOSY | PROMPTS | {"prefix-tuning"}])
def test_counts_on_the_meta_device_and_loads_there(method, tmp_path):
    kind = HOME.get(method, "llama")
    real = stir(adapt(build(kind), GIVEN.get(method, method)))
    ts.save(real, tmp_path / "a")
    with torch.device("meta"):
        hollow = MODELS[kind]()
    hollow = hollow.to("meta")
    adapt(hollow, GIVEN.get(method, method))
    assert ts.summary(hollow).trainable == ts.summary(real).trainable
    ts.detach(hollow)
    ts.load(hollow, tmp_path / "a")
    found = ts.trainable(hollow)
    assert found.keys() == ts.trainable(real).keys()
    assert all(torch.equal(found[path], p) for path, p in ts.trainable(real).items())


@methods
def test_tied_weights_stay_tied_and_merge_unties(method):
    if method in IMAGES | PROMPTS | {"bitfit", "prefix-tuning"}:
        pytest.skip("acts on no weight that is tied")
    from tests.tiny import tiny_llama

    model, batch = tiny_llama(tie=True), inputs("llama")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapt(model, method, targets=["lm_head"] if {"linear"} & set(registry[method].works_on) else None)
    stir(model)
    expected = logits(model, batch)
    tied = embedding.weight.clone()
    if registry[method].mergeable:
        ts.merge(model)
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(embedding.weight, tied)
        ts.unmerge(model)
    ts.detach(model)
    assert embedding.weight is head.weight and torch.equal(embedding.weight, tied)


@pairs
def test_two_adapters_one_model(method, kind):
    model, batch = build(kind), inputs(kind)
    with torch.no_grad():
        base = logits(model, batch)
    out = {}
    for seed, name in enumerate("ab"):
        stir(adapt(model, method, name=name), seed)
        ts.activate(model, name)
        out[name] = logits(model, batch)
    assert not torch.equal(out["a"], out["b"])
    ts.activate(model, "a")
    assert torch.equal(logits(model, batch), out["a"])
    assert all(".a." in path or path.endswith(".a") for path in ts.trainable(model))
    ts.activate(model, [])
    with torch.no_grad():
        assert torch.equal(logits(model, batch), base)
    if "tokens" in registry[method].works_on and "linear" not in registry[method].works_on:
        with pytest.raises(ts.TunesmithError, match="virtual tokens"):
            ts.activate(model, {"a": 0.5, "b": 0.5})
        return
    ts.activate(model, {"a": 0.5, "b": 0.0})
    half = logits(model, batch)
    assert not torch.equal(half, out["a"])
    if any(adapter.replaces for adapter in adapters(model, "a").values()):
        with pytest.raises(ts.TunesmithError, match="'b' stands for the whole weight"):
            ts.activate(model, ["a", "b"])
    else:
        ts.activate(model, ["a", "b"])
        assert torch.isfinite(logits(model, batch)).all()
    ts.detach(model, "b")
    ts.activate(model, "a")
    assert torch.equal(logits(model, batch), out["a"])


@pairs
def test_one_adapter_per_row(method, kind):
    model, batch = build(kind), inputs(kind)
    for seed, name in enumerate("ab"):
        stir(adapt(model, method, name=name), seed)
    single = {None: None}
    for name in ("a", "b", None):
        ts.activate(model, name or [])
        single[name] = logits(model, batch)
    rows = ["b", None, "a"]
    if kind == "t5" and method in PROMPTS | {"full"}:  # rows of other lengths; a table of position biases without rows
        with pytest.raises((ts.TunesmithError, RuntimeError)), ts.mixed(model, rows):
            logits(model, batch)
        return
    with ts.mixed(model, rows):
        together = logits(model, batch)
        loss(model, batch).backward()
    for i, name in enumerate(rows):
        torch.testing.assert_close(together[i], single[name][i], atol=1e-5, rtol=1e-5)
    grads = {path: p.grad for path, p in ts.trainable(model).items()}
    assert any(g is not None for path, g in grads.items() if ".a" in path) and any(g is not None for path, g in grads.items() if ".b" in path)


@pairs
def test_trains_the_same_twice(method, kind):
    def run():
        torch.manual_seed(0)
        model = build(kind).train()
        torch.manual_seed(1)
        adapt(model, method)
        return train(model, inputs(kind), steps=12, lr=1e-2 if registry[method].default_lr > 2e-4 else 1e-3)

    first = run()
    assert min(first[-4:]) < first[0] - 1e-5
    assert run() == first
