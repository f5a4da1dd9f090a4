"""S²FT's two layers, its co-permutation and its steps against the authors' code."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tunesmith as ts
from tunesmith.engine.model import Record, adapters, attach
from tunesmith.engine.sites import sites

from .cases import linear, names, read

FOLDER = "s2ft"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def attached(model, chosen, rows=()):
    """An s2ft adapter at the layers of `chosen`: path → its trained columns, or rows."""
    configs, built = {}, {}
    for site in sites(model):
        if site.path in chosen:
            config = ts.S2FT(kept=len(chosen[site.path]), rows=site.path in rows)
            config._chosen = torch.as_tensor(chosen[site.path])
            configs[site.path], built[site.path] = config, (site, config.layer(site))
    attach(model, "default", Record(next(iter(configs.values())), configs), built)
    return adapters(model, "default")


def test_every_case_is_read():
    assert names(FOLDER) == ["block_copermute", "column_block", "partial_backprop_cols", "row_block"]


@pytest.mark.parametrize("name", ["column_block", "row_block"])
def test_layer(name):
    case = read(FOLDER, name)
    model = nn.Sequential(linear(case.part("frozen")))
    block = range(case.config["start"], case.config["end"])
    (adapter,) = attached(model, {"0": block}, {"0"} if name == "column_block" else ()).values()
    with torch.no_grad():
        adapter.v.copy_(case.tensors["param.s2"])
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y * case.tensors["in.loss_coeff"]).sum() + 0.5 * (y**2).sum()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)
    torch.testing.assert_close(adapter.v.grad, case.tensors["grad.s2"], **CLOSE)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], **CLOSE)


def test_partial_backpropagation():
    """The authors' optimiser adds ε outside of the bias correction, which ours does too once ε is scaled so."""
    case = read(FOLDER, "partial_backprop_cols")
    model = nn.Sequential(linear(case.part("frozen")))
    (adapter,) = attached(model, {"0": range(3, 9)}).values()
    optimizer = torch.optim.Adam([adapter.v], lr=1e-2)
    for t, (x, target) in enumerate(zip(case.tensors["in.x"], case.tensors["in.target"], strict=True), 1):
        loss = ((model(x) - target) ** 2).mean()
        torch.testing.assert_close(loss, case.tensors["out.losses"][t - 1])
        adapter.v.grad = None
        loss.backward()
        torch.testing.assert_close(adapter.v.grad, case.tensors["out.block_grad"][t - 1])
        optimizer.param_groups[0]["eps"] = 1e-6 / (1 - 0.999**t) ** 0.5
        optimizer.step()
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.weight_final"], atol=1e-7, rtol=1e-5)


class Block(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": 4, "hidden_size": 16})()
        made = {key: nn.Linear(*reversed(W.shape), bias=False) for key, W in weights.items()}
        for key, layer in made.items():
            layer.weight.data.copy_(weights[key])
        self.self_attn = nn.Module()
        self.mlp = nn.Module()
        for key, layer in OrderedDict(made).items():
            getattr(self, key.split(".")[0]).add_module(key.split(".")[1], layer)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        a, m = self.self_attn, self.mlp
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return a.o_proj(mixed), m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))


def test_co_permutation():
    """Their blocks, put where they belong in the weights as they are, compute the same; moved, every weight is theirs, bit for bit."""
    case = read(FOLDER, "block_copermute")
    c = case.config
    model = Block({key.removesuffix(".weight"): W for key, W in case.part("frozen").items()})
    x = case.tensors["in.x"]
    torch.testing.assert_close(model(x)[0], case.tensors["out.attn_before"], **CLOSE)
    torch.testing.assert_close(model(x)[1], case.tensors["out.mlp_before"], **CLOSE)

    def order(first, second, heads):  # heads come ascending inside each group, channels as given
        groups = [[u for u in first if u not in second], [u for u in first if u in second], [u for u in second if u not in first]]
        return [u for group in groups for u in (sorted(group) if heads else group)]

    units = {
        "self_attn": (order(c["selected_heads_v"], c["selected_heads_o"], True), 4), "mlp": (order(c["selected_channels_up"], c["selected_channels_down"], False), 1),
    }  # fmt: skip
    chosen = {}
    for path, (a, e) in c["start_end"].items():
        places, size = units[path.split(".")[0]]
        chosen[path] = torch.tensor([u * size + i for u in places for i in range(size)])[a:e]
    own = attached(model, chosen, {"self_attn.v_proj", "mlp.up_proj"})
    with torch.no_grad():
        for path, adapter in own.items():
            adapter.v.copy_(case.tensors[f"param.{path}.s2"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def agrees():
        attn, mlp = model(x)
        loss = (attn**2).sum() + (mlp**2).sum()
        model.zero_grad()
        loss.backward()
        torch.testing.assert_close(attn, case.tensors["out.attn"], **CLOSE)
        torch.testing.assert_close(mlp, case.tensors["out.mlp"], **CLOSE)
        torch.testing.assert_close(loss, case.tensors["out.loss"], **CLOSE)
        for path, adapter in own.items():
            torch.testing.assert_close(adapter.v.grad, case.tensors[f"grad.{path}.s2"], **CLOSE)

    agrees()
    with ts.co_permuted(model):
        assert {path: adapter.index.tolist() for path, adapter in own.items()} == {path: list(range(a, e)) for path, (a, e) in c["start_end"].items()}
        for key, W in case.part("out.permuted").items():
            assert torch.equal(model.get_parameter(key), W), key
        agrees()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
