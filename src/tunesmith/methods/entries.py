"""Chosen entries of a matrix: how they are chosen, and the adapter that trains them alone."""

from zlib import crc32

import torch
from torch import Tensor, nn

from ..engine.adapter import Change, WeightAdapter
from ..engine.fused import entries_change, entries_linear
from ..engine.sites import Site
from .method import empty


def top(score: Tensor, k: int) -> Tensor:
    """Where the k largest of `score` (..., n) are in each row, ascending, (..., k); ties go to the lower position."""
    cut = score.kthvalue(score.shape[-1] - k + 1, dim=-1, keepdim=True).values
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


class EntriesLayer(WeightAdapter):
    """W̃ is W but at the flat positions `index` (K,), ascending, of W (out, in), where v (K,), from zero, is added."""

    scattered = True

    def __init__(self, site: Site, index: Tensor):
        super().__init__()
        size = site.out_features * site.in_features
        self.limits = {"index": size}
        self.register_buffer("index", index.to(torch.int32 if size < 2**31 else torch.int64))
        self.v = nn.init.zeros_(empty(len(index), like=site.parameter))

    def merged(self, W, b):
        return W.to(torch.promote_types(W.dtype, self.v.dtype)).flatten().index_add(0, self.index, self.v).view(W.shape), b

    def change(self, W):
        dtype = torch.promote_types(W.dtype, self.v.dtype)
        return Change(None, self.index, W.take(self.index.long()).to(dtype) + self.v.detach().to(dtype))

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        if base.plain:
            return entries_linear(x, base.W, base.b, self.v, self.index)
        return base(x) + entries_change(x, self.v, self.index, base.site.out_features)
