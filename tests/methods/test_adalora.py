"""AdaLoRA: what its allocator does to the ranks, step by step."""

import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tunesmith as ts
from tests import tiny
from tunesmith.engine.model import adapters
from tunesmith.methods.adalora import orthogonality


def net(*widths):
    torch.manual_seed(0)
    layers = [m for pair in zip(widths, widths[1:], strict=False) for m in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def adapted(config, *widths):
    model = net(*widths)
    return ts.adapt(model, config, targets=[str(i) for i in range(0, len(model), 2)])


def the_allocator(stages):
    (allocator,) = stages.parts.values()
    return allocator


def batch(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, model[0].in_features, generator=generator), torch.randn(16, model[-1].out_features, generator=generator)


class Run:
    """A training loop that can stop and go on."""

    def __init__(self, config, total, widths=(6, 7, 5)):
        self.model = adapted(config, *widths)
        self.x, self.y = batch(self.model)
        self.optimizer = torch.optim.AdamW(ts.trainable(self.model).values(), lr=0.02)
        self.stages = ts.stages(self.model, total)
        self.zeros = []

    def steps(self, n):
        for _ in range(n):
            self.optimizer.zero_grad()
            (((self.model(self.x) - self.y) ** 2).mean() + ts.auxiliary_loss(self.model)).backward()
            self.optimizer.step()
            self.stages.step()
            self.zeros.append(sum(int((a.E == 0).sum()) for a in adapters(self.model, "default").values()))
        return self


def test_the_budget_is_the_formula_of_the_paper():
    allocator = the_allocator(ts.stages(adapted(ts.AdaLoRA(rank=12, target_rank=8, tinit=20, tfinal=30), 6, 7, 5), 100))
    assert [allocator.budget(t) for t in (0, 20, 21, 45, 70, 99)] == [24, 24, 23, 17, 16, 16]  # 8·(1 − 25/50)³ + 16 = 17 at 45


def test_by_default_the_ranks_fall_in_the_first_half_to_two_thirds():
    run = Run(ts.AdaLoRA(rank=6), total=40)
    allocator = the_allocator(run.stages)
    assert (allocator.first, allocator.last, allocator.target) == (4, 20, 8)
    run.steps(40)
    assert not any(run.zeros[:5]) and run.zeros[20:] == [4] * 20 and run.zeros[5:20] == sorted(run.zeros[5:20])
    assert sum(ts.ranks(run.model).values()) == 8 and ts.ranks(run.model).keys() == {"0", "2"}
    assert len(run.model[0].tunesmith.adapters["default"].E) == 6  # what was pruned stays, as zero


def test_between_masks_a_zeroed_coefficient_grows_again_until_the_last_mask():
    run = Run(ts.AdaLoRA(rank=4, target_rank=2, tinit=0, tfinal=5, deltaT=3), total=20).steps(20)
    assert all(run.zeros[t] > 0 for t in (6, 9, 12)) and not any(run.zeros[t] for t in (7, 8, 10, 11, 13, 14))
    assert run.zeros[15:] == [4] * 5


@pytest.mark.parametrize("stop", [3, 9, 17])
def test_a_resumed_run_ends_in_the_same_bits(stop):
    config = ts.AdaLoRA(rank=4, target_rank=2, tinit=2, tfinal=6, deltaT=2)
    whole = Run(config, 20).steps(20)
    first = Run(config, 20).steps(stop)
    file = io.BytesIO()
    torch.save([first.stages.state_dict(), first.optimizer.state_dict(), list(ts.trainable(first.model).values())], file)
    file.seek(0)
    stages, optimizer, parameters = torch.load(file, weights_only=True)
    second = Run(config, 20)
    with torch.no_grad():
        for p, saved in zip(ts.trainable(second.model).values(), parameters, strict=True):
            p.copy_(saved)
    second.optimizer.load_state_dict(optimizer)
    second.stages.load_state_dict(stages)
    second.steps(20 - stop)
    assert all(torch.equal(a, b) for a, b in zip(ts.trainable(whole.model).values(), ts.trainable(second.model).values(), strict=True))


def test_equal_budgets_prune_nothing():
    assert not any(Run(ts.AdaLoRA(rank=3, target_rank=3), total=12).steps(12).zeros)


def test_a_site_without_gradients_loses_its_ranks():
    model = adapted(ts.AdaLoRA(rank=4, target_rank=2, tinit=0, tfinal=1), 6, 7, 5)
    x, y = batch(model)
    stages = ts.stages(model, 8)
    for _ in range(8):
        model.zero_grad()
        with torch.no_grad():
            model[2].tunesmith.adapters["default"].E.fill_(0.1)
            h = model[1](model[0](x))
        ((model[2](h) - y) ** 2).mean().backward()
        stages.step()
    assert ts.ranks(model) == {"0": 0, "2": 4}


def test_ranks_go_where_the_task_needs_them():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False))
    with torch.no_grad():
        base[1].weight.mul_(0.02)  # what the first layer does hardly reaches the output
    x = torch.randn(64, 12)
    y = (base(x) + x @ torch.randn(12, 12) / 4).detach()
    model = ts.adapt(base, ts.AdaLoRA(rank=6, target_rank=3, tinit=5, tfinal=20), targets=["0", "1"])
    optimizer, stages = torch.optim.AdamW(ts.trainable(model).values(), lr=0.03), ts.stages(model, 60)
    for _ in range(60):
        optimizer.zero_grad()
        (((model(x) - y) ** 2).mean() + ts.auxiliary_loss(model)).backward()
        optimizer.step()
        stages.step()
    kept = ts.ranks(model)
    assert kept["1"] > kept["0"] and kept["0"] + kept["1"] == 6


def test_orthogonality_is_the_mean_over_tensors_of_any_shape():
    torch.manual_seed(0)
    factors = [torch.randn(3, 5), torch.randn(2, 7), torch.randn(3, 5), torch.randn(4, 2)]
    expected = torch.stack([torch.linalg.matrix_norm(F @ F.T - torch.eye(len(F))) for F in factors]).mean()
    torch.testing.assert_close(orthogonality(factors), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(orthogonality(factors), expected)
    eye = nn.Parameter(torch.eye(3))
    orthogonality([eye]).backward()
    assert torch.equal(eye.grad, torch.zeros(3, 3))
    assert ts.auxiliary_loss(adapted(ts.AdaLoRA(orth_reg_weight=0), 4, 4)) is None


class Largest(TorchDispatchMode):
    def __init__(self, known):
        super().__init__()
        self.known, self.most = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.most = max(self.most, out.numel())
        return out


def test_no_matrix_of_the_weights_size_is_formed():
    model = adapted(ts.AdaLoRA(rank=2), 50, 40)
    with torch.no_grad():
        model[0].tunesmith.adapters["default"].E.fill_(1)
    x = torch.randn(1, 50, requires_grad=True)
    with Largest(model.parameters()) as seen:
        model(x).sum().backward()
    assert seen.most <= 2 * 50


@pytest.mark.parametrize("method,match", [
    (ts.AdaLoRA(rank=4, target_rank=5), "adalora at '0': target_rank=5 is more than the rank=4"),
    ({"method": "adalora", "beta1": 1}, "beta1=1"),
])  # fmt: skip
def test_bad_configs(method, match):
    with pytest.raises(ts.TunesmithError, match=match):
        ts.adapt(net(4, 4), method, targets=["0"])


def test_a_schedule_without_room_is_refused():
    with pytest.raises(ts.TunesmithError, match=r"20 steps, the first 12 \(tinit\) and the last 8 \(tfinal\) without"):
        ts.stages(adapted(ts.AdaLoRA(tinit=12, tfinal=8), 4, 4), 20)


def test_small_ranks_need_no_target():
    assert ts.AdaLoRA().final_rank == 8 and ts.AdaLoRA(rank=1).final_rank == 1
    assert ts.AdaLoRA(rank=3, target_rank=1).dump()["target_rank"] == 1


def test_a_site_that_a_peft_file_left_no_ranks(tmp_path):
    model = ts.adapt(tiny.tiny_llama(), ts.AdaLoRA(rank=4, targets=["q_proj"]))
    for adapter in adapters(model, "default").values():
        nn.init.ones_(adapter.E)
    ts.save(model, tmp_path / "a", format="peft")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors |= {key + "A": tensors[key + "A"][:0], key + "B": tensors[key + "B"][:, :0].contiguous(), key + "E": tensors[key + "E"][:0]}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    pruned = ts.load(tiny.tiny_llama(), tmp_path / "a")
    assert ts.summary(pruned).trainable == 4 * (32 + 32 + 1) and ts.ranks(pruned) == {"model.layers.1.self_attn.q_proj": 4}
    ts.save(pruned, tmp_path / "own"), ts.save(pruned, tmp_path / "back", format="peft")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert after.keys() == tensors.keys() and all(torch.equal(after[k], t) for k, t in tensors.items())
    inputs = tiny.batch("llama")
    assert torch.equal(ts.load(tiny.tiny_llama(), tmp_path / "own")(**inputs).logits, pruned(**inputs).logits)


def test_what_the_peft_format_cannot_hold(tmp_path):
    model = ts.adapt(tiny.tiny_llama(), ts.AdaLoRA(targets={"q_proj": {"rank": 4}, "v_proj": {}}))
    with pytest.raises(ts.TunesmithError, match="one init_r"):
        ts.save(model, tmp_path / "a", format="peft")
    model = ts.adapt(tiny.tiny_llama(), ts.AdaLoRA(targets=["embed_tokens"]))
    with pytest.raises(ts.TunesmithError, match="not on 'model.embed_tokens'"):
        ts.save(model, tmp_path / "a", format="peft")
