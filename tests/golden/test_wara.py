"""WaRA against its formulas over PyWavelets, and WaveFT against peft's layer."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import check, linear, names, read

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
    model = ts.adapt(nn.Sequential(linear(case.part("frozen"))), ts.WaRA(**fields_of(case)), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    assert {n: p.shape for n, p in adapter.named_parameters()} == {n: p.shape for n, p in case.part("param").items()}
    with torch.no_grad():
        for key, value in case.part("param").items():
            getattr(adapter, key).copy_(value)
    check(case, model, dict(adapter.named_parameters()))
    if "delta" in case.part("out"):
        change = ts.merge(model)[0].weight.detach() - case.tensors["frozen.weight"]
        torch.testing.assert_close(change, case.tensors["out.delta"], atol=case.tolerance, rtol=case.tolerance)
    else:
        with pytest.raises(ts.TunesmithError, match="mixes the tokens of a grid"):
            ts.merge(model)
