"""Chosen entries of a matrix: how they are chosen, and the adapter that trains them alone."""

from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.adapter import Change, WeightAdapter
from ..engine.fused import changed, sparse_change, sparse_linear, traced
from ..engine.sites import Site
from .method import empty


def smallest(x: Tensor, k: int) -> Tensor:
    """The k-th smallest of x (..., n) along its last dimension, (...)."""
    if traced() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x.kthvalue(k, dim=-1).values
    return torch.as_tensor(np.partition(x.detach().numpy(), k - 1, axis=-1)[..., k - 1])  # on a CPU ten times as fast


def top(score: Tensor, k: int) -> Tensor:
    """Where the k largest of `score` (..., n) are in each row, ascending, (..., k); ties go to the lower position."""
    cut = smallest(score, score.shape[-1] - k + 1).unsqueeze(-1)
    chosen = score >= cut
    if chosen.sum() > chosen[..., 0].numel() * k:
        above, level = score > cut, score == cut
        chosen = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, -1].view(*score.shape[:-1], k)


def generator(site: Site, seed: int) -> torch.Generator:
    """Random numbers of a site's own."""
    return torch.Generator().manual_seed((seed + crc32(site.path.encode())) % 2**63)


def drawn(site: Site, seed: int, n: int, k: int, skip: int = 0) -> Tensor:
    """k of n positions at random, ascending; with `skip`, others than the first so many draws."""
    return torch.randperm(n, generator=generator(site, seed))[skip : skip + k].sort().values


class ChosenLayer(WeightAdapter):
    """W̃ is W but for what `index` names, where s·v, from zero, is added: rows (dim 0), columns (dim 1) or flat positions (dim None), ascending."""

    scattered = True

    def __init__(self, site: Site, index: Tensor, dim: int | None = None, scale: float = 1.0):
        super().__init__()
        (out, size), k = site.shape, len(index)
        limit = {0: out, 1: size, None: out * size}[dim]
        self.dim, self.scale, self.limits = dim, scale, {"index": limit}
        self.register_buffer("index", index.to(site.parameter.device, torch.int32 if limit < 2**31 else torch.int64))
        self.v = nn.init.zeros_(empty(*{0: (k, size), 1: (out, k), None: (k,)}[dim], like=site.parameter))

    def merged(self, W, b):
        return changed(W, self.v, self.index, self.dim, self.scale), b

    def change(self, W):
        before = Change(self.dim, self.index, W.new_empty(0))
        before.values = before.of(W)
        new = torch.add(before.values.to(torch.promote_types(W.dtype, self.v.dtype)), self.v.detach(), alpha=self.scale)
        return before, Change(self.dim, self.index, new)

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        if base.plain:
            return sparse_linear(x, base.W, base.b, self.v, self.index, self.dim, self.scale)
        return base(x) + sparse_change(x, self.v, self.index, self.dim, base.site.out_features, self.scale)
