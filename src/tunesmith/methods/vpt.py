"""Visual prompt tuning: learned tokens between the class token and the patches."""

import re
from math import sqrt
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ..engine.adapter import Adapter
from ..engine.sites import backbone
from ..engine.tokens import token_site
from ..errors import TunesmithError
from .convpass import check_patches, patch_embedding
from .method import Method, empty
from .select import layers


class VPTPrompts(Adapter):
    """At the backbone: holds the prompts (1 or layers, m, d), which its blocks put in; rows of one adapter go through it together."""

    def __init__(self, config: "VPT", model: nn.Module):
        super().__init__()
        patches = patch_embedding(model)
        self.prompt = empty(len(blocks(model)) if config.deep else 1, config.tokens, patches.out_features, like=patches.parameter)
        bound = sqrt(6 / (patches.in_features + patches.out_features))
        nn.init.uniform_(self.prompt, -bound, bound)


class VPTBlock(Adapter):
    """At the i-th block: prompts enter at the first, take the place of the old ones where there are deep ones, and are left out behind the last."""

    def __init__(self, prompts: VPTPrompts, number: int, last: bool):
        super().__init__()
        self.prompts, self.number, self.last = [prompts], number, last  # in a list: the parameters belong to the backbone's site alone

    def forward(self, base, x, *args, **kwargs):
        prompt: Tensor = self.prompts[0].prompt
        m = prompt.shape[1]
        if self.number < len(prompt):
            own = prompt[self.number].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + m if self.number else 1 :]], 1)
        y = base(x, *args, **kwargs)
        if not self.last:
            return y
        without = [torch.cat([t[:, :1], t[:, 1 + m :]], 1) for t in (y[:1] if isinstance(y, tuple) else [y])]
        return (*without, *y[1:]) if isinstance(y, tuple) else without[0]


def blocks(model: nn.Module) -> list[str]:
    """Paths of the blocks that a vision transformer runs one after another, none where no stack is found."""
    stack, _, depth = max(layers(model).values(), key=lambda place: place[2], default=("", 0, 0))
    return [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()] if stack and depth else []


class VPT(Method):
    """Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119): m learned tokens in front of the patches of a vision transformer.

    They enter behind the class token, without positions: shallow at the first block, deep anew at every block, in place of what
    the block before made of the old ones. What the last block gives has the caller's tokens alone. Trained are m·d numbers,
    or m·d for each block: 460,800 for ViT-B/16 with 50 deep prompts. Raises `TunesmithError` for a model without image patches,
    a class token and a list of blocks.
    """

    method, family, title, paper = "vpt", "prompt", "Visual prompt tuning", "arXiv:2203.12119"
    works_on = ("tokens",)
    mergeable = False
    identity = False
    default_lr = 1e-2

    targets: Literal["tokens"] = "tokens"
    tokens: PositiveInt = 10
    deep: bool = True

    def select(self, model):
        check_patches(model, self.method)
        inner = backbone(model)
        modules = [inner, *(inner.get_submodule(path) for path in blocks(inner))]
        if len(modules) < 2 or any(isinstance(m, nn.Sequential) for m in modules) or patch_embedding(inner) is None:
            raise TunesmithError(f"{self.method} needs a vision transformer with its blocks in a list; {type(inner).__name__} has none")
        if fixed := next((path for path, _ in inner.named_parameters() if re.search("relative_position|mid_position", path)), None):
            raise TunesmithError(f"{self.method} adds tokens to each block, and those of {type(inner).__name__} know the place of every token ({fixed}); another method for vision works, such as convpass or lora")
        return {site.path: (site, {}) for site in (token_site(m, model) for m in modules)}

    def build(self, model, configs, by_path):
        top, *inside = configs
        prompts = VPTPrompts(self, backbone(model))
        return {top: (by_path[top], prompts)} | {path: (by_path[path], VPTBlock(prompts, i, i + 1 == len(inside))) for i, path in enumerate(inside)}

    def count(self, site):
        patches = patch_embedding(site.owner)  # a block has none
        return 0 if patches is None else patches.out_features * self.tokens * (len(blocks(site.owner)) if self.deep else 1)
