"""AdaptFormer, SSF, Convpass, deep visual prompts, FacT and RepAdapter against the authors' code."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tunesmith.engine.model import adapters

from .cases import linear, names, read

FOLDER = "vision-baselines"


def test_every_case_is_read():
    assert names(FOLDER) == ["adaptformer", "convpass", "fact_tk", "fact_tt", "repadapter", "ssf_block", "vpt_deep"]


def close(found, expected):
    """To float32 rounding of sums as large as the largest entry."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * max(1.0, expected.abs().max().item()))


def fill(own, case):
    """The case's values into parameters under its names for them."""
    assert own.keys() == case.part("param").keys()
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(case.tensors[f"param.{name}"].view_as(p))


def run(case, model, own, output=lambda y: y):
    """Output, loss and gradients of the case."""
    x = case.tensors["in.x"].clone().requires_grad_()
    y = output(model(x))
    loss = (y * case.tensors["in.c"]).sum()
    loss.backward()
    close(y, case.tensors["out.y"])
    close(loss, case.tensors["out.loss"])
    close(x.grad, case.tensors["grad.x"])
    for name, p in own.items():
        close(p.grad.view_as(case.tensors[f"grad.{name}"]), case.tensors[f"grad.{name}"])


class MLP(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Half(nn.Module):
    """The feed-forward half of a pre-norm block, without its residual, whose layers give zero: what is left is an adapter beside it."""

    def __init__(self, d):
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(d), MLP(d, 2 * d)
        self.cls_token, self.patch, self.head = nn.Parameter(torch.zeros(d)), nn.Conv2d(3, d, 2, 2), nn.Linear(d, 1)  # as a whole model has them
        nn.init.zeros_(self.mlp.fc2.weight), nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, x):
        return self.mlp(self.norm2(x))


def test_adaptformer():
    case = read(FOLDER, "adaptformer")
    model = ts.adapt(Half(case.config["dim"]), ts.ParallelAdapter(bottleneck=case.config["bottleneck"], scale=case.config["scale"]))
    branch = adapters(model, "default")["mlp.fc2"]
    own = {"down_proj.weight": branch.down, "down_proj.bias": branch.down_bias, "up_proj.weight": branch.up, "up_proj.bias": branch.up_bias}
    fill(own, case)
    run(case, model, own)


def test_convpass():
    case = read(FOLDER, "convpass")
    model = Half(case.config["dim"])
    model.norm2 = nn.Identity()  # which the case's input has passed already
    ts.adapt(model, ts.Convpass(bottleneck=case.config["hidden"]))
    layer = adapters(model, "default")["mlp.fc2"]
    layer.given.grid = (case.config["grid"],) * 2  # no image runs through
    own = {f"adapter_{name}.{kind}": getattr(layer, name + suffix) for name in ("down", "conv", "up") for kind, suffix in (("weight", ""), ("bias", "_bias"))}
    fill(own, case)
    run(case, model, own)


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d, heads, hidden, eps=None):
        super().__init__()
        self.attn, self.mlp = Attention(d, heads), MLP(d, hidden)
        self.norm1, self.norm2 = (nn.Identity(), nn.Identity()) if eps is None else (nn.LayerNorm(d, eps), nn.LayerNorm(d, eps))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


SSF = {"norm1": "1", "attn.qkv": "attn 1", "attn.proj": "attn 2", "norm2": "2", "mlp.fc1": "mlp 1", "mlp.fc2": "mlp 2"}


def test_ssf():
    case, c = read(FOLDER, "ssf_block"), read(FOLDER, "ssf_block").config
    model = Block(c["dim"], c["heads"], c["mlp_ratio"] * c["dim"], c["ln_eps"])
    model.load_state_dict(case.part("frozen"))
    ts.adapt(model, "ssf", targets=list(SSF))
    own = {}
    for path, layer in adapters(model, "default").items():
        *place, number = SSF[path].split()
        own |= {".".join([*place, f"ssf_{name}_{number}"]): getattr(layer, name) for name in ("scale", "shift")}
    fill(own, case)
    run(case, model, own)
    merged = ts.merge(model, unload=True).state_dict()
    for name, value in case.part("out.merged").items():
        close(merged[name], value)
    close(model(case.tensors["in.x"]), case.tensors["out.y"])


class Toy(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, h):
        self.given = h
        self.made = h + ((h @ self.W @ h.transpose(1, 2)) / h.shape[-1] ** 0.5).softmax(-1) @ h
        return self.made


class ToyViT(nn.Module):
    def __init__(self, *matrices):
        super().__init__()
        self.cls_token, self.patch = nn.Parameter(torch.zeros(len(matrices[0]))), nn.Conv2d(3, len(matrices[0]), 4, 4)
        self.layers = nn.ModuleList([Toy(W) for W in matrices])

    def forward(self, h):
        for layer in self.layers:
            h = layer(h)
        return h


def test_vpt_deep():
    case, c = read(FOLDER, "vpt_deep"), read(FOLDER, "vpt_deep").config
    model = ts.adapt(ToyViT(*(case.tensors[f"frozen.layer{i}"] for i in range(c["layers"]))), ts.VPT(tokens=c["prompts"]))
    prompt = adapters(model, "default")[""].prompt
    with torch.no_grad():
        prompt.copy_(torch.cat([case.tensors["param.prompt_embeddings"], case.tensors["param.deep_prompt_embeddings"]]))
    run(case, model, {}, lambda y: model.layers[-1].made)
    close(model.layers[0].given, case.tensors["out.h0"])
    close(prompt.grad[:1], case.tensors["grad.prompt_embeddings"])
    close(prompt.grad[1:], case.tensors["grad.deep_prompt_embeddings"])
    y = model(case.tensors["in.x"])
    close(y, torch.cat([case.tensors["out.y"][:, :1], case.tensors["out.y"][:, 1 + c["prompts"] :]], 1))


FACT = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact(form):
    case = read(FOLDER, f"fact_{form}")
    c, d = case.config, case.config["dim"]
    model = nn.Sequential()
    model.blocks = nn.Sequential(*(Block(d, c["heads"], 4 * d) for _ in range(c["blocks"])))
    model.load_state_dict(case.part("frozen"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ts.adapt(model, {"method": f"fact-{form}", "rank": c["r"], "scale": c["scale"]}, targets=[".*(qkv|proj|fc1|fc2)"])
    layers = adapters(model, "default")
    f = layers["blocks.0.attn.qkv"].shared
    own = {"FacTu.weight": f.U, "FacTv.weight": f.V} | ({"FacTc": f.C, "FacTp": f.P} if form == "tk" else {})
    for i in range(c["blocks"] if form == "tt" else 0):
        place = f"blocks.{i}."
        own |= {f"{place}{FACT[name].split('.')[0]}.{name}_FacTs.weight": layers[place + FACT[name]].sigma for name in ("proj", "fc1", "fc2")}
        qkv = layers[place + "attn.qkv"].sigma
        qkv.data = torch.cat([case.tensors[f"param.{place}attn.{name}_FacTs.weight"] for name in "qkv"])
        own |= {f"{place}attn.{name}_FacTs.weight": None for name in "qkv"}
    fused = {name for name, p in own.items() if p is None}
    assert own.keys() == case.part("param").keys()
    with torch.no_grad():
        for name in own.keys() - fused:
            own[name].copy_(case.tensors[f"param.{name}"])
    run(case, model, {name: p for name, p in own.items() if name not in fused})
    for i in range(c["blocks"] if form == "tt" else 0):
        grad = torch.cat([case.tensors[f"grad.blocks.{i}.attn.{name}_FacTs.weight"] for name in "qkv"])
        close(layers[f"blocks.{i}.attn.qkv"].sigma.grad, grad)
    after = ts.merge(model, unload=True).state_dict()
    for i in range(c["blocks"]):
        for name, path in FACT.items():
            change = after[f"blocks.{i}.{path}.weight"] - before[f"blocks.{i}.{path}.weight"]
            own = change.chunk(3)["qkv".index(name)] if name in "qkv" else change
            close(own, case.tensors[f"out.delta.{i}.{name}"])
    close(model(case.tensors["in.x"]), case.tensors["out.y"])


def test_repadapter():
    case, c = read(FOLDER, "repadapter"), read(FOLDER, "repadapter").config
    model = nn.Sequential(linear({"weight": case.tensors["frozen.next_weight"], "bias": case.tensors["frozen.next_bias"]}))
    ts.adapt(model, ts.RepAdapter(bottleneck=c["r"], groups=c["groups"], scale=c["scale"]), targets=["0"])
    f = adapters(model, "default")["0"].inner
    own = {"conv_A.weight": f.A, "conv_A.bias": f.a, "conv_B.weight": f.B, "conv_B.bias": f.b}
    fill(own, case)
    run(case, model, own)
    merged = ts.merge(model)[0]
    close(merged.weight.detach(), case.tensors["out.merged_weight"])
    close(merged.bias.detach(), case.tensors["out.merged_bias"])
