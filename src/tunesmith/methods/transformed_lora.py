"""Transformed LoRA: the weight times a tensor-ring matrix near I, plus a tensor ring or LoRA."""

import functools
import re
from math import isqrt, prod
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.fused import lowrank_linear, merged_linear
from ..engine.sites import Site, Targets, sites
from ..errors import TunesmithError
from .method import Method, Rank, divisor, empty


@functools.cache
def balanced(size: int, order: int) -> tuple[int, ...]:
    """Up to `order` factors ≥ 2 of a size, those of the least sum, ascending; a prime is its own only factor."""
    divisors = [d for d in range(2, isqrt(size) + 1) if size % d == 0] if order > 1 else []
    return min((tuple(sorted((d, *balanced(size // d, order - 1)))) for d in divisors), key=sum, default=(size,))


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def ring_matrix(cores: list[Tensor]) -> Tensor:
    """T[i, j] = tr(A¹[i₁, j₁] ⋯ Aᴰ[i_D, j_D]), Aᵈ (I_d, I_d, R, R), core 1 the fastest index of i and j."""
    R = cores[0].shape[-1]
    left = eye(R, cores[0])[None, None]
    for core in cores[:-1]:
        left = torch.einsum("ijab,klbc->kiljac", left, core).reshape(len(left) * len(core), -1, R, R)
    return torch.einsum("ijab,klba->kilj", left, cores[-1]).reshape(len(left) * len(cores[-1]), -1)


def ring_vectors(cores: list[Tensor]) -> Tensor:
    """B¹[i₁] ⋯ Bᴰ[i_D] for every i, (I, R, R), Bᵈ (I_d, R, R), core 1 the fastest index."""
    return functools.reduce(lambda left, core: torch.einsum("iab,kbc->kiac", left, core).flatten(0, 1), cores)


def times(x: Tensor, D: Tensor) -> Tensor:
    """x D along the last axis of x, D a matrix, the blocks (n, b, b) on its diagonal, or its diagonal itself."""
    if D.dim() == 3:
        return torch.einsum("...nb,nbc->...nc", x.unflatten(-1, (len(D), -1)), D).flatten(-2)
    return x @ D if D.dim() == 2 else x * D


class TransformedLoRALayer(WeightAdapter):
    """y = W (T x) + Δ x + b.

    T is trained as `E`: what each core of a ring exceeds I/R by, the entries above the diagonal of the skew matrices
    that rotations are made from, or what a diagonal exceeds 1 by. Δ is B A, its factors trained or made from ring cores.
    """

    def __init__(self, config: "TransformedLoRA", site: Site):
        super().__init__()
        new, (out, size), ins = functools.partial(empty, like=site.parameter), site.shape, config.ins(site)
        self.transform = config.transform if ins or config.transform != "ring" else "none"
        self.residual, self.block, self.weight = config.residual, config.block(site), (config.regularizer, config.regularization)
        self.E, self.A, self.B = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        if self.transform == "ring":
            self.E.extend(new(n, n, config.transform_rank, config.transform_rank) for n in ins)
            self._start(config.init)
        elif self.transform != "none":
            shape = (size // self.block, self.block * (self.block - 1) // 2) if self.transform == "rotation" else (size,)
            self.E.append(nn.init.zeros_(new(*shape)))
        if self.residual == "lora":
            self.A.append(nn.init.kaiming_uniform_(new(config.rank, size), a=5**0.5))
            self.B.append(new(out, config.rank))
        elif self.residual == "ring":
            self.A.extend(new(n, config.rank, config.rank) for n in ins or (size,))
            self.B.extend(new(n, config.rank, config.rank) for n in config.outs(site))
            for core in (*self.A, *self.B):
                nn.init.normal_(core, std=1 / (len(core) * config.rank**0.5))
        for first in self.B[:1]:
            nn.init.zeros_(first)

    @torch.no_grad()
    def _start(self, init: str) -> None:
        """Aᵈ = I ⊗ Mᵈ with tr(M¹ ⋯ Mᴰ) = 1, so that T = I; Mᵈ = 11ᵀ/R in Proposition 1, with noise where it is broken."""
        R = self.E[0].shape[-1]
        M = [(1 + (0.3 if init == "identity_broken" else 0) * torch.randn_like(core[0, 0])) / R for core in self.E]
        M[-1] /= functools.reduce(torch.matmul, M).trace()
        for core, m in zip(self.E, M, strict=True):
            core.copy_(eye(len(core), core)[..., None, None] * (m - 1 / R))
            if init == "prop1_noise":
                core.add_(torch.randn_like(core), alpha=1e-3)

    def cores(self) -> list[Tensor]:
        return [E + eye(len(E), E)[..., None, None] / E.shape[-1] for E in self.E]

    def change(self) -> Tensor:
        """T − I, as `times` takes it."""
        if self.transform == "ring":
            T = ring_matrix(self.cores())
            return T - eye(len(T), T)
        (E,) = self.E
        if self.transform == "diagonal":
            return E
        K = E.new_zeros(len(E), self.block, self.block)
        i, j = torch.triu_indices(self.block, self.block, 1, device=E.device)
        K[:, i, j] = E
        K = K - K.mT
        return -2 * torch.linalg.solve(K + eye(self.block, K), K)  # Cayley: (I + K)⁻¹(I − K) − I

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with Δ = B A."""
        if self.residual == "lora":
            return self.A[0], self.B[0]
        return ring_vectors(list(self.A)).mT.flatten(1).T, ring_vectors(list(self.B)).flatten(1)

    def merged(self, W, b):
        if self.transform != "none":
            D = self.change()
            W = W.to(D.dtype)
            W = torch.addmm(W, W, D) if D.dim() == 2 else W + times(W, D)
        if self.residual != "none":
            A, B = self.factors()
            W = torch.addmm(W.to(A.dtype), B, A)
        return W, b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear" or not base.plain or not self._by_tokens(x.numel() // x.shape[-1], *base.site.shape):
            return super().forward(base, x, *args, **kwargs)
        t = x  # T x, made as x + (T − I) x: in half precision T would lose what it differs from I by
        if self.transform == "ring":
            t = x + merged_linear(x, base.W, None, lambda W, b: (self.change(), None), list(self.E))
        elif self.transform != "none":
            D = self.change().to(x.dtype)
            t = x + times(x, D if D.dim() == 1 else D.mT)
        return base(t) if self.residual == "none" else lowrank_linear(t, base.W, base.b, *self.factors(), 1.0, None if t is x else x)

    def _by_tokens(self, count: int, out: int, size: int) -> bool:
        """Whether T x is cheaper than W T: count·in² products against out·in², three times each where there is a
        backward, which for W T also needs the count·out·in of the gradient of a weight."""
        if self.transform != "ring":
            return True
        return count * (3 * size - out) < 3 * out * size if torch.is_grad_enabled() else count < out

    def penalty(self) -> Tensor | None:
        """λ·R of the ring's cores, or None."""
        regularizer, weight = self.weight
        if not weight or self.transform != "ring":
            return None
        if regularizer == "identity":  # Σ over slices r, r' of ‖A[:, :, r, r'] − I/R‖
            return weight * sum(torch.linalg.vector_norm(E, dim=(0, 1)).sum() for E in self.E)
        gaps = [torch.einsum("ilab,jlcd->ijabcd", A, A) - eye(len(A), A)[..., None, None, None, None] / A.shape[-1] ** 2 for A in self.cores()]
        return weight * sum(torch.linalg.vector_norm(gap, dim=(2, 3, 4, 5)).sum() for gap in gaps)


class TransformedLoRA(Method):
    """TLoRA (Tao et al. 2025, arXiv 2501.08727, section 3): y = (W T + Δ) x + b, T a tensor-ring matrix, Δ a tensor ring.

    `transform`: `ring` (with `transform_rank=1` a Kronecker product), block-diagonal `rotation` as in OFT, `diagonal` as
    in DoRA, or `none`. `residual`: `ring`, `lora` (the paper's TLoRA*) or `none`. So (none, lora) is LoRA, (diagonal,
    lora) the paper's reading of DoRA, (none, ring) a low-rank change in tensor-ring form. A ring leaves T = I where the
    input size is prime. By default it acts on the projections of attention, as in the paper. Weight decay pulls T to I.

    As in the paper, and unlike the authors' code, core 1 is the fastest index (their cores are these in reverse order,
    each with its rank axes swapped), Δ has no scale 1/√r, and the deviation of its cores' start is 1/(I_d √R). The
    paper's start of T, `init="prop1"`, has all slices of a core alike, which they stay for ever, R² of them no better
    than one; `identity_broken` is another T = I with slices that differ; `prop1_noise` is near T = I. The orthogonal
    regulariser's target is δ_ij·1/R², 0 at the start, where the paper prints I/R for every i, j.
    """

    method, family, title, paper = "transformed-lora", "multiplicative", "Transformed low-rank adaptation", "arXiv:2501.08727"
    works_on = ("linear", "conv", "attention")
    default_lr = 1e-3

    targets: Targets = "default"
    transform: Literal["ring", "diagonal", "rotation", "none"] = "ring"
    residual: Literal["ring", "lora", "none"] = "ring"
    transform_rank: Rank = Field(2, description="R of the ring T")
    rank: Rank = Field(6, description="rank of the residual's ring or of LoRA")
    order: PositiveInt = Field(3, le=16, description="factors that a size is split into where none are given")
    in_factors: dict[int, list[int]] = Field({}, description="input size → its factors")
    out_factors: dict[int, list[int]] = Field({}, description="output size → its factors")
    block_size: PositiveInt = Field(32, description="blocks of a rotation are of the largest size up to this that divides the input's")
    init: Literal["identity_broken", "prop1", "prop1_noise"] = "identity_broken"
    regularizer: Literal["identity", "orthogonal"] = "identity"
    regularization: NonNegativeFloat = Field(0.0, description="weight λ of the ring T's regulariser in the loss")

    @field_validator("in_factors", "out_factors")
    @classmethod
    def _multiply(cls, given):
        if wrong := [size for size, factors in given.items() if not factors or min(factors) < 1 or prod(factors) != size]:
            raise ValueError(f"the factors of {wrong[0]} must be positive and multiply to it")
        return given

    @field_validator("regularization")
    @classmethod
    def _of_a_ring(cls, value, info: ValidationInfo):
        if value and info.data.get("transform", "ring") != "ring":
            raise ValueError("only transform='ring' has cores to regularise")
        return value

    def ins(self, site: Site) -> tuple[int, ...]:
        """The input's factors; none for a prime, unless they are given."""
        found = tuple(self.in_factors.get(site.in_features, balanced(site.in_features, self.order)))
        return () if len(found) == 1 < self.order and site.in_features not in self.in_factors else found

    def outs(self, site: Site) -> tuple[int, ...]:
        return tuple(self.out_factors.get(site.out_features, balanced(site.out_features, self.order)))

    def block(self, site: Site) -> int:
        return divisor(site.in_features, self.block_size)

    def default(self, model):
        return [s for s in sites(model) if s.kind in ("linear", "attention") and re.search("att(entio)?n", s.path, re.IGNORECASE)]

    def layer(self, site):
        if not self.count(site):
            raise TunesmithError(f"{self.method} has nothing to train at {site.path!r}: residual='none', and T = I for {site.in_features} inputs")
        return TransformedLoRALayer(self, site)

    def count(self, site):
        ins, (out, size) = self.ins(site), site.shape
        transform = {"ring": self.transform_rank**2 * sum(n * n for n in ins), "diagonal": size, "rotation": size * (self.block(site) - 1) // 2}
        residual = {"ring": self.rank**2 * sum((ins or (size,)) + self.outs(site)), "lora": self.rank * (size + out)}
        return transform.get(self.transform, 0) + residual.get(self.residual, 0)

    def auxiliary_loss(self, adapters):
        terms = [term for a in adapters.values() if isinstance(a, TransformedLoRALayer) and (term := a.penalty()) is not None]
        return sum(term.to(terms[0].device) for term in terms) if terms else None
