"""Models with packed weights: made, measured, saved, refused."""

import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tunesmith import TunesmithError, models
from tunesmith.quantize import PackedWeight, dequantize, footprint, forget, packed_weights, quantize, restore, save


def logits(model):
    with torch.no_grad():
        return model(**tiny.batch("llama", 2)).logits


def test_quantising_in_place():
    model = tiny.BUILDERS["llama"]()
    before = logits(model)
    assert ts.quantize(model, {"format": "int8", "group_size": 16}) is model
    assert (logits(model) - before).abs().max() < 0.1 * before.abs().max()
    packed = packed_weights(model)
    assert packed and not any("lm_head" in path or "embed" in path for path in packed)
    found = footprint(model)
    assert found["bytes"] == found["closed_form"] and found["bits_per_weight"] == pytest.approx(8 + 24 / 16)
    assert found["total_bytes"] == found["bytes"] + sum(p.nbytes for p in model.parameters() if not isinstance(p, PackedWeight))
    assert not any(isinstance(p, PackedWeight) for p in dequantize(model).parameters())


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(TunesmithError, match="Conv1D, which keeps its weight transposed"):
        quantize(tiny.BUILDERS["gpt2"](), "nf4")
    model = quantize(tiny.BUILDERS["llama"](), "nf4")
    with pytest.raises(TunesmithError, match="is in nf4 already"):
        quantize(model, "nf4")
    with pytest.raises(TunesmithError, match="has adapters; quantise it before"):
        quantize(ts.adapt(tiny.BUILDERS["llama"](), "lora"), "nf4")
    broken = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(TunesmithError, match="weight of '0' is not finite"):
        quantize(broken, "nf4", targets="0")


def test_a_packed_weight_is_a_matrix_that_cannot_be_written():
    W = torch.randn(8, 32)
    packed = quantize(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2)), "nf4", targets="0")[0].weight
    assert packed.shape == (8, 32) and torch.equal(packed + 0, packed.dequantize()) and torch.equal(packed @ W.T, packed.dequantize() @ W.T)
    assert isinstance(packed.detach(), PackedWeight) and isinstance(packed.to(torch.bfloat16), PackedWeight)
    with pytest.raises(TunesmithError, match="cannot be changed in place"):
        packed.detach().add_(1)


def test_layers_that_share_a_weight_go_on_sharing_it():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = quantize(nn.Sequential(first, second, nn.Linear(16, 2)), "nf4", targets=["0", "1"])
    assert model[0].weight is model[1].weight


def test_calibration_on_a_models_own_inputs():
    torch.manual_seed(0)
    x = torch.randn(256, 16) @ torch.randn(16, 16)

    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24), nn.Linear(24, 4))

    wanted, errors = net()(x), []
    for calibrate in (None, lambda model: model(x)):
        model = quantize(net(), {"format": "int3", "group_size": 8}, targets=["0", "2"], calibrate=calibrate)
        errors.append((model(x) - wanted).square().mean().item())
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(TunesmithError, match="never reached '0'"):
        quantize(net(), "int4", targets="0", calibrate=lambda model: None)


def test_saving_and_loading(tmp_path, models_=models):
    folder = tiny.save_tiny(tmp_path / "llama", "llama")
    model, _ = models_.load(str(folder), "lm")
    quantize(model, {"format": "int3", "group_size": 16})
    (tmp_path / "q").mkdir()
    save(model, tmp_path / "q", str(folder))
    for file in folder.glob("*token*"):
        (tmp_path / "q" / file.name).write_bytes(file.read_bytes())
    again = restore(models_.load(str(tmp_path / "q"), "lm")[0], tmp_path / "q")
    assert torch.equal(logits(again), logits(model)) and footprint(again) == footprint(model)
    stored = sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))
    assert stored < footprint(model)["total_bytes"] + 20_000
    with pytest.raises(TunesmithError, match="does not fit this Gpt|does not fit this GPT2"):
        restore(tiny.BUILDERS["gpt2"](), tmp_path / "q")
    data = (tmp_path / "q" / "quantized.safetensors").read_bytes()
    (tmp_path / "q" / "quantized.safetensors").write_bytes(data[:-3] + b"abc")
    with pytest.raises(TunesmithError, match="is damaged .*checksum"):
        restore(models_.load(str(tmp_path / "q"), "lm")[0], tmp_path / "q")


def test_originals_are_kept_until_they_are_forgotten():
    model = quantize(tiny.BUILDERS["llama"](), "nf4", keep=True)
    assert all(w.original is not None and w.original.shape == w.shape for w in packed_weights(model).values())
    assert all(w.original is None for w in packed_weights(forget(model)).values())


def test_calibration_and_a_rounding_of_its_own_do_not_go_together():
    with pytest.raises(TunesmithError, match="leave one of them out"):
        quantize(tiny.BUILDERS["llama"](), "int4", calibrate=logits, rounding=ts.methods.LoftQ(iterations=2).rounding)


def test_a_packed_model_in_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    model = ts.adapt(ts.quantize(tiny.BUILDERS["llama"](), "int4"), "lora")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(**tiny.batch("llama")).logits.square().mean().backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in ts.trainable(parallel).values())


def test_a_state_goes_over_to_a_model_packed_alike():
    one, other = (ts.quantize(tiny.tiny_llama(), "nf4") for _ in range(2))
    for w in packed_weights(other).values():
        w.parts["scale"].mul_(2)
    assert not torch.equal(logits(one), logits(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(other))
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        other.load_state_dict(ts.quantize(tiny.tiny_llama(), "int4").state_dict())
