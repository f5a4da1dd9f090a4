"""What users of peft complain of most, each seen in peft where that is cheap, and what happens here."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.train.prepare import assert_learning, prepare

BATCH = tiny.batch("llama")


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def stir(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def by_peft(model=None, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model or tiny.tiny_llama(), LoraConfig(r=4, **fields))


def learn(model, steps=1, lr=1e-2):
    optimizer = torch.optim.SGD(ts.trainable(model).values(), lr=lr)
    for _ in range(steps):
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Silent non-loading: peft #2118, #2699, #1323, #1337, #276


def renamed(folder, old, new):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): t for key, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def test_renamed_keys_are_an_error_and_not_an_untrained_adapter(tmp_path):
    theirs = by_peft(target_modules=["q_proj"], init_lora_weights=False)
    theirs.save_pretrained(tmp_path)
    renamed(tmp_path, "layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj.lora_b")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)  # a warning, and wrong outputs
    model = tiny.tiny_llama()
    before = logits(model)
    with pytest.raises(ts.TunesmithError, match=r"missing 'model.layers.1.self_attn.q_proj.B' \(did you mean 'model.layers.1.self_attn.q_proj.lora_b.weight'\?\); unexpected"):
        ts.load(model, tmp_path)
    assert torch.equal(logits(model), before) and "_tunesmith" not in model.__dict__


def test_tensors_that_nothing_reads_are_an_error(tmp_path):
    by_peft(target_modules=["q_proj"], init_lora_weights=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, tmp_path / "adapter_model.safetensors")
    PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)  # says nothing
    with pytest.raises(ts.TunesmithError, match="layers.7.self_attn.q_proj"):
        ts.load(tiny.tiny_llama(), tmp_path)


def test_a_wrong_shape_is_named(tmp_path):
    ts.save(ts.adapt(tiny.tiny_llama(), "ia3"), tmp_path, format="peft")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    save_file(tensors | {key: torch.ones(99, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ts.TunesmithError, match=r"'model.layers.0.self_attn.k_proj.l' has shape \(99,\), the model needs \(16,\)"):
        ts.load(tiny.tiny_llama(), tmp_path)


# A requested family that matches nothing: peft #2527, #2545


def test_a_family_that_matches_nothing_is_said():
    by_peft(target_modules=["q_proj", "experts_up"])  # says nothing
    with pytest.warns(UserWarning, match=r"'experts_up' of lora matches no layer of LlamaForCausalLM; the model's layers end in .*up_proj"):
        model = ts.adapt(tiny.tiny_llama(), ts.LoRA(targets=["q_proj", "experts_up"]))
    assert "q_proj" in str(ts.summary(model)) and "experts_up" not in str(ts.summary(model))
    with pytest.raises(ts.TunesmithError, match=r"'query' of lora matches no layer of LlamaForCausalLM.*"):
        ts.adapt(tiny.tiny_llama(), ts.LoRA(targets="query"))


# Gradient checkpointing that kills gradients: peft #137, #1142; trl #3089


def test_gradient_checkpointing_keeps_gradients():
    model = prepare(ts.adapt(tiny.tiny_llama(), "lora"), gradient_checkpointing=True)
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert assert_learning(model) is None
    assert all(p.grad is not None for p in ts.trainable(model).values())


class Reentrant(nn.Module):
    """Recomputes its body in the way that gives no gradients when the input needs none."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*")
def test_adapters_without_gradients_are_found_out():
    theirs = by_peft(Reentrant(), target_modules=["0", "2"], modules_to_save=["head"])
    theirs(torch.ones(3, 8)).sum().backward()
    assert not [name for name, p in theirs.named_parameters() if "lora" in name and p.grad is not None]  # nobody says so

    model = ts.adapt(Reentrant(), ts.LoRA(targets=["0", "2"], modules_to_save=["head"]))
    model(torch.ones(3, 8)).sum().backward()
    assert "2 of 3 adapted modules got no gradient in the first step: body.0, body.2" in assert_learning(model)
    model = ts.adapt(Reentrant(), ts.LoRA(targets=["0", "2"]))
    model(torch.ones(3, 8))
    with pytest.raises(ts.TunesmithError, match="no adapter got a gradient"):
        assert_learning(model)


# Embeddings, new tokens, tied heads: peft #1147, #2777, #2399, #2376, #1689


def resized(tie):
    torch.manual_seed(0)
    model = tiny.tiny_llama(tie=tie)
    model.resize_token_embeddings(tiny.VOCAB + 2, mean_resizing=False)
    return model


NEW = torch.tensor([[5, 6, tiny.VOCAB, 7, tiny.VOCAB + 1, 8]])


@pytest.mark.filterwarnings("ignore")
def test_trained_new_tokens_reach_a_tied_head(tmp_path):
    theirs = by_peft(resized(tie=True), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with torch.no_grad():
        theirs.get_input_embeddings().weight[tiny.VOCAB :] += 1
    assert not torch.equal(theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight)  # the head stays behind

    model = ts.adapt(resized(tie=True), ts.LoRA(targets="q_proj", modules_to_save=["embed_tokens"]))
    assert ts.summary(model).trainable == 322 * 32 + 2 * 8 * 64  # one table, not two
    before = model(NEW).logits[..., tiny.VOCAB :]
    optimizer = torch.optim.SGD(ts.trainable(model).values(), lr=1.0)
    model(NEW, labels=NEW).loss.backward()
    optimizer.step()
    assert not torch.allclose(model(NEW).logits[..., tiny.VOCAB :], before)

    expected = model.eval()(NEW).logits
    ts.save(model, tmp_path / "a")
    assert len([key for key in load_file(tmp_path / "a" / "adapter.safetensors") if "lora" not in key and key.endswith("weight")]) == 1
    assert torch.equal(ts.load(resized(tie=True), tmp_path / "a")(NEW).logits, expected)
    ts.save(model, tmp_path / "p", format="peft")
    torch.testing.assert_close(PeftModel.from_pretrained(resized(tie=True), tmp_path / "p").eval()(NEW).logits, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(ts.load(resized(tie=True), tmp_path / "p")(NEW).logits, expected, atol=2e-5, rtol=0)

    ts.merge(model, unload=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(model(NEW).logits, expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "merged")(NEW).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_merged_head_is_not_tied_again(target, tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(tie=True), ts.LoRA(targets=target)))
    expected = logits(model)
    ts.merge(model, unload=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    again.tie_weights()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_peft_saved_because_they_were_resized_are_read(tmp_path):
    tiny.save_tiny(tmp_path / "base", "llama")
    from transformers import AutoModelForCausalLM

    def base():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(tiny.VOCAB + 2, mean_resizing=False)
        return model

    theirs = by_peft(base(), target_modules=["q_proj"], init_lora_weights=False)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[tiny.VOCAB :] += 1
    theirs.save_pretrained(tmp_path / "a")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    model = ts.load(base(), tmp_path / "a")
    torch.testing.assert_close(model.eval()(NEW).logits, theirs.eval()(NEW).logits, atol=2e-5, rtol=0)
    with pytest.raises(ts.TunesmithError, match=r"'lm_head.weight' has shape \(322, 32\), the model needs \(320, 32\)|'model.embed_tokens.weight' has shape"):
        ts.load(tiny.tiny_llama(), tmp_path / "a")


# Dtypes: peft #1706, #2421, #1249, #3055; AgileRL #623


class Seen(TorchDispatchMode):
    """The (dtype, elements) of every tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.made.append((t.dtype, tuple(t.shape), t.untyped_storage().data_ptr()))
        return out


def linear_step(layer, x):
    """What one adapted linear layer makes in a forward and backward, and keeps between them."""
    kept = []
    with Seen() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append((t.dtype, tuple(t.shape), t.data_ptr())), t)[1], lambda t: t):
        y = layer(x)
    with seen:
        y.sum().backward()
    return seen.made, kept


def wide(made, elements):
    return [shape for dtype, shape, _ in made if dtype == torch.float32 and torch.Size(shape).numel() >= elements]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "series-adapter"])
def test_float32_adapters_do_not_copy_a_bfloat16_input(method):
    tokens, size = 48, 64
    x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)

    def base():
        return nn.Sequential(nn.Linear(size, size, bias=False)).bfloat16()

    if method in ("lora", "dora"):
        theirs = by_peft(base(), target_modules=["0"], use_dora=method == "dora").train()
        assert (torch.float32, (tokens, size)) in [entry[:2] for entry in linear_step(theirs, x)[1]]

    model = ts.adapt(base(), {"method": method, "targets": "0", **({"bottleneck": 4} if method == "series-adapter" else {})}).train()
    made, kept = linear_step(model, x)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in ts.trainable(model).values())
    assert not wide(made, tokens * size) and not wide(kept, tokens * size)


# DoRA's cost: peft #1474, #2651, #3387


def test_dora_never_makes_the_whole_direction_matrix():
    tokens, size = 24, 96
    x = torch.randn(tokens, size, requires_grad=True)
    theirs = by_peft(nn.Sequential(nn.Linear(size, size)), target_modules=["0"], use_dora=True)
    whole = (size, size)
    assert whole in [shape for _, shape, _ in linear_step(theirs, x)[0]]

    model = ts.adapt(nn.Sequential(nn.Linear(size, size)), ts.DoRA(targets="0"))
    stored = model[0].weight.data_ptr()
    made, kept = linear_step(model, x)
    assert not [shape for _, shape, where in made + kept if shape == whole and where != stored]


def test_dora_keeps_its_norm_between_evaluations():
    model = stir(ts.adapt(tiny.tiny_llama(), "dora"))
    logits(model)
    with torch.no_grad(), Seen() as seen:
        model(**BATCH)
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not [shape for _, shape, where in seen.made if shape in ((16, 8), (32, 8), (64, 8)) and where not in stored]  # no (out, rank) product
    for change in (lambda: stir(model, 1), lambda: learn(model, lr=1.0), lambda: base_changes(model)):
        before = logits(model)
        change()
        now = logits(model)
        assert not torch.equal(now, before)
        torch.testing.assert_close(now, model(**BATCH).logits, atol=1e-6, rtol=0)  # with gradients nothing is kept


def base_changes(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


# Sharded saving that leaves empty tensors: peft #453, #2892


@pytest.mark.parametrize("format", ["tunesmith", "peft"])
def test_an_empty_shard_is_not_saved(format, tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(), "lora"))
    ts.save(model, tmp_path / "a", format=format)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    adapter = adapters(model, "default")["model.layers.0.self_attn.q_proj"]
    adapter.A.data = torch.empty(0)
    with pytest.raises(ts.TunesmithError, match="'A' of adapter 'default' at 'model.layers.0.self_attn.q_proj' is empty.*gather"):
        ts.save(model, tmp_path / "a", format=format)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


# Two stages: peft #2264, #2873; continue, stack, or merge and go on


def test_an_adapter_is_trained_further(tmp_path):
    ts.save(stir(ts.adapt(tiny.tiny_llama(), "lora")), tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny.tiny_llama(), _peft_copy(tmp_path))
    assert not [p for p in theirs.parameters() if p.requires_grad]  # loaded frozen unless asked otherwise
    model = ts.load(tiny.tiny_llama(), tmp_path / "a")
    before = logits(model)
    learn(model)
    assert not torch.equal(logits(model), before)


def _peft_copy(folder):
    ts.save(ts.load(tiny.tiny_llama(), folder / "a"), folder / "peft", format="peft")
    return folder / "peft"


def test_adapters_stack():
    model = stir(ts.adapt(tiny.tiny_llama(), "lora", name="a"))
    a = logits(model)
    ts.adapt(model, "ia3", name="b")
    ts.activate(model, ["a", "b"])
    torch.testing.assert_close(logits(model), a, atol=1e-5, rtol=0)  # b starts as nothing
    learn(model)
    both = logits(model)
    ts.merge(model)
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=0)
    ts.unmerge(model)
    assert torch.equal(logits(model), both)


def test_merge_and_a_new_adapter_leave_their_lineage_in_the_file(tmp_path):
    model = stir(ts.adapt(tiny.tiny_llama(), "lora", name="first"))
    ts.save(model, tmp_path / "first", name="first")
    ts.merge(model)
    stir(ts.adapt(model, ts.IA3(), name="second"), 1)
    expected = logits(model)
    ts.save(model, tmp_path / "second", name="second")
    assert json.loads((tmp_path / "second" / "adapter.json").read_text())["lineage"] == [{"name": "first", "weight": 1.0, "method": "lora"}]
    with pytest.raises(ts.TunesmithError, match="trained on top of adapter 'first'.*merge 'first' first, or force"):
        ts.load(tiny.tiny_llama(), tmp_path / "second")
    model = ts.load(tiny.tiny_llama(), tmp_path / "first")
    ts.merge(model)
    torch.testing.assert_close(logits(ts.load(model, tmp_path / "second")), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(logits(ts.load(tiny.tiny_llama(), tmp_path / "second", force=True)), expected, atol=1e-3)


# New models: peft #1206, adapters #392


class Odd(nn.Module):
    """A transformer that nobody has seen, with names of its own."""

    def __init__(self, width=24, words=40):
        super().__init__()
        torch.manual_seed(0)
        self.glyphs = nn.Embedding(words, width)
        self.floors = nn.ModuleList(self.Floor(width) for _ in range(2))
        self.tidy = self.RootScaleNorm(width)
        self.speak = nn.Linear(width, words, bias=False)

    class RootScaleNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight

    class Floor(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.calm, self.quiet = Odd.RootScaleNorm(width), nn.LayerNorm(width)
            self.ask, self.offer, self.hold, self.join = (nn.Linear(width, width) for _ in range(4))
            self.swell, self.shrink = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

        def forward(self, x):
            h = self.calm(x)
            x = x + self.join(nn.functional.scaled_dot_product_attention(self.ask(h)[:, None], self.offer(h)[:, None], self.hold(h)[:, None], is_causal=True)[:, 0])
            return x + self.shrink(nn.functional.silu(self.swell(self.quiet(x))))

    def forward(self, ids):
        x = self.glyphs(ids)
        for floor in self.floors:
            x = floor(x)
        return self.speak(self.tidy(x))


@pytest.mark.parametrize(
    "method,sites", [("lora", 12), ("dora", 12), ("ia3", 2), ("ln-tuning", 5), ("series-adapter", 2), ("bitfit", 14), ("linear-probe", 1), ("full", 19)]
)
def test_a_model_that_nobody_has_seen(method, sites, tmp_path):
    ids = torch.arange(12).view(2, 6)
    model = ts.adapt(Odd(), method)
    report = ts.summary(model)
    assert len(report.sites) == sites
    assert ("speak" in [s.path for s in report.sites]) == (method in ("linear-probe", "full"))
    optimizer = torch.optim.AdamW(ts.trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    ts.save(model, tmp_path)
    assert torch.equal(ts.load(Odd(), tmp_path)(ids), model(ids))
