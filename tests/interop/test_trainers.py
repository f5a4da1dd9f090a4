"""An adapted model is an ordinary model to the trainers people use."""

import copy

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import tunesmith as ts
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["my card was stolen yesterday", "what is the exchange rate", "how do I top up 12 + 30?", "I want my money back"] * 4
METHODS = ["lora", "dora", "ia3", "prompt-tuning", "prefix-tuning", "series-adapter", "ln-tuning", "full"]


def arguments(folder, cls=TrainingArguments, **options):
    settings = dict(output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, per_device_train_batch_size=4, max_steps=6, learning_rate=2e-2, lr_scheduler_type="constant", seed=0, disable_tqdm=True)  # fmt: skip
    return cls(**settings | options)


def trainer(model, folder, **options):
    tokenizer = tiny.tiny_tokenizer()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    return Trainer(model, arguments(folder, **options), train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def base_of(model):
    return {k: v for k, v in model.state_dict().items() if ".tunesmith." not in f".{k}"}


def check(model, before, trained, folder):
    """The loss fell, the base did not move, every adapter did, and the file gives the same model again."""
    first, *_, last = losses(trained)
    assert last < first - 1e-3
    base = base_of(model)
    assert base.keys() == before.keys() and all(torch.equal(base[k], before[k]) for k in before)
    ts.save(model, folder / "adapter")
    again = ts.load(tiny.tiny_llama(), folder / "adapter")
    batch = tiny.batch("llama")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_transformers_trainer(method, checkpointing, tmp_path):
    torch.manual_seed(0)
    model = ts.adapt(tiny.tiny_llama(), method)
    before, start = copy.deepcopy(base_of(model)), {k: p.detach().clone() for k, p in ts.trainable(model).items()}
    run = trainer(model, tmp_path, gradient_checkpointing=checkpointing, learning_rate=1e-3 if method == "full" else 2e-2)
    run.train()
    check(model, before, run, tmp_path)
    moved = {k for k, p in ts.trainable(model).items() if not torch.equal(p, start[k])}
    assert moved == start.keys()


def test_transformers_trainer_resumes_its_checkpoints(tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(0)
        model = ts.adapt(tiny.tiny_llama(), "lora")
        trainer(model, folder, max_steps=4, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=resume)
        return ts.trainable(model)

    straight = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_transformers_trainer_classifies(tmp_path):
    tokenizer, model = tiny.tiny_tokenizer(classifier=True), tiny.tiny_bert()
    ts.adapt(model, ts.LoRA(modules_to_save=["classifier"]))
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS[:3] * 4)]
    run = Trainer(model, arguments(tmp_path, max_steps=12), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_trl_sft_trainer(method, checkpointing, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    torch.manual_seed(0)
    model = ts.adapt(tiny.tiny_llama(), method)
    before = copy.deepcopy(base_of(model))
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": str(i % 4)}]} for i, text in enumerate(TEXTS)])
    options = arguments(tmp_path, trl.SFTConfig, max_length=64, bf16=False, gradient_checkpointing=checkpointing)
    run = trl.SFTTrainer(model, options, train_dataset=rows, processing_class=tiny.tiny_tokenizer())
    run.train()
    check(model, before, run, tmp_path)
