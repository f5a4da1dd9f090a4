"""WaRA against its formulas over PyWavelets, and WaveFT against peft's layer."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import names, read

FOLDER = "wara"


def fields_of(case) -> dict:
    c = case.config
    if "n_frequency" in c:
        return {"version": "waveft", "n_frequency": c["n_frequency"], "wavelet": c["wavelet_family"], "scale": c["scaling"], "seed": c["random_loc_seed"]}
    common = {"rank": c["r"], "wavelet": c["wavelet"], "levels": c.get("levels", 1)}
    return common | ({"version": "v2", "grid": (c["H"], c["W"]), "gains": "gain" in case.part("param")} if "H" in c else {"version": "v1"})


@pytest.mark.parametrize("name", names(FOLDER))
def test_case(name):
    case = read(FOLDER, name)
    close = {"atol": case.tolerance, "rtol": case.tolerance}
    frozen = {k: t for k, t in case.part("frozen").items() if k in ("weight", "bias")}
    W = frozen["weight"]
    layer = nn.Linear(W.shape[1], W.shape[0], bias="bias" in frozen, dtype=W.dtype)
    layer.load_state_dict(frozen)
    model = ts.adapt(nn.Sequential(layer), ts.WaRA(**fields_of(case)), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    assert {n: p.shape for n, p in adapter.named_parameters()} == {n: p.shape for n, p in case.part("param").items()}
    with torch.no_grad():
        for key, value in case.part("param").items():
            getattr(adapter, key).copy_(value)
    x = case.tensors["in.x"].clone().requires_grad_()
    y = model(x)
    loss = ((y - case.tensors["in.target"]) ** 2).mean()
    loss.backward()
    torch.testing.assert_close(y, case.tensors["out.y"], **close)
    torch.testing.assert_close(loss, case.tensors["out.loss"], **close)
    torch.testing.assert_close(x.grad, case.tensors["grad.x"], **close)
    for key in case.part("param"):
        torch.testing.assert_close(getattr(adapter, key).grad, case.tensors[f"grad.{key}"], **close)
    if "delta" in case.part("out"):
        torch.testing.assert_close(ts.merge(model)[0].weight.detach() - W, case.tensors["out.delta"], **close)
    else:
        with pytest.raises(ts.TunesmithError, match="mixes the tokens of a grid"):
            ts.merge(model)
