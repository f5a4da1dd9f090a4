"""SPT's sparse linear layer, its adapters behind layers, and its selection against the authors' code."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.sites import sites
from tunesmith.methods.spt import SPTLayer

from .cases import linear, names, read

FOLDER = "spt"
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def test_every_case_is_read():
    assert names(FOLDER) == ["mlp_seq_adapter", "select_lora", "sparse_linear"]


def attached(model, path, config, chosen=None):
    """The layer of a config as `allot` leaves it, in the model."""
    from tunesmith.engine.model import Record, attach

    (site,) = (s for s in sites(model) if s.path == path)
    config._chosen = chosen or {}
    layer = config.layer(site)
    if not hasattr(site.holder, "tunesmith"):
        name = f"at{len(path)}{path[-1]}"
        attach(model, name, Record(config, {path: config}), {path: (site, layer)})
    return layer


def test_sparse_linear():
    case = read(FOLDER, "sparse_linear")
    rows, columns = case.tensors["frozen.weight_indexes"]
    config = ts.SPTLoRA(entries=17, vectors={"bias": 6})
    model = nn.Sequential(linear(case.part("frozen")))
    layer = attached(model, "0", config, {"weight": rows * 24 + columns, "bias": case.tensors["frozen.bias_indexes"][0]})
    with torch.no_grad():
        layer.v.copy_(case.tensors["param.sparse_weight"])
        layer.vectors["bias"].copy_(case.tensors["param.sparse_bias"])
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    (y * case.tensors["in.c"]).sum().backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)
    torch.testing.assert_close(layer.v.grad, case.tensors["grad.sparse_weight"], **CLOSE)
    torch.testing.assert_close(layer.vectors["bias"].grad, case.tensors["grad.sparse_bias"], **CLOSE)
    torch.testing.assert_close(ts.merge(model)(x), y)


def test_adapters_behind_layers():
    case = read(FOLDER, "mlp_seq_adapter")
    model = nn.Sequential(linear(case.part("frozen.fc1")), nn.GELU(), linear(case.part("frozen.fc2")))
    layers = [attached(model, path, ts.SPTAdapter(structured=True, rank=case.config["r"])) for path in ("0", "2")]
    ts.activate(model, list(model.__dict__["_tunesmith"].records))
    trained = {}
    for i, layer in enumerate(layers, 1):
        assert isinstance(layer, SPTLayer) and not layer.mergeable
        trained |= {f"structured_fc{i}.learnable.{key}": p for key, p in {"0.weight": layer.D, "0.bias": layer.d, "2.weight": layer.U, "2.bias": layer.u}.items()}
    with torch.no_grad():
        for key, p in trained.items():
            p.copy_(case.tensors[f"param.{key}"])
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    (y * case.tensors["in.c"]).sum().backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)
    for key, p in trained.items():
        torch.testing.assert_close(p.grad, case.tensors[f"grad.{key}"], **CLOSE)


MATRICES = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


def vit(d, depth):
    def block():
        return nn.ModuleDict({
            "norm1": nn.LayerNorm(d), "attn": nn.ModuleDict({name: nn.Linear(d, d) for name in ("q", "k", "v", "proj")}),
            "norm2": nn.LayerNorm(d), "mlp": nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)}),
        })  # fmt: skip

    return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(depth)), "norm": nn.LayerNorm(d)})


@pytest.mark.parametrize("budget", ["1.0", "0.4", "0.1"])
def test_selection(budget):
    case = read(FOLDER, "select_lora")
    c = case.config
    by_path = {s.path: s for s in sites(vit(c["dim"], c["depth"]))}
    places = [(by_path[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in c["names"]]
    scores = [case.tensors[f"in.sens.{name}"].flatten() for name in c["names"]]
    config = ts.SPTLoRA(rank=c["r"], ease=c["alpha"], vector_ease=c["beta"])
    taus = [-int(-0.02 * k * c["scale"] // 1) for k in range(1, 80)]
    total, hits, plans = config.choose(places, scores, taus, int(c["budget_targets"][budget]) - c["dim"])
    found = case.part(f"out.b{budget}")
    assert total + c["dim"] == pytest.approx(found["params"].item() * (1 if found["params"] > 10 else 1e6), abs=1)
    matrices = [[plans[c["names"].index(f"blocks.{i}.{m}.weight")] == "module" for m in MATRICES] for i in range(c["depth"])]
    assert torch.equal(torch.tensor(matrices).long(), found["tuned_matrices"])
    assert [plan == "whole" for plan in plans] == found["tuned_vectors"].bool().tolist()
    order = torch.cat(scores).sort(descending=True, stable=True).indices[: sum(hits)]
    sensitive = torch.zeros(sum(len(s) for s in scores), dtype=torch.bool).index_fill_(0, order, True).split([len(s) for s in scores])
    for name, plan, mask in zip(c["names"], plans, sensitive, strict=True):
        assert (f"mask.{name}" in found) == (isinstance(plan, int) and plan > 0), name
        if f"mask.{name}" in found:
            assert torch.equal(found[f"mask.{name}"].flatten().bool(), mask)
