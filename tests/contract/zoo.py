"""The models the contract runs over, and what each method cannot do on them."""

import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith import optim
from tunesmith.methods import parse, registry


def attention_net(hidden=16):
    """torch's own encoder: fused in-projections, and an evaluation path that reads weights past every forward."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(30, hidden), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(hidden, 5)).eval()


MODELS = {**tiny.BUILDERS, "attention": attention_net}

# Methods for image models alone, and where methods are tried that a language model has no place for.
IMAGES = {"convpass", "vpt"}
HOME = {"bitfit": "gpt2", **dict.fromkeys(IMAGES, "vit")}

# Virtual tokens in front of the input embeddings.
PROMPTS = {"dept", "p-tuning", "prompt-tuning"}

# Pairs that end in one clear sentence instead of an adapter.
CANNOT = {
    "bitfit": {"llama", "t5"},
    "fact-tk": {"convnet"},
    "fact-tt": {"convnet"},
    "l4q": {"convnet"},
    "mask-tuning": {"convnet"},
    "mhr": {"convnet"},
    "mola": {"convnet"},
    "parallel-adapter": {"convnet"},
    "peqa": {"convnet"},
    "sketchtune": {"convnet"},
    **dict.fromkeys(sorted(PROMPTS), {"vit", "convnet", "attention"}),
    "prefix-tuning": {"vit", "convnet", "attention", "t5"},
    "repadapter": {"convnet"},
    "series-adapter": {"convnet"},
    "spt-adapter": {"convnet"},
    "wara": {"convnet"},
    **dict.fromkeys(sorted(IMAGES), MODELS.keys() - {"vit"}),
}

# Sizes that a method otherwise reads off the weights.
GIVEN = {"soka": {"method": "soka", "rank": 4}}

# Methods that choose what trains by the weights' values or gradients, which are not there on the meta device.
CHOOSY = {"id3", "spt-lora", "spt-adapter"}

# Forms that have everything a method may have, and have it from the first step on.
FORMS = {
    "id3": {"method": "id3", "mask": "magnitude", "budget": 60},
    "spt-lora": {"method": "spt-lora", "rank": 2, "ease": 20, "budget": 600},
    "spt-adapter": {"method": "spt-adapter", "rank": 2, "ease": 20, "budget": 600},
}

PAIRS = [(method, kind) for method in registry for kind in MODELS if kind not in CANNOT.get(method, ())]


def build(kind, dtype=torch.float32):
    return MODELS[kind]().to(dtype)


def adapt(model, method, *args, **kwargs):
    """`ts.adapt` with a calibration for the methods that need one."""
    config = parse(FORMS.get(method, method) if isinstance(method, str) else method)
    if config.calibrated and not config.calibration_optional:
        kwargs["calibrate"] = lambda model: loss(model, inputs(kind_of(model), dtype=next(model.parameters()).dtype)).backward()
    return ts.adapt(model, config, *args, **kwargs)


def kind_of(model):
    name, first = next(iter(model.named_parameters()))
    return next(kind for kind, make in MODELS.items() if (found := next(iter(make().named_parameters())))[0] == name and found[1].dim() == first.dim())


def inputs(kind, rows=3, dtype=torch.float32):
    if kind == "attention":
        return {"x": torch.randint(0, 30, (rows, 6), generator=torch.Generator().manual_seed(0))}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.batch(kind, rows).items()}


def logits(model, batch):
    if len(batch) == 1 and "input_ids" not in batch and not hasattr(model, "config"):
        return model(*batch.values())
    return model(**batch).logits


def loss(model, batch):
    out = logits(model, batch)
    out = out.flatten(0, -2)
    labels = torch.arange(len(out), device=out.device) * 7 % min(out.shape[-1], 11)
    return nn.functional.cross_entropy(out.float(), labels)


def stir(model, seed=1, size=0.1):
    """Move every trained value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ts.trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


def train(model, batch, steps=1, lr=None):
    optimizer = optim.build(model, lr=lr or 1e-2)
    losses = []
    for _ in range(steps):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
