"""Number formats, QLoRA and LoftQ against bitsandbytes and peft; PEQA against its formulas; SketchTune and LeanQuant against the authors' code."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.methods import LoftQ
from tunesmith.quantize import Format, PackedWeight, feedback
from tunesmith.quantize.formats import dynamic_map, normal_levels, unnested

from .cases import check, linear, names, read

BASELINES = {name: read("quant-baselines", name) for name in names("quant-baselines")}
SKETCHES = {name: read("sketchtune", name) for name in names("sketchtune")}


def having(cases, key):
    return [name for name, case in cases.items() if key in case.tensors]


def format_of(config):
    return Format(format="nf4", group_size=config["blocksize"], double_quant=config["double_quant"])


def test_every_case_is_read():
    assert set(having(BASELINES, "out.nf4") + having(BASELINES, "out.packed") + having(BASELINES, "param.lora_A") + having(BASELINES, "out.low_rank")) == set(BASELINES)
    assert set(having(SKETCHES, "param.quant_grid") + having(SKETCHES, "out.hessian")) == set(SKETCHES)


@pytest.mark.parametrize("name", having(BASELINES, "out.nf4"))
def test_code_books(name):
    found = BASELINES[name].part("out")
    assert torch.equal(torch.tensor(normal_levels(4)), found["nf4"])
    assert torch.equal(torch.tensor(dynamic_map()), found["dynamic_map_8bit"])


@pytest.mark.parametrize("name", having(BASELINES, "out.packed"))
def test_nf4(name):
    case = BASELINES[name]
    format, W, out = format_of(case.config), case.tensors["frozen.weight"], case.part("out")
    parts = format.encode(W)
    assert torch.equal(parts["codes"], out["packed"])
    assert torch.equal(format.unpack(parts["codes"], W.shape).flatten()[: W.numel()], out["codes"].flatten())
    if case.config["double_quant"]:
        torch.testing.assert_close(parts["outer"], out["absmax_scale"])
        torch.testing.assert_close(parts["offset"], out["absmax_offset"])
        apart = parts["scale"].int() - out["absmax_code"].int()
        assert (apart != 0).float().mean() < 0.01 and apart.abs().max() <= 1  # bitsandbytes takes the farther of two neighbours at some midpoints
        parts["scale"] = out["absmax_code"]
        torch.testing.assert_close(unnested(parts), out["absmax_dequant"])
    else:
        assert torch.equal(parts["scale"], out["absmax"])
    torch.testing.assert_close(format.decode(parts, W.shape).to(W.dtype), out["dequant"], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", having(BASELINES, "param.lora_A"))
def test_lora_on_nf4(name):
    case = BASELINES[name]
    config, frozen = case.config, case.part("frozen")
    model = nn.Sequential(linear({"weight": frozen["weight"], **{k: v for k, v in frozen.items() if k == "bias"}}))
    ts.quantize(model, format_of(config), targets="0")
    torch.testing.assert_close(model[0].weight.dequantize(), frozen["weight_dequant"])
    ts.adapt(model, {"method": "lora", "rank": config["r"], "alpha": config["lora_alpha"]}, targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    with torch.no_grad():
        adapter.A.copy_(case.tensors["param.lora_A"])
        adapter.B.copy_(case.tensors["param.lora_B"])
    check(case, model, {"lora_A": adapter.A, "lora_B": adapter.B})


@pytest.mark.parametrize("name", having(BASELINES, "out.low_rank"))
def test_loftq(name):
    case = BASELINES[name]
    config, out, W = case.config, case.part("out"), case.tensors["frozen.weight"]
    method = LoftQ(rank=config["r"], iterations=config["num_iter"], alpha=2 * config["r"])
    model = ts.quantize(nn.Sequential(linear({"weight": W})), format_of(config), targets="0", keep=True, rounding=method.rounding)
    torch.testing.assert_close(model[0].weight.dequantize(), out["weight_dequant"])
    adapter = ts.adapt(model, method, targets=["0"])[0].tunesmith.adapters["default"]
    change = 2 * adapter.B @ adapter.A
    torch.testing.assert_close(change.detach(), out["low_rank"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((W - out["weight_dequant"] - change).norm().detach(), out["residual_norm"])


@pytest.mark.parametrize("name", names("peqa"))
def test_peqa(name):
    case = read("peqa", name)
    config, frozen, out = case.config, case.part("frozen"), case.part("out")
    format = Format(format=f"int{config['bits']}", group_size=config["group_size"])
    model = nn.Sequential(linear({key: frozen[key] for key in ("weight", "bias") if key in frozen}))
    ts.adapt(model, ts.PEQA(bits=config["bits"], group_size=config["group_size"]), targets=["0"])
    adapter, shape = model[0].tunesmith.adapters["default"], frozen["weight"].shape
    start = format.stats(adapter.own.parts)
    assert torch.equal(format.unpack(adapter.own.parts["codes"], shape).view(shape).double(), frozen["codes"])
    assert torch.equal(start["zero"].view_as(frozen["zero"]).double(), frozen["zero"])
    torch.testing.assert_close(start["scale"].view_as(out["scale_init"]), out["scale_init"])
    torch.testing.assert_close(model(case.tensors["in.x"]), out["y_init"])
    scale = case.tensors["param.scale"].flatten()
    with torch.no_grad():
        adapter.values.copy_((scale / start["scale"]).log())
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = (y - case.tensors["in.target"]).square().mean()
    loss.backward()
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    torch.testing.assert_close(y, out["y"], **close)
    torch.testing.assert_close(loss.detach(), out["loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    torch.testing.assert_close((adapter.values.grad / scale).view_as(case.tensors["grad.scale"]), case.tensors["grad.scale"], **close)
    merged = ts.merge(model)[0].weight
    assert isinstance(merged, PackedWeight) and torch.equal(merged.parts["codes"], adapter.own.parts["codes"])
    torch.testing.assert_close(merged.dequantize(), out["weight"], **close)


@pytest.mark.parametrize("name", having(SKETCHES, "param.quant_grid"))
def test_sketchtune(name):
    case = SKETCHES[name]
    config, frozen = case.config, case.part("frozen")
    format = Format(format=f"sketch{config['bits']}", group_size=config["in"] // config["gpr"])
    codes, grid = frozen["codes"], case.tensors["param.quant_grid"]
    shape, double = (config["out"], config["in"]), grid.double()  # float64 tables are not rounded to float16
    packed = format.pack(codes, codes.numel())
    if "codes_packed" in frozen:
        assert torch.equal(packed, frozen["codes_packed"].flatten())
    layer = nn.Linear(shape[1], shape[0], bias="bias" in frozen, dtype=torch.float64)
    layer.weight = nn.Parameter(PackedWeight(format, {"codes": packed, "table": frozen["grid_before"].double().flatten(0, 1)}, shape, torch.float64), requires_grad=False)
    model = ts.adapt(nn.Sequential(layer), "sketchtune", targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    with torch.no_grad():
        adapter.values.copy_(double.flatten(0, 1))
    x = case.tensors["in.x"].double().requires_grad_()
    y = model(x)
    loss = (y - case.tensors["in.target"].double()).square().mean()
    loss.backward()
    for found, wanted in ((y, "out.y"), (loss, "out.loss"), (x.grad, "grad.x"), (adapter.values.grad.view_as(grid), "grad.quant_grid")):
        torch.testing.assert_close(found.detach().float(), case.tensors[wanted], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ts.merge(model)[0].weight.dequantize().float(), case.tensors["out.weight"])


@pytest.mark.parametrize("name", having(SKETCHES, "out.hessian"))
def test_leanquant(name):
    case = SKETCHES[name]
    config, W, H = case.config, case.tensors["frozen.weight"], case.tensors["out.hessian"]
    format = Format(format=f"sketch{config['bits']}")
    torch.testing.assert_close(2 * case.tensors["in.X"].T @ case.tensors["in.X"], H, atol=1e-3, rtol=1e-4)
    permutation, U = feedback.factor(H, config["actorder"], config["percdamp"])
    weights = U.diag().pow(-config["exponent"])[permutation.argsort()]
    torch.testing.assert_close(weights.float(), case.tensors["out.sample_weight"], atol=0, rtol=1e-3)
    parts = feedback.encode(W, H, format, config["actorder"], {"table": case.tensors["out.grid"].double()}, config["percdamp"])
    assert torch.equal(format.unpack(parts["codes"], W.shape).view(W.shape), case.tensors["out.codes"])
    torch.testing.assert_close(format.decode(parts, W.shape).float(), case.tensors["out.weight_sketched"])
