"""Tiny random models of every family the tests walk over, and folders of them as a user would have."""

from pathlib import Path

import torch

VOCAB = 320
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["my card was stolen yesterday", "what is the exchange rate", "I want my money back, please!", "how do I top up 12 + 30?"]


def _seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def tiny_llama(layers=2, hidden=32, tie=False, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**settings | config)))


def tiny_gpt2(layers=2, hidden=32, **config):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(
        vocab_size=VOCAB, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**settings | config)))


def tiny_bert(num_labels=3, layers=2, hidden=32, **config):
    from transformers import BertConfig, BertForSequenceClassification

    settings = dict(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=512, num_labels=num_labels, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _seeded(lambda: BertForSequenceClassification(BertConfig(**settings | config)))


def tiny_t5(layers=2, hidden=32, **config):
    from transformers import T5Config, T5ForConditionalGeneration

    settings = dict(
        vocab_size=VOCAB, d_model=hidden, d_kv=8, d_ff=2 * hidden, num_layers=layers, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return _seeded(lambda: T5ForConditionalGeneration(T5Config(**settings | config)))


def tiny_vit(num_labels=3, layers=2, hidden=32, **config):
    from transformers import ViTConfig, ViTForImageClassification

    settings = dict(
        image_size=16, patch_size=8, num_channels=3, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _seeded(lambda: ViTForImageClassification(ViTConfig(**settings | config)))


def tiny_convnet(num_labels=3, channels=8):
    """(batch, 3, 16, 16) images to (batch, num_labels); no Hugging Face class in it."""
    nn = torch.nn
    return _seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.GroupNorm(2, 2 * channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * channels, num_labels),
        )
    )


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5, "vit": tiny_vit, "convnet": tiny_convnet}


def batch(kind: str, rows=3, length=10, seed=0) -> dict[str, torch.Tensor]:
    """Keyword arguments for the forward of a tiny model; the first row of a text batch ends in two padded positions.

    `convnet` takes one positional image tensor: use `batch("convnet")["pixel_values"]`.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "convnet"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(5, VOCAB, (rows, length // 2), generator=generator)
    return inputs


def tiny_tokenizer(classifier=False):
    """Byte-level BPE over 320 entries; `<pad> <bos> <eos>` are 0 1 2. A chat template for generative models, [bos] x [eos] for classifiers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    if classifier:
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    if not classifier:
        tokenizer.chat_template = CHAT
    return tokenizer


def save_tiny(folder: str | Path, kind="llama", **settings) -> Path:
    """Write a tiny model (and its tokenizer, for text models) as a Hugging Face folder; `bert` is an encoder without a head."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(folder)
    model = BUILDERS[kind](**settings)
    (model.base_model if kind == "bert" else model).save_pretrained(folder)
    if kind != "vit":
        tiny_tokenizer(classifier=kind == "bert").save_pretrained(folder)
    return folder
