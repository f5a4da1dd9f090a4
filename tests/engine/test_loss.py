"""The loss without logits is the model's own loss, whatever is attached to it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM

import tunesmith as ts
from tests import tiny

B, T = 3, 11
IDS = torch.randint(5, tiny.VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[2, 6:] = -100
MASK = torch.ones_like(IDS)
MASK[1, -3:] = 0
MASKED = LABELS.masked_fill(MASK == 0, -100)


def gemma2(**config):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(Gemma2Config(**settings | config)).eval()


def stir(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(method, build=tiny.tiny_llama, **config):
    return stir(ts.adapt(build(), {"method": method, **config}))


def checkpointed():
    model = adapted("lora")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


MODELS = {
    "plain": tiny.tiny_llama,
    "gpt2": tiny.tiny_gpt2,
    "tied": lambda: tiny.tiny_llama(tie=True),
    "lora": lambda: adapted("lora"),
    "lora on the head": lambda: adapted("lora", targets=["lm_head", "q_proj"]),
    "lora on a tied head": lambda: adapted("lora", lambda: tiny.tiny_llama(tie=True), targets=["lm_head", "q_proj"]),
    "dora on the head": lambda: adapted("dora", targets=["lm_head"]),
    "head trained in full": lambda: adapted("lora", modules_to_save=["lm_head"]),
    "tied head trained in full": lambda: adapted("lora", lambda: tiny.tiny_llama(tie=True), modules_to_save=["lm_head"]),
    "soft caps": gemma2,
    "soft caps and lora": lambda: adapted("lora", gemma2),
    "prompt": lambda: adapted("prompt-tuning", tokens=3),
    "prefix": lambda: adapted("prefix-tuning", tokens=3),
    "checkpointing": checkpointed,
}


def step(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def same(model, labels=LABELS, mask=None, atol=1e-6, rtol=1e-4):
    """The loss and gradients of both ways."""
    theirs, their_grads = step(model, model(input_ids=IDS, attention_mask=mask, labels=labels).loss)
    ours, our_grads = step(model, ts.causal_lm_loss(model, IDS, labels, mask))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    assert our_grads.keys() == their_grads.keys() and their_grads
    for path, grad in their_grads.items():
        torch.testing.assert_close(our_grads[path], grad, atol=atol, rtol=rtol, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("mask,labels", [(None, LABELS), (MASK, MASKED)], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_models_own_loss(kind, mask, labels):
    same(MODELS[kind](), labels, mask)


@pytest.mark.parametrize("kind", ["plain", "tied", "lora", "soft caps"])
def test_bfloat16(kind):
    model = MODELS[kind]().bfloat16()
    theirs, their_grads = step(model, model(input_ids=IDS, labels=LABELS).loss)
    ours, our_grads = step(model, ts.causal_lm_loss(model, IDS, LABELS))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.float(), atol=1e-2, rtol=0)
    for path, grad in their_grads.items():
        assert our_grads[path].dtype == grad.dtype
        assert (our_grads[path].float() - grad.float()).norm() <= 0.03 * grad.float().norm(), path


def test_dropout_draws_the_same_numbers():
    model = adapted("lora", dropout=0.3, targets=["q_proj", "lm_head"]).train()
    torch.manual_seed(3)
    theirs = model(input_ids=IDS, labels=LABELS).loss
    torch.manual_seed(3)
    torch.testing.assert_close(ts.causal_lm_loss(model, IDS, LABELS), theirs)


def test_parts_of_a_batch_add_up():
    model = tiny.tiny_llama()
    whole = step(model, ts.causal_lm_loss(model, IDS, LABELS))
    count = (LABELS[:, 1:] != -100).sum()
    parts = step(model, sum(ts.causal_lm_loss(model, IDS[i : i + 1], LABELS[i : i + 1], count=count) for i in range(B)))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_no_labels_at_all():
    model, none = tiny.tiny_llama(), torch.full_like(IDS, -100)
    assert ts.causal_lm_loss(model, IDS, none).isnan() and model(input_ids=IDS, labels=none).loss.isnan()
    loss, grads = step(model, ts.causal_lm_loss(model, IDS, none, count=7))
    assert loss == 0 and not any(g.any() for g in grads.values())


def test_an_adapter_that_comes_and_goes():
    model = tiny.tiny_llama()
    plain = ts.causal_lm_loss(model, IDS, LABELS).detach()
    stir(ts.adapt(model, ts.LoRA(targets=["lm_head"]), name="head"))
    same(model)
    stir(ts.adapt(model, ts.PromptTuning(tokens=2), name="prompt"))
    same(model)
    ts.activate(model, ["head", "prompt"])
    same(model)
    ts.activate(model, "head")
    same(model)
    ts.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(ts.causal_lm_loss(model, IDS, LABELS), model(input_ids=IDS, labels=LABELS).loss)
    ts.unmerge(model)
    ts.detach(model)
    torch.testing.assert_close(ts.causal_lm_loss(model, IDS, LABELS).detach(), plain)


def test_a_hook_on_the_head_is_seen():
    model = tiny.tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    same(model)


def test_a_model_that_scales_its_logits():
    class Scaled(type(tiny.tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 7
            return output

    model = tiny.tiny_llama()
    model.__class__ = Scaled
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
        torch.testing.assert_close(ts.causal_lm_loss(model, IDS, LABELS), expected)


def test_mixed_rows_of_an_adapted_head():
    model = tiny.tiny_llama()
    ids = torch.randint(5, tiny.VOCAB, (2, 300), generator=torch.Generator().manual_seed(1))  # longer than one piece of the head
    for seed, name in enumerate("ab"):
        stir(ts.adapt(model, ts.LoRA(targets=["lm_head", "q_proj"]), name=name), seed)
    ts.causal_lm_loss(model, ids, ids)
    for rows in (["a", "b"], ["b", None]):
        with ts.mixed(model, rows):
            theirs, their_grads = step(model, model(input_ids=ids, labels=ids).loss)
            ours, our_grads = step(model, ts.causal_lm_loss(model, ids, ids))
        torch.testing.assert_close(ours, theirs)
        assert our_grads.keys() == their_grads.keys()
        torch.testing.assert_close(our_grads, their_grads, atol=1e-6, rtol=1e-4)


def test_backward_after_the_mix_has_ended():
    model = tiny.tiny_llama()
    for seed, name in enumerate("ab"):
        stir(ts.adapt(model, ts.LoRA(targets=["lm_head", "q_proj"]), name=name), seed)

    def steps(loss):
        values = []
        for rows in (["a", "b", None], ["b", "a", "b"]):
            with ts.mixed(model, rows):
                values.append(loss())
        return step(model, sum(values))

    ours, theirs = steps(lambda: ts.causal_lm_loss(model, IDS, LABELS)), steps(lambda: model(input_ids=IDS, labels=LABELS).loss)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator made."""

    def __init__(self, besides=()):
        super().__init__()
        self.elements, self.besides = 0, besides

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.shape not in self.besides:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("kind", ["plain", "lora", "lora on the head", "mixed", "prompt"])
def test_the_logits_are_never_there(kind):
    vocab, rows, length = 4000, 4, 256
    model = tiny.tiny_llama(layers=1, hidden=16, vocab_size=vocab)
    ids = torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    if kind == "mixed":
        for name in "ab":
            stir(ts.adapt(model, ts.LoRA(targets=["q_proj", "lm_head"]), name=name))
    elif kind != "plain":
        stir(ts.adapt(model, ts.PromptTuning() if kind == "prompt" else ts.LoRA(targets=["q_proj"] + ["lm_head"] * (kind != "lora"))))

    def run(loss):
        with Largest() as seen:
            loss().backward()
        return seen.elements

    def both():
        return run(lambda: model(input_ids=ids, labels=ids).loss), run(lambda: ts.causal_lm_loss(model, ids, ids))

    if kind == "mixed":
        with ts.mixed(model, ["a", None, "b", "a"]):
            theirs, ours = both()
    else:
        theirs, ours = both()
    assert theirs >= rows * (length - 1) * vocab
    assert ours <= 256 * vocab
