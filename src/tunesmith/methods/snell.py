"""SNELL: the sparse change of a weight is made from two thin factors by a kernel, whose small entries are zeroed."""

from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.model import adapters as adapters_of
from ..engine.sites import Site
from .entries import smallest
from .method import Method, empty

Sparsity = Annotated[float, Field(ge=0, lt=1)]


class _Kernel(torch.autograd.Function):
    """P_ji = s·(‖B₀[j] − A₀[i]‖ − ‖B₁[j] − A₁[i]‖), (out, in), for A (2, in, r/2), B (2, out, r/2)."""

    @staticmethod
    def forward(ctx, A, B, scale):
        d = torch.cdist(B, A)
        ctx.scale = scale
        ctx.save_for_backward(A, B, d)
        return (d[0] - d[1]).mul_(scale)

    @staticmethod
    def backward(ctx, g):
        A, B, d = ctx.saved_tensors
        R = torch.stack([g, -g]).mul_(ctx.scale).div_(d).masked_fill_(d == 0, 0)
        return R.sum(1)[..., None] * A - R.mT @ B, R.sum(2)[..., None] * B - R @ A, None


def kernel(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The difference of the distances between the factors' rows, (out, in), of full rank where B Aᵀ is not (eq. 3, piecewise linear)."""
    return _Kernel.apply(A, B, scale)


def sparsified(K: Tensor, sparsity: float, form: str) -> Tensor:
    """K with its `sparsity`·n smallest magnitudes zeroed, the others scaled as `form` says."""
    size = K.detach().abs()
    if form == "paper":
        return K * (K.abs() - smallest(size.flatten(), max(ceil(sparsity * K.numel()), 1))).relu()
    t = smallest(size.flatten(), int(sparsity * (K.numel() - 1)) + 1)  # no entry lies between it and the interpolated quantile
    mask = size > t
    return K * (mask if form == "mask" else size * mask)


class SNELLLayer(WeightAdapter):
    """W̃ = W + D(A, B), D sparse (out, in); made anew whenever it is needed, in backward too."""

    def __init__(self, config: "SNELL", site: Site):
        super().__init__()
        self.config, half = config, config.rank // 2
        self.A, self.B = empty(2, site.in_features, half, like=site.parameter), empty(2, site.out_features, half, like=site.parameter)
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, a=5**0.5)

    def sparse(self) -> Tensor:
        """D (out, in)."""
        K = kernel(self.A, self.B, self.config.scale)
        return sparsified(K, self.config.sparsity, self.config.form) if self.config.sparsity else K

    def merged(self, W, b):
        return W + self.sparse().to(torch.promote_types(W.dtype, self.A.dtype)), b


def density(model: nn.Module, name: str = "default") -> dict[str, float]:
    """The share of non-zero entries in each site's change, by site path, of a snell or snella adapter."""
    with torch.no_grad():
        return {path: float((a.sparse() != 0).double().mean()) for path, a in adapters_of(model, name).items() if isinstance(a, SNELLLayer)}


class SNELL(Method):
    """SNELL (Shen et al. 2024, arXiv 2411.01800): W + D, D the kernel matrix K of two thin factors with its smallest entries zeroed.

    K_ij = s·(‖A₀[i] − B₀[j]‖ − ‖A₁[i] − B₁[j]‖) has full rank, so its entries can be zeroed one by one where those of
    B Aᵀ are tied. `form`: `code`, what the authors ran, D = K·sg(|K|) where |K| is above the quantile t; `paper`,
    D = K·max(|K| − t, 0) (eq. 5); `mask`, D = K there. Without sparsity D = K in every form. The start is not the identity, but
    with `code` and `paper` close to it: D is the square of a small K. K is made anew at every forward and backward.
    """

    method, family, title, paper = "snell", "selective", "Kernelised low-rank sparse tuning", "arXiv:2411.01800"
    works_on = ("linear", "embedding", "conv", "attention")
    identity = False
    default_lr = 1e-3

    rank: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = Field(8, description="width of the factors, in two halves")
    sparsity: Sparsity = Field(0.9, description="share of the entries of the change that are zero")
    form: Literal["code", "paper", "mask"] = Field("code", description="what the other entries are scaled by")
    scale: PositiveFloat = Field(0.1, description="of the kernel, fixed")

    def layer(self, site):
        return SNELLLayer(self, site)

    def count(self, site):
        return self.rank * (site.in_features + site.out_features)
