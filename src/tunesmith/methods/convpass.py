"""Convpass: convolutional bypasses beside the attention and the feed-forward block of vision transformers."""

import inspect
import re
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import Adapter
from ..engine.sites import Site, backbone, check_kind, sites
from ..errors import TunesmithError
from .method import Dropout, Rank, empty, in_layers
from .parallel_adapter import Beside, Branch, Given, first_layers
from .select import coupled
from .series_adapter import quick_gelu


def patch_embedding(model: nn.Module) -> Site | None:
    """The convolution that makes an image's patches into tokens: its stride is its kernel."""
    return next((s for s in sites(model) if s.kind == "conv" and s.holder.stride == s.holder.kernel_size != (1, 1)), None)


def check_patches(model: nn.Module, method: str) -> Site:
    """Raises `TunesmithError` for a model that is not a vision transformer with a class token, or that reads text too."""
    site, text = patch_embedding(model), "input_ids" in inspect.signature(backbone(model).forward).parameters
    if site is None or text or not any(re.search("(cls|class)_(token|embedding)", path) for path, _ in model.named_parameters()):
        raise TunesmithError(
            f"{method} acts on a vision transformer with image patches and a class token, which {type(model).__name__} is not; of a model for images and text, adapt the part for images"
        )
    return site


class Patches(Adapter):
    """Where an image becomes patches: notes their rows and columns."""

    def __init__(self, given: Given):
        super().__init__()
        self.given = given

    def forward(self, base, *args, **kwargs):
        y = base(*args, **kwargs)
        self.given.grid = tuple(y.shape[-2:])
        return y


class ConvpassLayer(Branch):
    """y = base(x) + s·U f(conv f(D z)) on tokens z (batch, 1 + m·n, d) that the block was given, the class token first, f QuickGELU.

    D (h, d), conv (h, h, 3, 3) and U (d, h) have biases; the convolution goes over the m × n patches, and over the class token as an image of its own.
    """

    def __init__(self, config: "Convpass", site: Site):
        super().__init__()
        h, d, like = config.bottleneck, site.out_features, site.parameter
        self.scale, self.dropout = config.scale, config.dropout
        self.down, self.conv, self.up = empty(h, d, like=like), empty(h, h, 3, 3, like=like), empty(d, h, like=like)
        nn.init.xavier_uniform_(self.down), nn.init.xavier_uniform_(self.conv), nn.init.zeros_(self.up)
        self.down_bias, self.conv_bias, self.up_bias = (nn.init.zeros_(empty(n, like=like)) for n in (h, h, d))

    def branch(self, z: Tensor) -> Tensor:
        m, n = self.given.grid
        if z.shape[1] != 1 + m * n:
            raise TunesmithError(f"convpass needs one class token and all patches, 1 + {m}·{n} tokens; here it met {z.shape[1]}")
        down, d, conv, c, up, u = (p.to(z.dtype) for p in (self.down, self.down_bias, self.conv, self.conv_bias, self.up, self.up_bias))
        h = quick_gelu(F.linear(z, down, d))
        patches = F.conv2d(h[:, 1:].transpose(1, 2).unflatten(2, (m, n)), conv, c, padding=1).flatten(2).transpose(1, 2)
        cls = F.linear(h[:, :1], conv[:, :, 1, 1], c)
        h = F.dropout(quick_gelu(torch.cat([cls, patches], 1)), self.dropout, self.training)
        return self.scale * F.linear(h, up, u)


class Convpass(Beside):
    """Convpass (Jie and Deng 2022, arXiv 2207.07039): a convolutional bypass beside each attention and each feed-forward block.

    Each reads what its block reads behind the norm, and is added to what the block gives. `placement="attention"` leaves the
    feed-forward blocks alone. The authors choose s for each task among 0.01, 0.1, 1, 10, 100 and train with dropout 0.1. Trained
    are 327,552 numbers for ViT-B/16. Raises `TunesmithError` for a model without image patches and a class token, and in a
    forward of anything but one class token and the patches.
    """

    method, family, title, paper = "convpass", "adapter", "Convolutional bypasses", "arXiv:2207.07039"
    works_on = ("linear", "conv")  # the convolution that makes the patches
    mergeable = False

    targets: Literal["default"] = "default"
    bottleneck: Rank = 8
    scale: float = Field(1.0, gt=0)
    dropout: Dropout = 0.0
    placement: Literal["both", "attention"] = "both"

    def blocks(self, model):
        check_patches(model, self.method)
        kinds = ("heads",) if self.placement == "attention" else ("heads", "channels")
        found = [(inner[0], c.outer) for c in coupled(model) if c.kind in kinds and (inner := first_layers(model, c))]
        if not found:
            raise TunesmithError(f"{self.method} found no attention or feed-forward block in {type(model).__name__}")
        known = sites(model)
        for pair in found:
            for site in pair:
                check_kind(site, ("linear",), self.method, known)
        return found

    own_layers = True

    def select(self, model):
        patches, found = check_patches(model, self.method), super().select(model)
        return {patches.path: (patches, {"input": patches.path})} | (found if self.layers is None else in_layers(self, model, found))

    def build(self, model, configs, by_path):
        built, path = super().build(model, configs, by_path), patch_embedding(model).path
        return built | {path: (by_path[path], Patches(built[path][1].given))}

    def layer(self, site):
        if self.input is None:
            raise TunesmithError(f"{self.method} finds its layers itself and cannot be given to {site.path!r}; make it the method of the whole model")
        return ConvpassLayer(self, site)

    def count(self, site):
        h, d = self.bottleneck, site.out_features
        return 0 if self.input == site.path else 2 * h * d + 9 * h * h + 2 * h + d
