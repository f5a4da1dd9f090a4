"""QWHA: a few coefficients of the weight change's Walsh–Hadamard spectrum, chosen to undo what quantisation did."""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.hadamard import length, transform
from ..engine.sites import Site
from ..quantize import PackedWeight
from .entries import drawn
from .method import Method, Rank, Seed, empty

DAMP = 1e-4  # of the mean of the moments' diagonal
FEW = 32  # rows up to which transforming the inputs is cheaper than forming the change


class QWHALayer(WeightAdapter):
    """ΔW = s·F Hᵀ, F (out, n) zero but for the coefficients c (k,) at `index`, H of order n: `in`, or the next one with a matrix.

    The change is formed by fast transforms, out·n·log n additions, and not kept; a few rows are transformed themselves.
    """

    def __init__(self, config: "QWHA", site: Site):
        super().__init__()
        self.size, self.shape, self.transform = config.length(site), site.shape, BASES[config.basis]
        self.scale = config.scale(site)
        self.limits = {"index": site.out_features * self.size}
        k = config.count(site)
        index, c = site.seen.get("start") or config.start(site) or (drawn(site, config.random_loc_seed, site.out_features * self.size, k), torch.zeros(k))
        self.register_buffer("index", index.to(site.parameter.device, torch.int32 if self.limits["index"] < 2**31 else torch.int64))
        self.c = empty(k, like=site.parameter)
        if not self.c.is_meta:
            self.c.data.copy_(c / self.scale)

    def change(self) -> Tensor:
        F = self.c.new_zeros(self.shape[0] * self.size).index_put((self.index.long(),), self.scale * self.c).view(-1, self.size)
        return self.transform(F, transpose=True)[:, : self.shape[1]]

    def merged(self, W, b):
        return W + self.change(), b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear" or torch.is_grad_enabled() or x.shape[:-1].numel() > FEW:
            return super().forward(base, x, *args, **kwargs)
        spectrum = self.transform(nn.functional.pad(x, (0, self.size - x.shape[-1])).to(self.c.dtype))
        rows, columns = self.index // self.size, self.index % self.size
        y = self.c.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, rows, spectrum[..., columns] * (self.scale * self.c))
        return base(x) + y.to(x.dtype)


def cosine(x: Tensor, transpose: bool = False) -> Tensor:
    """x (…, n) times the discrete cosine transform C of order n, or Cᵀ, with C Cᵀ = n·I."""
    i = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    C = torch.cos(torch.pi / len(i) * (i[:, None] + 0.5) * i) * 2**0.5
    C[:, 0] = 1
    return x @ (C.T if transpose else C)


BASES = {"hadamard": transform, "cosine": cosine}


def order_of(basis: str, n: int) -> int:
    """The order of the matrix for rows of n numbers."""
    return length(n) if basis == "hadamard" else n


def budgets(weights: Tensor, n: int, most: int) -> Tensor:
    """AdaAlloc: how many of n coefficients each row gets, in proportion to its weight (rows,) and at most so many."""
    counts = (weights / weights.sum() * n).floor().long()
    open = counts <= most
    counts.clamp_(max=most)
    while rest := n - int(counts.sum()):
        share, over = divmod(rest, int(open.sum()))
        counts[open] += share
        counts[torch.where(counts < most, counts, n).topk(over, largest=False).indices] += 1
        counts.clamp_(max=most)
        open = counts < most
    return counts


def damped(moments: Tensor) -> Tensor:
    return moments + DAMP * moments.diag().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def start(error: Tensor, moments: Tensor | None, n: int, alpha: float, basis: str = "hadamard") -> tuple[Tensor, Tensor]:
    """(flat positions ascending, coefficients) of n entries with F Hᵀ close to E = W − Q (out, in) where the inputs are.

    In a row of E with D = E H, those j with the largest ‖R h_j‖²·D_j² for RᵀR = E[x xᵀ], then least squares of R(E − F Hᵀ)ᵀ.
    `moments` (in, in) is RᵀR; without it every direction of the inputs counts alike.
    """
    out, size = error.shape
    transform, order = BASES[basis], order_of(basis, size)
    M = torch.eye(size, dtype=error.dtype, device=error.device) if moments is None else moments.to(error)
    pad = (0, order - size)
    D = transform(nn.functional.pad(error, pad)) / order
    MH = transform(nn.functional.pad(M, pad))  # (in, order)
    P = transform(nn.functional.pad(MH.T, pad))  # Hᵀ M H
    Q = error @ MH
    counts = budgets(D.norm(dim=1) ** alpha, n, order)
    ranked = (P.diag() * D.square()).argsort(dim=1, descending=True, stable=True)
    chosen = [row[:k].sort().values for row, k in zip(ranked, counts.tolist(), strict=True)]
    ridge = 1e-11 * P.diag().mean()  # what is over `in` coefficients of a row is not determined
    values = [torch.linalg.solve(P[S][:, S] + ridge * torch.eye(len(S), dtype=P.dtype, device=P.device), Q[o, S]) for o, S in enumerate(chosen)]
    return torch.cat([o * order + S for o, S in enumerate(chosen)]), torch.cat(values)


class QWHA(Method):
    """QWHA (Jeon et al. 2025, arXiv 2509.17428; QHFT in the authors' code): ΔW = s·F Hᵀ, F with r·(in + out) entries.

    On a quantised base whose originals were kept (`ts.quantize(model, format, keep=True)`; a recipe does it) the entries are
    chosen by AdaAlloc and their values refined, for the calibration data where there is any; elsewhere they are random and
    zero. `scaling` is s·in·√out of the authors; by default s is theirs for LLaMA's 4096, whatever the layer's size. Biases
    stay (the authors' layer drops them), several adapters add up, c trains in float32. Lengths without a Hadamard matrix here
    are filled up with zeros to the next one that has one. `basis="cosine"` is the paper's baseline with another transform, which
    has to be a product with a matrix.
    """

    method, family, title, paper = "qwha", "spectral", "Quantisation-aware Walsh–Hadamard adaptation", "arXiv:2509.17428"
    works_on = ("linear", "conv", "attention")
    default_lr = 2e-3
    from_original = True
    calibration_optional = True

    rank: Rank = 8
    n_frequency: int | None = Field(None, ge=1, description="entries in each layer; default: as many as LoRA of this rank trains")
    scaling: PositiveFloat | None = None
    basis: Literal["hadamard", "cosine"] = "hadamard"
    alpha: float = Field(1.0, ge=0, description="AdaAlloc: rows get entries in proportion to this power of their error")
    random_loc_seed: Seed = 777

    @property
    def calibrated(self):
        return ("moments",)

    def length(self, site: Site) -> int:
        """The order of the basis over a site's inputs."""
        return order_of(self.basis, site.in_features)

    def scale(self, site: Site) -> float:
        return 4000 / 4096**1.5 if self.scaling is None else self.scaling / (site.in_features * site.out_features**0.5)

    def start(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Positions and coefficients that undo what quantisation did, None where it did nothing or the original is not there."""
        W = site.parameter
        if not isinstance(W, PackedWeight) or W.original is None:
            return None
        error = W.original.double() - W.dequantize().double()
        return start(error, None if site.moments is None else damped(site.moments.double()), self.count(site), self.alpha, self.basis) if error.any() else None

    def digest(self, site):
        site.seen = {"start": self.start(site)}

    def layer(self, site):
        return QWHALayer(self, site)

    def count(self, site):
        return min(self.n_frequency or self.rank * (site.in_features + site.out_features), site.out_features * self.length(site))
