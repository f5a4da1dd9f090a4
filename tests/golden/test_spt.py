"""SPT's sparse linear layer, its adapters behind layers, and its selection against the authors' code."""

from math import ceil

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.engine.model import Record, attach
from tunesmith.engine.sites import sites
from tunesmith.methods.entries import top
from tunesmith.methods.spt import Candidate, choose

from .cases import linear, names, read

FOLDER = "spt"
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def test_every_case_is_read():
    assert names(FOLDER) == ["mlp_seq_adapter", "select_lora", "sparse_linear"]


def attached(model, configs):
    """The layers of configs as `allot` leaves them, in the model."""
    by_path = {s.path: s for s in sites(model)}
    built = {path: (by_path[path], config.layer(by_path[path])) for path, config in configs.items()}
    attach(model, "default", Record(next(iter(configs.values())), configs), built)
    return [layer for _, layer in built.values()]


def run(case, model):
    """The loss's gradients, with output and input's gradient compared."""
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    (y * case.tensors["in.c"]).sum().backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **CLOSE)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **CLOSE)


def test_sparse_linear():
    case = read(FOLDER, "sparse_linear")
    rows, columns = case.tensors["frozen.weight_indexes"]
    config = ts.SPTLoRA(entries=len(rows), vectors={"bias": case.config["n_bias"]})
    config._chosen = {"weight": rows * case.config["in"] + columns, "bias": case.tensors["frozen.bias_indexes"][0]}
    model = nn.Sequential(linear(case.part("frozen")))
    (layer,) = attached(model, {"0": config})
    with torch.no_grad():
        layer.v.copy_(case.tensors["param.sparse_weight"])
        layer.vectors["bias"].copy_(case.tensors["param.sparse_bias"])
    run(case, model)
    torch.testing.assert_close(layer.v.grad, case.tensors["grad.sparse_weight"], **CLOSE)
    torch.testing.assert_close(layer.vectors["bias"].grad, case.tensors["grad.sparse_bias"], **CLOSE)
    torch.testing.assert_close(ts.merge(model)(case.tensors["in.x"]), case.tensors["out.y"], **CLOSE)


def test_adapters_behind_layers():
    case = read(FOLDER, "mlp_seq_adapter")
    model = nn.Sequential(linear(case.part("frozen.fc1")), nn.GELU(), linear(case.part("frozen.fc2")))
    layers = attached(model, {path: ts.SPTAdapter(structured=True, rank=case.config["r"]) for path in ("0", "2")})
    trained = {}
    for i, layer in enumerate(layers, 1):
        trained |= {f"structured_fc{i}.learnable.{key}": p for key, p in {"0.weight": layer.D, "0.bias": layer.d, "2.weight": layer.U, "2.bias": layer.u}.items()}
    with torch.no_grad():
        for key, p in trained.items():
            p.copy_(case.tensors[f"param.{key}"])
    run(case, model)
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
    c, found = case.config, case.part(f"out.b{budget}")
    by_path = {s.path: s for s in sites(vit(c["dim"], c["depth"]))}
    config = ts.SPTLoRA(rank=c["r"], ease=c["alpha"], vector_ease=c["beta"])
    candidates = [Candidate(config, by_path[name.rpartition(".")[0]], name.rpartition(".")[2], case.tensors[f"in.sens.{name}"].flatten()) for name in c["names"]]
    class_token = c["dim"]
    total, plans = choose(candidates, [ceil(0.02 * k * c["scale"]) for k in range(1, 80)], int(c["budget_targets"][budget]) - class_token)
    assert round(found["params"].item()) == total + class_token
    assert round(found["structured"].item()) == sum(count for count, structured in plans if structured)
    assert round(found["unstructured"].item()) == sum(count for count, structured in plans if not structured)
    by_name = dict(zip(c["names"], zip(candidates, plans, strict=True), strict=True))
    matrices = [[by_name[f"blocks.{i}.{m}.weight"][1][1] for m in MATRICES] for i in range(c["depth"])]
    assert torch.equal(torch.tensor(matrices).long(), found["tuned_matrices"])
    assert [structured and not candidate.matrix for candidate, (_, structured) in by_name.values()] == found["tuned_vectors"].bool().tolist()
    for name, (candidate, (count, structured)) in by_name.items():
        assert (f"mask.{name}" in found) == (count > 0 and not structured), name
        if f"mask.{name}" in found:
            assert torch.equal(found[f"mask.{name}"].flatten().nonzero()[:, 0], top(candidate.scores, count))
