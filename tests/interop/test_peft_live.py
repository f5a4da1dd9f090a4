"""Against the installed peft: each library reads what the other wrote, and computes the same."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.methods.peft_targets import patterned, target_paths

pytestmark = pytest.mark.filterwarnings("ignore")
BUILDERS = tiny.BUILDERS | {"tied": lambda: tiny.tiny_llama(tie=True), "moe": lambda: Nested(), "ends": lambda: Ends(), "roberta": lambda: roberta()}


def roberta():
    """A classifier whose head takes the first token itself, without a pooler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = dict(vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3, pad_token_id=0)
        return RobertaForSequenceClassification(RobertaConfig(**settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


class Nested(nn.Module):
    """Numbers inside numbers, as in mixtures of experts."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2))}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + sum(torch.tanh(e["up"](x)) for e in layer["experts"])
        return x


class Ends(nn.Module):
    """Paths that are the ends of other paths."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.a, self.b = (nn.ModuleDict({"q": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2))

    def forward(self, x):
        return self.norm(self.q(x) + self.a["norm"](self.a["q"](x)) + self.b["norm"](self.b["q"](x)))


def output(model, kind):
    if kind in ("moe", "ends"):
        return model(torch.linspace(-1, 1, 24).view(3, 8))
    if kind == "convnet":
        return model(tiny.batch(kind)["pixel_values"])
    return model(**tiny.batch("llama" if kind == "tied" else kind)).logits


def logits(model, kind):
    with torch.no_grad():
        return output(model.eval(), kind)


def close(a, b):
    """Equal but for the virtual positions, which peft keeps in a decoder's output."""
    if a.dim() == 3:
        length = min(a.shape[1], b.shape[1])
        a, b = a[:, -length:], b[:, -length:]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def stir(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def by_peft(kind, config, folder, name="default"):
    """What peft computes with a stirred adapter, which it has written."""
    model = get_peft_model(BUILDERS[kind](), config, adapter_name=name)
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return logits(model, kind)


def lora(*targets, **fields):
    return LoraConfig(target_modules=list(targets), r=4, lora_alpha=6, **fields)


LINEAR = ["q_proj", "v_proj", "down_proj"]

# name: (model, what peft is told)
PEFT = {
    "qv": ("llama", lambda: lora("q_proj", "v_proj")),
    "all-linear": ("llama", lambda: LoraConfig(target_modules="all-linear", r=4)),
    "rslora": ("llama", lambda: lora("q_proj", use_rslora=True)),
    "dora": ("llama", lambda: lora("q_proj", "down_proj", use_dora=True)),
    "dora rslora": ("gpt2", lambda: lora("c_attn", "c_proj", use_dora=True, use_rslora=True)),
    "dora conv": ("convnet", lambda: lora("0", "8", use_dora=True)),
    "pissa": ("llama", lambda: lora("q_proj", "v_proj", init_lora_weights="pissa")),
    "pissa rslora": ("llama", lambda: lora("q_proj", init_lora_weights="pissa", use_rslora=True)),
    "pissa gpt2": ("gpt2", lambda: lora("c_attn", init_lora_weights="pissa")),
    "olora-free gaussian": ("llama", lambda: lora("q_proj", init_lora_weights="gaussian")),
    "patterns": ("llama", lambda: lora("q_proj", "v_proj", "up_proj", rank_pattern={"v_proj": 2, r"model.layers.1.*up_proj": 6}, alpha_pattern={"q_proj": 1, "layers.0.mlp.up_proj": 32})),
    "patterns overlap": ("llama", lambda: lora("q_proj", "v_proj", rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6}, alpha_pattern={"1.self_attn.q_proj": 3, "q_proj": 5})),
    "patterns rslora": ("llama", lambda: lora("q_proj", "v_proj", use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 9})),
    "patterns dora": ("llama", lambda: lora("q_proj", "v_proj", use_dora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 9})),
    "modules_to_save": ("bert", lambda: lora("query", "value", task_type="SEQ_CLS")),
    "modules_to_save lm": ("llama", lambda: lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "modules_to_save block": ("bert", lambda: lora("query", modules_to_save=["pooler", "classifier"])),
    "bias lora_only": ("bert", lambda: lora("query", "dense", bias="lora_only")),
    "bias all": ("bert", lambda: lora("query", "value", bias="all", task_type="SEQ_CLS")),
    "bias gpt2": ("gpt2", lambda: lora("c_attn", bias="all", task_type="CAUSAL_LM")),
    "bias none there": ("llama", lambda: lora("q_proj", bias="all")),
    "embedding": ("llama", lambda: lora("embed_tokens", "q_proj")),
    "embedding regex": ("llama", lambda: LoraConfig(target_modules=r".*embed_tokens|.*q_proj", r=4)),
    "embedding tied": ("tied", lambda: lora("embed_tokens")),
    "embedding gpt2": ("gpt2", lambda: lora("wte", "wpe")),
    "embedding rslora": ("bert", lambda: lora("word_embeddings", "query", use_rslora=True)),
    "conv2d": ("convnet", lambda: lora("0", "3", "8")),
    "conv2d vit": ("vit", lambda: lora("projection", "q_proj")),
    "layers": ("llama", lambda: lora("q_proj", layers_to_transform=[1])),
    "layer": ("llama", lambda: lora("q_proj", layers_to_transform=0, layers_pattern="layers")),
    "exclude": ("llama", lambda: lora("q_proj", "v_proj", exclude_modules=["layers.0.self_attn.q_proj"])),
    "exclude regex": ("llama", lambda: lora("q_proj", "v_proj", exclude_modules=r".*\.1\..*v_proj")),
    "regex": ("llama", lambda: LoraConfig(target_modules=r"model\.layers\.\d\.(self_attn|mlp)\.(q|up)_proj", r=4)),
    "conv1d": ("gpt2", lambda: lora("c_attn", "c_fc", "mlp.c_proj")),
    "t5": ("t5", lambda: lora("q", "v", "wo", task_type="SEQ_2_SEQ_LM")),
    "model table": ("llama", lambda: LoraConfig(r=4)),
    "nested numbers": ("moe", lambda: lora("up", layers_to_transform=[1], exclude_modules=["experts.0.up"])),
    "dropout": ("llama", lambda: lora("q_proj", lora_dropout=0.3)),
    "adalora": ("llama", lambda: AdaLoraConfig(target_modules=["q_proj", "down_proj"], init_r=5, lora_alpha=7, target_r=2, tinit=3, tfinal=4, total_step=20)),
    "shira": ("llama", lambda: ShiraConfig(target_modules=["q_proj", "down_proj"], r=2, random_seed=5)),
    "adalora gpt2": ("gpt2", lambda: AdaLoraConfig(target_modules=["c_attn", "mlp.c_proj"], init_r=4, total_step=9)),
    "adalora conv2d": ("convnet", lambda: AdaLoraConfig(target_modules=["3", "8"], init_r=2, total_step=9)),
    "ia3": ("llama", lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 gpt2": ("gpt2", lambda: IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3 bert": ("bert", lambda: IA3Config(task_type="SEQ_CLS")),
    "ia3 t5": ("t5", lambda: IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3 regex": ("llama", lambda: IA3Config(target_modules=r".*\.(k_proj|down_proj)", feedforward_modules=r".*down_proj")),
    "ia3 conv2d": ("convnet", lambda: IA3Config(target_modules=["0", "3", "8"], feedforward_modules=["3"])),
    "ia3 partial suffix": ("llama", lambda: IA3Config(target_modules=["k_proj", "down_proj", "n_proj"], feedforward_modules=["n_proj"])),
    "ln": ("llama", lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "ln gpt2": ("gpt2", lambda: LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "ln bert": ("bert", lambda: LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")),
    "ln t5": ("t5", lambda: LNTuningConfig(target_modules=["layer_norm"], exclude_modules=["encoder.final_layer_norm"])),
    "ln regex": ("llama", lambda: LNTuningConfig(target_modules=r".*layers.1.*layernorm")),
    "prompt": ("llama", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt gpt2": ("gpt2", lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt bert": ("bert", lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt roberta": ("roberta", lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt t5": ("t5", lambda: PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)),
    "prefix": ("llama", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix gpt2": ("gpt2", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix projected": ("llama", lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12)),
    "p-tuning": ("llama", lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=12)),
    "p-tuning lstm": ("gpt2", lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=12)),
    "p-tuning bert": ("bert", lambda: PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "p-tuning t5": ("t5", lambda: PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)),
    "miss plain": ("llama", lambda: MissConfig(r=8, target_modules=LINEAR)),
    "miss padded": ("llama", lambda: MissConfig(r=7, target_modules=LINEAR)),
    "miss bat": ("llama", lambda: MissConfig(r=8, target_modules=LINEAR, init_weights="bat")),
    "miss bat with a dropout that does nothing": ("llama", lambda: MissConfig(r=8, target_modules=LINEAR, init_weights="bat", miss_dropout=0.1)),
    "miss mini": ("llama", lambda: MissConfig(r=7, target_modules=LINEAR, init_weights="mini", mini_r=4)),
    "miss mini at its default": ("llama", lambda: MissConfig(r=8, target_modules=LINEAR, init_weights="mini")),
    "miss dropout": ("llama", lambda: MissConfig(r=8, target_modules=["q_proj"], miss_dropout=0.3)),
    "miss regex": ("llama", lambda: MissConfig(r=8, target_modules=r".*layers\.1.*(q|up)_proj")),
    "miss modules_to_save": ("bert", lambda: MissConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "miss random start": ("llama", lambda: MissConfig(r=8, target_modules=LINEAR, init_weights=False)),
    "vera": ("llama", lambda: VeraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=6, projection_prng_key=9, d_initial=0.3)),
    "vera gpt2": ("gpt2", lambda: VeraConfig(target_modules=["c_attn", "mlp.c_proj"], r=5)),
    "vera bert": ("bert", lambda: VeraConfig(target_modules=["query", "dense"], r=3, task_type="SEQ_CLS", layers_to_transform=[1])),
    "fourierft": ("llama", lambda: FourierFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=30, scaling=20.0, random_loc_seed=4)),
    "fourierft gpt2": ("gpt2", lambda: FourierFTConfig(target_modules=["c_attn", "c_fc"], n_frequency=30, scaling=20.0, init_weights=True)),
    "fourierft pattern": ("llama", lambda: FourierFTConfig(target_modules=["q_proj", "v_proj"], n_frequency=30, scaling=20.0, n_frequency_pattern={"1.self_attn.q_proj": 7})),
    "fourierft bert": ("bert", lambda: FourierFTConfig(target_modules=["query"], n_frequency=30, scaling=20.0, task_type="SEQ_CLS")),
    "olora": ("llama", lambda: lora("q_proj", "v_proj", "down_proj", init_lora_weights="olora")),
    "olora rslora": ("bert", lambda: lora("query", init_lora_weights="olora", use_rslora=True)),
}  # fmt: skip


COPIES = (".base_layer.weight", ".original_module.", ".modules_to_save.")  # the base's own weights and doubles that peft adds to some files


@pytest.mark.parametrize("case", PEFT)
def test_reads_what_peft_wrote_and_writes_it_back(case, tmp_path):
    kind, config = PEFT[case]
    torch.manual_seed(0)
    expected = by_peft(kind, config(), tmp_path / "theirs")
    model = BUILDERS[kind]()
    base = logits(model, kind)
    ts.load(model, tmp_path / "theirs")
    close(logits(model, kind), expected)
    assert not torch.equal(logits(model, kind), base)

    ts.save(model, tmp_path / "ours", format="peft")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    before = {key: t for key, t in before.items() if not any(copy in key for copy in COPIES)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours")
    close(logits(again, kind), expected)
    assert torch.equal(logits(ts.load(BUILDERS[kind](), tmp_path / "ours"), kind), logits(model, kind))


def test_projections_that_the_file_leaves_out_are_drawn_again_to_the_bit(tmp_path):
    kind, config = PEFT["vera"]
    expected = by_peft(kind, config(), tmp_path)
    model = ts.load(BUILDERS[kind](), tmp_path)
    assert not any(a.projections.state_dict() for a in adapters(model, "default").values() if hasattr(a, "projections"))
    close(logits(model, kind), expected)


# name: (model, what tunesmith is told)
OWN = {
    "lora": ("llama", {"method": "lora"}),
    "lora one of two ends": ("ends", {"method": "lora", "targets": {"^q": {}, "^a.q": {"rank": 2}}}),
    "ia3 one of two ends": ("ends", {"method": "ia3", "targets": ["^q", "^b.q"], "feedforward": ["^b.q"]}),
    "ln one of two ends": ("ends", {"method": "ln-tuning", "targets": ["^norm"]}),
    "lora overrides": ("llama", {"method": "lora", "targets": {"q_proj": {"rank": 2}, "layers.1.mlp.up_proj": {"alpha": 3, "rank": 5}, "v_proj": {}}}),
    "lora gpt2": ("gpt2", {"method": "lora", "bias": "all"}),
    "lora bert": ("bert", {"method": "lora", "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "lora bert bare": ("bert", {"method": "lora"}),
    "lora t5": ("t5", {"method": "lora", "targets": ["shared", "q"]}),
    "lora vit": ("vit", {"method": "lora", "modules_to_save": ["classifier"]}),
    "lora convnet": ("convnet", {"method": "lora", "targets": ["0", "3", "8"], "modules_to_save": ["4"]}),
    "lora embeddings": ("gpt2", {"method": "lora", "targets": ["wte", "c_attn"]}),
    "lora one head": ("tied", {"method": "lora", "targets": ["lm_head"]}),
    "rslora": ("llama", {"method": "rslora", "rank": 16}),
    "pissa": ("llama", {"method": "pissa", "rank": 4}),
    "pissa gpt2": ("gpt2", {"method": "pissa", "rank": 4, "alpha": 16}),
    "dora": ("bert", {"method": "dora", "modules_to_save": ["classifier"]}),
    "dora gpt2": ("gpt2", {"method": "dora", "targets": "c_attn"}),
    "dora convnet": ("convnet", {"method": "dora"}),
    "adalora": ("llama", "adalora"),
    "shira": ("llama", {"method": "shira", "rank": 2}),
    "shira same": ("llama", {"method": "shira", "rank": 2, "mask": "random", "same": True, "seed": 3, "targets": ["q_proj", "o_proj"]}),
    "adalora gpt2": ("gpt2", {"method": "adalora", "rank": 3, "alpha": 5}),
    "adalora bert": ("bert", {"method": "adalora", "modules_to_save": ["classifier"], "tinit": 3, "tfinal": 30}),
    "adalora convnet": ("convnet", {"method": "adalora", "targets": ["0", "3", "8"]}),
    "ia3": ("llama", "ia3"),
    "ia3 gpt2": ("gpt2", "ia3"),
    "ia3 bert": ("bert", {"method": "ia3", "modules_to_save": ["classifier"]}),
    "ia3 t5": ("t5", "ia3"),
    "ia3 convnet": ("convnet", {"method": "ia3", "targets": ["0", "8"]}),
    "ln": ("llama", "ln-tuning"),
    "ln bert": ("bert", {"method": "ln-tuning", "modules_to_save": ["classifier"]}),
    "ln gpt2": ("gpt2", "ln-tuning"),
    "ln t5": ("t5", "ln-tuning"),
    "prompt": ("llama", {"method": "prompt-tuning", "tokens": 3}),
    "prompt gpt2": ("gpt2", {"method": "prompt-tuning", "tokens": 3}),
    "prompt t5": ("t5", {"method": "prompt-tuning", "tokens": 3}),
    "prompt bert": ("bert", {"method": "prompt-tuning", "tokens": 3, "after": 0, "modules_to_save": ["classifier"]}),
    "prefix": ("llama", {"method": "prefix-tuning", "tokens": 3}),
    "prefix gpt2": ("gpt2", {"method": "prefix-tuning", "tokens": 3}),
    "prefix projected": ("llama", {"method": "prefix-tuning", "tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12}),
    "prompt text": ("llama", {"method": "prompt-tuning", "tokens": 3, "init": "text", "init_text": [7, 9]}),
    "p-tuning": ("llama", {"method": "p-tuning", "tokens": 3}),
    "p-tuning lstm": ("gpt2", {"method": "p-tuning", "tokens": 3, "encoder": "lstm", "encoder_hidden_size": 5}),
    "p-tuning t5": ("t5", {"method": "p-tuning", "tokens": 3, "encoder": None}),
    "p-tuning bert": ("bert", {"method": "p-tuning", "tokens": 3, "after": 0, "modules_to_save": ["classifier"]}),
    "miss": ("llama", {"method": "miss", "rank": 8, "dropout": 0.2}),
    "bone": ("llama", {"method": "bone", "rank": 7}),
    "bat": ("llama", {"method": "bat", "rank": 16}),
    "miss mini": ("llama", {"method": "miss", "rank": 8, "init_weights": "mini", "mini_r": 16}),
    "bone where every layer has 32 inputs": ("llama", {"method": "bone", "targets": ["q_proj", "up_proj"]}),
    "miss bert": ("bert", {"method": "miss", "rank": 8, "modules_to_save": ["classifier"]}),
    "vera": ("llama", {"method": "vera", "projection_prng_key": 3}),
    "vera gpt2": ("gpt2", {"method": "vera", "rank": 4}),
    "vera bert": ("bert", {"method": "vera", "rank": 4, "modules_to_save": ["classifier"]}),
    "vera one of two ends": ("ends", {"method": "vera", "rank": 4, "targets": ["^q", "^b.q"]}),
    "fourierft": ("llama", {"method": "fourierft", "modules_to_save": ["lm_head"]}),  # another α in every shape
    "fourierft t5": ("t5", {"method": "fourierft", "n_frequency": 600, "init": "zeros"}),
    "fourierft ends": ("ends", {"method": "fourierft", "scaling": 9, "targets": {"^q": {"n_frequency": 7}, "^a.q": {"n_frequency": 9}, "^b.q": {"n_frequency": 12}}}),
    "gradient": ("llama", {"method": "lora", "init": "gradient", "targets": {"q_proj": {"rank": 2}, "down_proj": {"rank": 5, "alpha": 4}, "up_proj": {}}}),
    "gradient rslora": ("gpt2", {"method": "rslora", "init": "gradient", "bias": "all"}),
    "gradient dora": ("llama", {"method": "dora", "init": "gradient", "rank": 2}),
    "olora": ("llama", {"method": "lora", "init": "olora", "rank": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_peft_reads_what_tunesmith_wrote(case, tmp_path):
    kind, method = OWN[case]
    torch.manual_seed(0)
    model = ts.adapt(BUILDERS[kind](), method, calibrate=lambda model: output(model, kind).square().mean().backward())
    stir(ts.trainable(model).values())
    ts.save(model, tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = PeftModel.from_pretrained(BUILDERS[kind](), tmp_path / "ours")
    close(logits(theirs, kind), logits(model, kind))
    close(logits(ts.load(BUILDERS[kind](), tmp_path / "ours"), kind), logits(model, kind))
    theirs.save_pretrained(tmp_path / "theirs")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert before.keys() == {k for k in after if "base_layer.weight" not in k}
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_refuses_to_write_what_peft_would_misread(tmp_path):
    model = ts.adapt(BUILDERS["ends"](), {"method": "lora", "targets": ["^q"], "modules_to_save": ["^norm"]})
    with pytest.raises(ts.TunesmithError, match="peft would take 'a.norm'"):
        ts.save(model, tmp_path / "a", format="peft")
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ts.TunesmithError, match="MultiheadAttention"):
        ts.save(ts.adapt(layer, "lora"), tmp_path / "a", format="peft")
    for method in ("series-adapter", "bitfit"):
        with pytest.raises(ts.TunesmithError, match=f"cannot hold.*{method}"):
            ts.save(ts.adapt(tiny.tiny_bert(), method), tmp_path / "a", format="peft")
    with pytest.raises(ts.TunesmithError, match="in front of the first token; train prompt-tuning with after=0"):
        ts.save(ts.adapt(tiny.tiny_bert(), "prompt-tuning"), tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())


def exists(fields, path):
    return bool(found := check_target_module_exists(LoraConfig(**fields), path)) and not isinstance(found, _ExcludedModule)


NAMES = ["q", "v", "qq", "layers", "experts", "h", "0", "1", "12"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6).map(".".join)
SUFFIXES = st.lists(st.sampled_from(["q", "v", "0.q", "layers.1.q", "h", "1", "experts.0.v", "12"]) | PATHS, min_size=1, max_size=3)
REGEXES = st.sampled_from([r".*q", r".*\.(q|v)", r"layers\.\d\..*", r"(.*\.)?h\.\d+\.q", "q", r".*experts.*"])


def tree(paths):
    """A module with a linear layer at each path that is not inside another."""
    root = nn.Module()
    for path in sorted(paths, key=len):
        parent, *_ = at = [root]
        *parents, leaf = path.split(".")
        for name in parents:
            parent = parent._modules.setdefault(name, nn.Module())
            at.append(parent)
        if not any(isinstance(m, nn.Linear) for m in at) and leaf not in parent._modules:
            parent.add_module(leaf, nn.Linear(1, 1))
    return root


@settings(max_examples=300, deadline=None)
@given(
    st.sets(PATHS, min_size=1, max_size=12),
    st.one_of(
        st.fixed_dictionaries({"target_modules": REGEXES}),
        st.fixed_dictionaries(
            {"target_modules": SUFFIXES},
            optional={
                "layers_to_transform": st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
                "layers_pattern": st.sampled_from(["layers", "h", "experts", ["h", "layers"], ["experts", "layers"], []]),
            },
        ),
    ),
    st.fixed_dictionaries(
        {}, optional={"exclude_modules": SUFFIXES | REGEXES, "modules_to_save": st.lists(st.sampled_from(["q", "experts", "layers.1", "h"]), max_size=2)}
    ),
)
def test_chooses_the_layers_that_peft_chooses(paths, targets, others):
    fields = targets | others
    if fields.get("layers_pattern") and fields.get("layers_to_transform") in (None, []):
        fields.pop("layers_pattern")  # peft refuses one without the other
    model = tree(paths)
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert target_paths(fields, model, ("linear",)) == {path for path in linear if exists(fields, path)}


@settings(max_examples=200, deadline=None)
@given(PATHS, st.dictionaries(SUFFIXES.map(lambda s: s[0]) | REGEXES | st.just("^layers.1.q"), st.integers(1, 9), max_size=3))
def test_looks_patterns_up_as_peft_does(path, patterns):
    from peft.utils.other import get_pattern_key

    assert patterned(patterns, path, 0) == patterns.get(get_pattern_key(patterns.keys(), path), 0)


def test_adapters_by_other_names_are_in_sub_folders(tmp_path):
    model = get_peft_model(tiny.tiny_llama(), lora("q_proj"), adapter_name="first")
    model.add_adapter("second", lora("v_proj"))
    stir(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path)
    with pytest.raises(ts.TunesmithError, match="first, second"):
        ts.load(tiny.tiny_llama(), tmp_path)
    ours = tiny.tiny_llama()
    for name in ("first", "second"):
        ts.load(ours, tmp_path / name, name)
        model.set_adapter(name)
        close(logits(ours, "llama"), logits(model, "llama"))
    model.base_model.set_adapter(["first", "second"])
    ts.activate(ours, ["first", "second"])
    close(logits(ours, "llama"), logits(model, "llama"))
    ts.save(ours, tmp_path / "back" / "second", name="second", format="peft")
    model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "back" / "second", adapter_name="second")
    ts.activate(ours, "second")
    close(logits(ours, "llama"), logits(model, "llama"))
