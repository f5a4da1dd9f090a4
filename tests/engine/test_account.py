"""Published parameter counts of LLaMA-7B, from a model that holds no memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts

QKV_UP_DOWN = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
COUNTS = {  # LoRA (Hu et al. 2021) on q and v; LLM-Adapters (Hu et al. 2023) and DoRA (Liu et al. 2024) elsewhere
    "lora q v": (ts.LoRA(rank=8, targets=["q_proj", "v_proj"]), 4_194_304),
    "lora": (ts.LoRA(rank=32, targets=QKV_UP_DOWN), 56_098_816),
    "dora": (ts.DoRA(rank=32, targets=QKV_UP_DOWN), 56_975_360),
    "series": (ts.SeriesAdapter(bottleneck=256), 67_108_864),
    "series up gate": (ts.SeriesAdapter(bottleneck=256, targets=["up_proj", "gate_proj"]), 134_217_728),
    "prefix 10": (ts.PrefixTuning(tokens=10), 2_621_440),
    "prefix 30": (ts.PrefixTuning(tokens=30), 7_864_320),
    "prompt": (ts.PromptTuning(tokens=20), 20 * 4096),
    "ia3": (ts.IA3(), 32 * (2 * 4096 + 11_008)),
    "norms": (ts.LNTuning(), 65 * 4096),
    "head": (ts.LinearProbe(), 32_000 * 4096),
    "full": (ts.Full(), 6_738_415_616),
}
BASE = 6_738_415_616
REPLACING = ("norms", "head", "full")  # trained values in the place of the base's own


@pytest.fixture(scope="module")
def llama7b():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


@pytest.mark.parametrize("case", COUNTS)
def test_llama_7b(llama7b, case):
    config, expected = COUNTS[case]
    ts.adapt(llama7b, config)
    report = ts.summary(llama7b)
    ts.detach(llama7b)
    assert report.trainable == expected == sum(s.trainable for s in report.sites)
    total = BASE if case in REPLACING else BASE + expected
    assert report.total == total and report.base_bytes == 4 * BASE
    assert report.bytes == 4 * expected and report.train_bytes == 16 * expected  # weights, gradients, two states
    assert report.percent == pytest.approx(100 * expected / total)
    matrices = BASE - 32_000 * 4096 - 65 * 4096  # without the embedding's look-up and the norms
    if case not in REPLACING:
        assert report.flops == 2 * (matrices + expected) and report.train_flops == 2 * report.flops + 2 * expected
    assert f"{expected:,} of {total:,}" in str(report)
    assert report.to_dict()["percent"] == report.percent


def test_rank_of_each_layer_counts(llama7b):
    ts.adapt(llama7b, ts.LoRA(rank=2, targets={"layers.0.self_attn.q_proj": {"rank": 64}, "q_proj": {}, "v_proj": {"method": "dora", "rank": 4}}))
    report = ts.summary(llama7b)
    ts.detach(llama7b)
    assert report.trainable == 8192 * (64 + 31 * 2 + 32 * 4) + 32 * 4096
    assert {(s.path.split(".")[-1], s.method) for s in report.sites} == {("q_proj", "lora"), ("v_proj", "dora")}


def test_summary_is_of_what_trains_now(llama7b):
    ts.adapt(llama7b, ts.LoRA(rank=2, targets="q_proj"), name="a")
    ts.adapt(llama7b, ts.LoRA(rank=4, targets="q_proj"), name="b")
    one, other = 32 * 8192 * 2, 32 * 8192 * 4
    assert (ts.summary(llama7b).name, ts.summary(llama7b).trainable) == ("b", other)
    ts.activate(llama7b, ["a", "b"])
    assert (ts.summary(llama7b).name, ts.summary(llama7b).trainable) == ("a+b", one + other)
    ts.activate(llama7b, [])
    assert ts.summary(llama7b).trainable == 0 and ts.summary(llama7b).sites == []
    ts.detach(llama7b)
