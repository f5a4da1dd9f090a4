"""Lean blocks compute what the model's own blocks compute, and go without a trace."""

import copy
import pickle

import pytest
import torch
import transformers

import tunesmith as ts
from tests import tiny
from tunesmith.engine.lean import lean, unlean

SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {"Llama": 7, "Qwen2": 7, "Qwen3": 11, "Gemma": 0, "Mistral": 7, "Phi3": 5, "Olmo2": None}  # modules that lean takes
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def model_of(family, dtype=torch.float32, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{family}Config")(**SIZE | config)
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
        for p in model.parameters():  # norms that are all ones would hide a forgotten weight
            torch.nn.init.normal_(p, mean=0.3 * (p.dim() == 1), std=0.2)
        return model.to(dtype).eval()


def step(model):
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {path: p.grad.clone() for path, p in model.named_parameters()}


def types(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_outputs_and_gradients(family, dtype):
    model = model_of(family, dtype)
    before, keys = types(model), model.state_dict().keys()
    names = [t.__qualname__ for t in before]
    logits, grads = step(model)
    lean(model)
    taken = sum(a is not b for a, b in zip(types(model), before, strict=True))
    assert FAMILIES[family] in (None, taken)
    assert [t.__qualname__ for t in types(model)] == names and model.state_dict().keys() == keys
    now, lean_grads = step(model)
    assert torch.equal(now, logits)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, logits)
    for path, grad in grads.items():
        error = (lean_grads[path].double() - grad.double()).norm() / grad.double().norm().clamp(min=1e-30)
        assert error < (1e-6 if dtype == torch.float32 else 1e-2), path
    once = types(model)
    assert types(lean(model)) == once  # twice is once
    assert types(unlean(model)) == before and types(unlean(model)) == before
    assert torch.equal(step(model)[0], logits)


def test_keeps_less_for_backward():
    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t):
            keep = model(input_ids=IDS, use_cache=False).logits
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(n for where, n in sizes.items() if where not in held), keep

    model = ts.adapt(tiny.tiny_llama(vocab_size=64), "lora")
    assert kept(lean(model))[0] < 0.75 * kept(unlean(model))[0]


def test_copies():
    model = lean(model_of("Llama"))
    logits, grads = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert types(twin) == types(model)
        now, twin_grads = step(twin)
        assert torch.equal(now, logits) and all(torch.equal(twin_grads[path], g) for path, g in grads.items())
        assert types(unlean(twin)) == types(model_of("Llama"))
    assert types(model) != types(model_of("Llama"))  # a copy's way back is its own


def test_copies_of_adapted_lean_modules():
    model = lean(model_of("Llama"))
    ts.adapt(model, {"method": "lora", "targets": {"q_proj": {}, "layers.0.input_layernorm": {"method": "ln-tuning"}}})
    logits = model(input_ids=IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=IDS).logits, logits)
        assert types(ts.detach(twin)) == types(model_of("Llama"))


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_another_activation_is_left_alone(act):
    model = lean(model_of("Llama", hidden_act=act))
    assert type(model.model.layers[0].mlp) is transformers.models.llama.modeling_llama.LlamaMLP
    assert type(model.model.norm) is not transformers.models.llama.modeling_llama.LlamaRMSNorm


def test_one_model_with_both_activations():
    model, other = model_of("Llama"), model_of("Llama", hidden_act="gelu")
    model.model.layers[1].mlp = other.model.layers[1].mlp
    logits = step(model)[0]
    lean(model)
    assert type(model.model.layers[0].mlp) is not type(model.model.layers[1].mlp)
    assert torch.equal(step(model)[0], logits)


def test_a_forward_of_its_own_and_a_norm_with_more_to_it_are_left_alone():
    class CentredRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps, self.shift = torch.nn.Parameter(torch.ones(4)), 1e-6, torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + self.shift

    norm = CentredRMSNorm()
    assert type(lean(norm)) is CentredRMSNorm
    model = model_of("Llama")
    model.model.norm.forward = lambda x: 2 * x
    cls = type(model.model.norm)
    assert type(lean(model).model.norm) is cls and torch.equal(model.model.norm(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("method", ["lora", "ln-tuning", "ia3", "series-adapter", "full", "prompt-tuning", "prefix-tuning"])
def test_adapt_loss_and_detach_leave_every_type_as_it_was(method):
    model = model_of("Llama")
    before = types(model)
    ts.adapt(model, method)
    ts.causal_lm_loss(model, IDS, IDS).backward()
    assert types(model) != before
    assert types(ts.detach(model)) == before


def test_one_of_two_detached_after_the_loss():
    model = model_of("Llama")
    before = types(model)
    ts.adapt(model, "lora", name="a")
    ts.causal_lm_loss(model, IDS, IDS)
    ts.adapt(model, "ln-tuning", name="b")  # over norms that are lean already
    ts.causal_lm_loss(model, IDS, IDS)
    ts.detach(model, "b")
    loss = ts.causal_lm_loss(model, IDS, IDS)
    torch.testing.assert_close(loss, model(input_ids=IDS, labels=IDS).loss)
    assert types(ts.detach(model, "a")) == before
