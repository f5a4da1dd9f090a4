"""Prompt tuning: learned embeddings in front of the text."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from ..engine.adapter import Adapter
from ..engine.sites import backbone, float_dtype
from ..engine.tokens import TokenAdapter, arguments, cached, extend, inserted, past, reads_first, token_backbone, token_site, trim
from ..errors import TunesmithError
from .method import Method, empty


class PromptLayer(TokenAdapter):
    """The input embeddings (batch, T, d) become (batch, m + T, d) with the prompt (m, d) in front, or behind the first."""

    outermost = True  # it enters where the cache is empty, which a prefix fills

    def __init__(self, config: "SoftPrompt", embeddings: nn.Module, keep: bool):
        super().__init__()
        words = embeddings.weight
        self.length, self.after, self.keep = config.tokens, config.after, keep  # keep: its outputs keep the virtual positions
        self.prompt = empty(config.tokens, words.shape[1], like=words)
        with torch.no_grad():
            self.prompt.copy_(config.start(embeddings))

    def vectors(self) -> torch.Tensor:
        """What is put beside the text, (m, d)."""
        return self.prompt

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        new = past(cached(call)) == 0
        extend(call, self.length, new, self.after)
        if not new:
            return base(**call)
        embeds = embedded(base, call)
        call["inputs_embeds"] = inserted(embeds, self.vectors().to(embeds.dtype).expand(len(embeds), -1, -1), self.after)
        output = base(**call)
        return output if self.keep else trim(output, self.length, self.after)


def embedded(base, call: dict) -> torch.Tensor:
    """The call's input embeddings (batch, T, d), looked up where it has token ids, which are taken out of it."""
    ids, embeds = call.pop("input_ids", None), call.get("inputs_embeds")
    return base.site.owner.get_input_embeddings()(ids) if embeds is None else embeds


class CrossMask(Adapter):
    """Lets a decoder attend to the virtual tokens of its encoder."""

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is not None and (extra := states.shape[1] - mask.shape[1]) > 0:
            call["encoder_attention_mask"] = torch.cat([mask.new_ones(len(mask), extra), mask], 1)
        return base(**call)


class SoftPrompt(Method):
    """What methods have in common that put m = `tokens` embeddings in front of the input, of an encoder-decoder's encoder.

    Where heads read the first token, as BERT's do, the prompt stands behind it (`after` = 1), as P-tuning has it: from a
    prompt's first embedding a new head learns nothing for hundreds of steps. With `after` = 0 it does read that, as with Hugging
    Face peft. Outputs align with the caller's tokens: the virtual positions are cut off (peft keeps them).
    """

    family = "prompt"
    works_on = ("tokens",)
    mergeable = False
    identity = False

    targets: Literal["tokens"] = "tokens"
    tokens: PositiveInt = Field(20, description="length m of the prompt")
    after: Literal[0, 1] | None = Field(None, description="tokens of the text before the prompt; default: 1 in encoders such as BERT, whose heads read the first token, and else 0")

    layer_class: ClassVar[type[PromptLayer]] = PromptLayer

    @property
    def front(self):
        return self.tokens

    def start(self, embeddings: nn.Module) -> torch.Tensor:
        """What the prompt is before it trains, (m, d)."""
        words = embeddings.weight
        return torch.randn(self.tokens, words.shape[1], device=words.device, dtype=float_dtype(words))

    def size(self, width: int) -> int:
        """Trained parameters where embeddings have `width` numbers."""
        return self.tokens * width

    def select(self, model):
        inner = token_backbone(model, self.method)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            stacks = [model.get_encoder(), model.get_decoder()]
        else:
            stacks = [inner]
        after = int(reads_first(model)) if self.after is None else self.after
        return {site.path: (site, {"after": after}) for site in (token_site(m, model) for m in stacks)}

    def build(self, model, configs, by_path):
        (first, site), *decoder = [(path, by_path[path]) for path in configs]
        embeddings = backbone(model).get_input_embeddings()
        pooled = self.after == 0 and reads_first(model) and type(model).__name__.endswith("ForSequenceClassification")
        return {first: (site, self.layer_class(self, embeddings, keep=pooled or bool(decoder)))} | {path: (s, CrossMask()) for path, s in decoder}

    def count(self, site):
        decoder = getattr(site.owner, "is_decoder", False)  # of an encoder-decoder: its site only widens a mask
        return 0 if decoder else self.size(site.owner.get_input_embeddings().weight.shape[1])

    peft_by_site = False
    plain: ClassVar[dict[str, Any]] = {}  # what the config says of a prompt without the encoder that made it, as peft's files have it

    def to_peft(self, configs, model):
        config = model.config
        if any(each.after for each in configs.values()):
            raise TunesmithError(f"Hugging Face peft puts a prompt in front of the first token; train {self.method} with after=0 for a file that peft can read")
        return {
            "num_virtual_tokens": self.tokens, "token_dim": backbone(model).get_input_embeddings().weight.shape[1], "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        config = cls(tokens=len(found["prompt_embeddings"]), after=0, **cls.plain)
        if fields.get("num_transformer_submodules") == 2:
            raise TunesmithError("this peft prompt has a part for the decoder (num_transformer_submodules=2); tunesmith's prompts are for the encoder")
        return config, dict.fromkeys(config.select(model), {})

    def peft_tensors(self, site, own):
        return {"prompt_embeddings": own["prompt"]} if own else {}

    def own_tensors(self, site, theirs):
        return {"prompt": theirs["prompt_embeddings"]} if self.count(site) else {}


class PromptTuning(SoftPrompt):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): m embeddings P (m, d) in front of the input, H = [P; E(x)], or, in
    encoders such as BERT, behind its first token.

    `init`: the embeddings of random words of the vocabulary, N(0, 1), or the embeddings of `init_text`, repeated or cut to
    m tokens. Raises `TunesmithError` for a model that reads no token ids, and for a text where the model's folder has no tokenizer.
    """

    method, title, paper = "prompt-tuning", "Prompt tuning", "arXiv:2104.08691"
    default_lr = 3e-2

    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    init_text: str | list[int] | None = Field(None, description="what the prompt starts as with init='text': a text, or its token ids")

    @model_validator(mode="after")
    def complete(self):
        if (self.init == "text") != bool(self.init_text):
            raise TunesmithError(f"{self.method}: init='text' and init_text go together; init={self.init!r} with init_text={self.init_text!r:.80} is not valid")
        return self

    def select(self, model):
        found = super().select(model)
        if not isinstance(self.init_text, str):
            return found
        ids = token_ids(self.init_text, model)  # kept with the adapter, which can then be loaded without a tokenizer
        return {path: (site, more | {"init_text": ids}) for path, (site, more) in found.items()}

    def start(self, embeddings):
        if self.init == "random":
            return super().start(embeddings)
        words = embeddings.weight
        ids = self.init_text or torch.randint(len(words), (self.tokens,)).tolist()
        if wrong := [i for i in ids if not 0 <= i < len(words)]:
            raise TunesmithError(f"{self.method}: init_text has the token id {wrong[0]}; the model's are 0 to {len(words) - 1}")
        return embeddings(torch.tensor([ids[i % len(ids)] for i in range(self.tokens)], device=words.device))  # not its weight, which some models scale

    peft_type = "PROMPT_TUNING"

    def to_peft(self, configs, model):
        return super().to_peft(configs, model) | {"prompt_tuning_init": "RANDOM"}


def token_ids(text: str, model: nn.Module) -> list[int]:
    """A text's token ids, without special tokens, by the tokenizer that lies beside the model."""
    from transformers import AutoTokenizer

    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        ids = AutoTokenizer.from_pretrained(where, local_files_only=True).encode(text, add_special_tokens=False) if where else []
    except (OSError, ValueError, ImportError, KeyError):
        ids = []
    if not ids:
        raise TunesmithError(f"a prompt cannot start as the text {text!r:.60}: there is no tokenizer at {where!r} that reads it; give init_text as a list of token ids")
    return ids
