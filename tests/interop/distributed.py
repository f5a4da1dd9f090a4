"""What each process of test_distributed runs: `distributed.py ddp|fsdp FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

import tunesmith as ts
from tests import tiny

METHODS = {
    "lora": ts.LoRA(rank=4, bias="all", modules_to_save=["lm_head"]),
    "dora": ts.DoRA(rank=4),
    "pissa": ts.PiSSA(rank=4),
    "ia3": ts.IA3(),
    "ln-tuning": ts.LNTuning(),
    "series-adapter": ts.SeriesAdapter(bottleneck=4),
    "prompt-tuning": ts.PromptTuning(tokens=4),
    "prefix-tuning": ts.PrefixTuning(tokens=4),
    "full": ts.Full(),
}


def model_and_batch(method):
    torch.manual_seed(0)
    model = tiny.tiny_llama()
    torch.manual_seed(1)
    ts.adapt(model, METHODS[method])
    ids = torch.randint(5, tiny.VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
    return model, ids


def main(mode, folder):
    torch.set_num_threads(1)
    for method in METHODS:
        accelerator = Accelerator(cpu=True)
        if mode == "fsdp":  # which accelerate itself chooses on GPUs only
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"], reshard_after_forward=True
            )
            accelerator.state.distributed_type = DistributedType.FSDP
        train(accelerator, mode, method, Path(folder) / method)
    accelerator.end_training()


def train(accelerator, mode, method, folder):
    model, ids = model_and_batch(method)
    optimizer = torch.optim.AdamW(ts.trainable(model).values(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = ids.chunk(accelerator.num_processes)[accelerator.process_index]
    for _ in range(3):
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if mode == "fsdp":
        local = [p.to_local().numel() for p in ts.trainable(model).values()]
        whole = [p.numel() for p in ts.trainable(model).values()]
        assert sum(local) <= 0.6 * sum(whole), f"the adapters of {method} are sharded"
    ts.save(model, folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if accelerator.is_main_process:
        torch.save(logits, folder / "logits")
        assert ts.summary(model).trainable == ts.summary(model_and_batch(method)[0]).trainable
    accelerator.wait_for_everyone()
    accelerator.free_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
