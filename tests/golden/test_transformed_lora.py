"""Transformed LoRA against the formulas of the paper."""

import pytest
import torch
from torch import nn

import tunesmith as ts

from .cases import check, linear, names, read

FOLDER = "transformed-lora"


def method_of(config: dict) -> ts.TransformedLoRA:
    rank, lora = config.get("R_tr"), config.get("lora_rank")
    return ts.TransformedLoRA(
        transform="ring" if config.get("R_trm") else "none", transform_rank=config.get("R_trm") or 1,
        residual="ring" if rank else "lora" if lora else "none", rank=rank or lora or 1,
        in_factors={torch.Size(config["in_factors"]).numel(): config["in_factors"]},
        out_factors={torch.Size(config["out_factors"]).numel(): config["out_factors"]}, regularization=1.0 if config.get("R_trm") else 0.0,
    )  # fmt: skip


def given(adapter) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names in the files: A1… the cores of T, B1… and C1… of the ring, lora_A and lora_B."""
    own = {f"A{d}": p for d, p in enumerate(adapter.E, 1)}
    if adapter.residual == "lora":
        return own | {"lora_A": adapter.A[0], "lora_B": adapter.B[0]}
    return own | {f"C{d}": p for d, p in enumerate(adapter.A, 1)} | {f"B{d}": p for d, p in enumerate(adapter.B, 1)}


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", names(FOLDER))
def test_layer(name, tokens, monkeypatch):
    case = read(FOLDER, name)
    layer = linear(case.part("frozen"))
    model = ts.adapt(nn.Sequential(layer), method_of(case.config), targets=["0"])
    adapter = model[0].tunesmith.adapters["default"]
    monkeypatch.setattr(adapter, "_by_tokens", lambda *sizes: tokens)
    own, close = given(adapter), {"atol": case.tolerance, "rtol": case.tolerance}
    assert own.keys() == case.part("param").keys()
    with torch.no_grad():
        for key, value in case.part("param").items():
            own[key].copy_(value)
            if own[key].dim() == 4:  # trained as what it exceeds I/R by
                own[key].sub_(torch.eye(len(value), dtype=value.dtype)[..., None, None] / value.shape[-1])
        identity = torch.eye(layer.in_features, dtype=layer.weight.dtype)
        T = identity + adapter.change() if adapter.transform == "ring" else identity
        torch.testing.assert_close(T, case.tensors.get("out.T", T), **close)
        if adapter.residual != "none":
            A, B = adapter.factors()
            torch.testing.assert_close(B @ A, case.tensors["out.delta"], **close)
        if "out.reg_identity" in case.tensors:
            torch.testing.assert_close(ts.auxiliary_loss(model), case.tensors["out.reg_identity"], **close)
    check(case, model, own)
    torch.testing.assert_close(ts.merge(model)[0].weight.detach(), case.tensors["out.merged_weight"], **close)
