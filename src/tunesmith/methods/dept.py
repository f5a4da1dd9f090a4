"""DePT: a shorter soft prompt, and a low-rank offset of the word embeddings by position."""

import inspect
from math import sqrt

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from ..engine.tokens import arguments, cached, past
from ..errors import TunesmithError
from .method import Rank, empty
from .prompt_tuning import PromptLayer, PromptTuning, embedded


class DePTLayer(PromptLayer):
    """H = [P; E(x) + c·A B]: prompt P (m, d), A (s, r), B (r, d); the i-th token of a text has row i of c·A B."""

    def __init__(self, config: "DePT", embeddings: nn.Module, keep: bool):
        super().__init__(config, embeddings, keep)
        self.scale = config.alpha / sqrt(config.rank) if config.alpha else 1.0
        self.A = empty(config.max_length, config.rank, like=embeddings.weight)
        self.B = empty(config.rank, embeddings.weight.shape[1], like=embeddings.weight)
        nn.init.kaiming_uniform_(self.A, a=sqrt(5))  # U(±1/√r), r being the inputs of this (s, r)
        nn.init.zeros_(self.B)

    def forward(self, base, *args, **kwargs):
        call = arguments(base, args, kwargs)
        before, embeds = past(cached(call)), embedded(base, call)
        (_, T, _), s, mask = embeds.shape, len(self.A), call.get("attention_mask")
        if not before and T > s and (longest := T if mask is None else int(mask.sum(-1).max())) > s:
            raise TunesmithError(f"dept has offsets for texts of max_length={s} tokens, and this one has {longest}: cut it, or train with a larger max_length")
        places = torch.arange(T, device=embeds.device)[None] + max(before - self.length, 0)
        if mask is not None and (call.get("position_ids") is not None or "position_ids" not in inspect.signature(base.forward).parameters):
            places = (places - mask.long().argmax(-1, keepdim=True)).clamp(min=0)  # from where the text begins
        rows = F.embedding(places.clamp(max=s), F.pad(self.A, (0, 0, 0, 1)))  # what is written beyond s has no offset
        call["inputs_embeds"] = (embeds + self.scale * (rows @ self.B)).to(embeds.dtype)
        return super().forward(base, **call)


class DePT(PromptTuning):
    """Decomposed prompt tuning (Shi and Lipani 2024, arXiv 2309.05173): m prompt tokens, and A B (s, r)(r, d) added to the word
    embeddings of texts of up to s = `max_length` tokens, in place of a longer prompt.

    It trains m·d + (s + d)·r numbers, as a prompt of l tokens where r = (l − m)·d/(s + d): 76,800 for T5-base (d = 768) with
    the defaults, which is l = 100. B starts at zero, so that it starts as prompt tuning. P trains at the learning rate, A and B
    at `lr_ratio` times it: 3e-2 and 5e-4 by default. The i-th position of the text has the i-th offset: from the first column,
    as in the authors' code, or, where the call gives positions or the model takes none, from where the mask says that the text
    begins, as while generating from texts padded on the left. What a decoder writes has the offsets of its places, as it had in
    training (none in the authors' code), and none beyond s. Raises `TunesmithError` as prompt tuning does, and in a forward for a text longer than s.
    """

    method, title, paper = "dept", "Decomposed prompt tuning", "arXiv:2309.05173"

    tokens: PositiveInt = Field(60, description="length m of the prompt")
    rank: Rank = 30
    max_length: PositiveInt = Field(256, description="tokens s of the longest text")
    alpha: PositiveFloat | None = Field(8, description="the offsets are scaled by alpha/√rank, as in the authors' code; none: by 1, as in the paper")
    lr_ratio: PositiveFloat = Field(1 / 60, description="learning rate of A and B over that of the prompt")

    layer_class = DePTLayer

    @property
    def longest(self):
        return self.max_length

    def size(self, width):
        return self.tokens * width + (self.max_length + width) * self.rank

    def param_groups(self, adapters, lr):
        (group,) = super().param_groups(adapters, lr)
        prompts = {id(layer.prompt) for layer in adapters.values() if isinstance(layer, DePTLayer)}
        pair = [p for p in group["params"] if id(p) not in prompts]
        return [group | {"params": [p for p in group["params"] if id(p) in prompts]}, group | {"params": pair, "lr": lr * self.lr_ratio}]

    peft_type = None
