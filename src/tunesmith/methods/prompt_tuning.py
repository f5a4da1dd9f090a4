"""Prompt tuning: learned embeddings in front of the text."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import nn

from ..engine.adapter import Adapter
from ..engine.sites import backbone
from ..engine.tokens import TokenAdapter, arguments, cached, extend, past, token_backbone, token_site, trim
from ..errors import TunesmithError
from .method import Method, empty


class PromptLayer(TokenAdapter):
    """The input embeddings (batch, T, d) become (batch, m + T, d) with the prompt (m, d) in front."""

    def __init__(self, config: "PromptTuning", embeddings: nn.Module, keep: bool):
        super().__init__()
        weight = embeddings.weight
        self.length, self.keep = config.tokens, keep
        self.prompt = empty(config.tokens, weight.shape[1], like=weight)
        with torch.no_grad():
            if config.init == "vocabulary":
                self.prompt.copy_(weight[torch.randint(len(weight), (config.tokens,))])
            else:
                nn.init.normal_(self.prompt)

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        new = past(cached(call)) == 0
        extend(call, self.length, new)
        if not new:
            return base(**call)
        ids, embeds = call.pop("input_ids", None), call.get("inputs_embeds")
        embeds = base.site.owner.get_input_embeddings()(ids) if embeds is None else embeds
        call["inputs_embeds"] = torch.cat([self.prompt.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)
        output = base(**call)
        return output if self.keep else trim(output, self.length)


class CrossMask(Adapter):
    """Lets a decoder attend to the virtual tokens of its encoder."""

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is not None and (extra := states.shape[1] - mask.shape[1]) > 0:
            call["encoder_attention_mask"] = torch.cat([mask.new_ones(len(mask), extra), mask], 1)
        return base(**call)


class PromptTuning(Method):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): m embeddings in front of the input, of an encoder-decoder's
    encoder. Outputs align with the caller's tokens: the virtual positions are cut off (Hugging Face peft keeps them).
    """

    method, family, title, paper = "prompt-tuning", "prompt", "Prompt tuning", "arXiv:2104.08691"
    works_on = ("tokens",)
    mergeable = False
    quantized_base_ok = True
    identity = False
    default_lr = 3e-2

    targets: Literal["tokens"] = "tokens"
    tokens: PositiveInt = 20
    init: Literal["vocabulary", "normal"] = "vocabulary"

    def select(self, model):
        inner = token_backbone(model, self.method)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            stacks = [model.get_encoder(), model.get_decoder()]
        else:
            stacks = [inner]
        return {site.path: (site, {}) for site in (token_site(m, model) for m in stacks)}

    def build(self, model, configs, by_path):
        (first, site), *decoder = [(path, by_path[path]) for path in configs]
        embeddings = backbone(model).get_input_embeddings()
        return {first: (site, PromptLayer(self, embeddings, keep=bool(decoder)))} | {path: (s, CrossMask()) for path, s in decoder}

    def count(self, site):
        decoder = getattr(site.owner, "is_decoder", False)  # of an encoder-decoder: its site only widens a mask
        return 0 if decoder else self.tokens * site.owner.get_input_embeddings().weight.shape[1]

    peft_type, peft_by_site = "PROMPT_TUNING", False

    def to_peft(self, configs, model):
        config = model.config
        return {
            "num_virtual_tokens": self.tokens, "token_dim": backbone(model).get_input_embeddings().weight.shape[1], "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers, "prompt_tuning_init": "RANDOM",
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        config = cls(tokens=len(found["prompt_embeddings"]))
        if fields.get("num_transformer_submodules") == 2:
            raise TunesmithError("this peft prompt has a part for the decoder (num_transformer_submodules=2); tunesmith's prompts are for the encoder")
        return config, dict.fromkeys(config.select(model), {})

    def peft_tensors(self, site, own):
        return {"prompt_embeddings": own["prompt"]} if own else {}

    def own_tensors(self, site, theirs):
        return {"prompt": theirs["prompt_embeddings"]} if self.count(site) else {}
