"""SoKA: a sum of Kronecker products, started from the nearest such sum to the weight."""

from math import isqrt, prod
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ..engine.adapter import WeightAdapter
from ..engine.fused import forms, remade
from ..engine.sites import Site, sites
from ..errors import TunesmithError
from .method import Method, Rank, divisor, empty
from .peft_targets import check_paths, exactly, patterned, patterns
from .svd import leading

WINDOW = 64  # singular values that the choice of a rank looks at


def rearranged(W: Tensor, m: int, n: int) -> Tensor:
    """R(W) (mn, pq) of W (mp, nq), with R(A⊗B) = vec(A) vec(B)ᵀ (Van Loan & Pitsianis): row = block, column = place in it."""
    return W.unflatten(1, (n, -1)).unflatten(0, (m, -1)).transpose(1, 2).reshape(m * n, -1)


def kpsvd(W: Tensor, m: int, n: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """(σ (r,), U (r, m, n), V (r, p, q)) of the sum Σ σₖ Uₖ⊗Vₖ of r ≤ `terms` terms nearest to W (mp, nq).

    ‖Uₖ‖ = ‖Vₖ‖ = 1, and the largest entry of each Uₖ is positive.
    """
    U, S, Vh = leading(rearranged(W, m, n), terms)
    return S, U.T.unflatten(1, (m, n)), Vh.unflatten(1, (W.shape[0] // m, W.shape[1] // n))


def energy_rank(energies: Tensor, share: float, total: float | None = None) -> int:
    """The fewest leading terms that hold `share` of the energy, all of them if they do not."""
    energies = energies.double()
    held = energies.cumsum(0) / (energies.sum() if total is None else total)
    return min(int((held < share - 1e-12).sum()) + 1, len(energies))


def elbow(S: Tensor) -> tuple[int, float]:
    """(rank, depth) of the point of the falling curve S that lies deepest below its chord, in units of its height."""
    if len(S) < 3 or S[0] == S[-1]:
        return len(S), 0.0
    S = S.double()
    depth = 1 - torch.linspace(0, 1, len(S), dtype=S.dtype, device=S.device) - (S - S[-1]) / (S[0] - S[-1])
    return int(depth.argmax()) + 1, float(depth.max())


def _norm(t: Tensor) -> float:
    return torch.linalg.vector_norm(t.detach(), dtype=torch.float64).item()


class SoKALayer(WeightAdapter):
    """ΔW = s·(Σ Aₖ⊗Bₖ − Σ A⁰ₖ⊗B⁰ₖ), A (r, m, n), B (r, p, q); with σ (r,), σₖAₖ in the place of Aₖ.

    Written as s·Σ ((Aₖ−A⁰ₖ)⊗Bₖ + A⁰ₖ⊗(Bₖ−B⁰ₖ)), which is exactly zero at the start and loses no digits in bfloat16.
    """

    def __init__(self, config: "SoKA", site: Site):
        super().__init__()
        m, n = config.split(site)
        p, q = site.out_features // m, site.in_features // n
        self.scale, self.starts = config.scale, config.init != "zero"
        source, start = site.gradient if config.init == "gradient" else site.matrix(site.values)[0].detach(), None
        if source is not None and not source.is_meta and (self.starts or config.rank is None):
            source = source.to(torch.promote_types(source.dtype, torch.float32))
            start = kpsvd(source, m, n, config.rank or max(WINDOW, config.max_rank))
            config.rank = config.rank or config.choose(start[0], _norm(source) ** 2)
        if config.rank is None:
            raise TunesmithError(f"soka chooses the number of terms from the weights, and those of {site.path!r} are not here (meta device); set rank")
        r = min(config.rank, m * n, p * q)
        self.A, self.B = empty(r, m, n, like=site.parameter), empty(r, p, q, like=site.parameter)
        self.sigma = empty(r, like=site.parameter) if config.train_sigma else None
        with torch.no_grad():
            for factor in self.parameters():
                factor.zero_()
            if not self.starts:
                self.A.uniform_(-(n**-0.5), n**-0.5)
                if config.train_sigma:
                    self.B.uniform_(-(q**-0.5), q**-0.5)
            elif start:
                S, U, V = (t[:r] for t in start)
                sigma = S / config.scale * (_norm(site.parameter) / _norm(source) if config.init == "gradient" else 1)
                root = torch.ones_like(sigma) if config.train_sigma else sigma.sqrt()
                self.A.copy_(root[:, None, None] * U), self.B.copy_(root[:, None, None] * V)
                if config.train_sigma:
                    self.sigma.copy_(sigma)
        if self.starts:
            self.register_buffer("A0", self._A().detach().clone())
            self.register_buffer("B0", self.B.detach().clone())

    def _A(self) -> Tensor:
        return self.A if self.sigma is None else self.sigma[:, None, None] * self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (R, m, n), B (R, p, q)) with ΔW = Σ Aₖ⊗Bₖ."""
        A, B = self._A(), self.B
        if self.starts:
            A, B = torch.cat([A - self.A0, self.A0]), torch.cat([B, B - self.B0])
        return (A if self.scale == 1 else A * self.scale), B

    def merged(self, W, b):
        A, B = self.factors()
        (m, n), (p, q) = A.shape[1:], B.shape[1:]
        terms = (A.flatten(1).T @ B.flatten(1)).view(m, n, p, q).transpose(1, 2)
        return (W.unflatten(1, (n, q)).unflatten(0, (m, p)) + terms).reshape(W.shape), b

    def products(self, x: Tensor) -> Tensor:
        """Σ (Aₖ⊗Bₖ)x (..., out) of x (..., in) without any Kronecker product: (A⊗B)x = vec(A X Bᵀ), x = vec(X)."""
        A, B = (t.to(x.dtype) for t in self.factors())
        X = x.unflatten(-1, (A.shape[2], B.shape[2]))
        if self._costs()[2]:
            return torch.einsum("rmn,...rnp->...mp", A, torch.einsum("...nq,rpq->...rnp", X, B)).flatten(-2)
        return torch.einsum("...rmq,rpq->...mp", torch.einsum("rmn,...nq->...rmq", A, X), B).flatten(-2)

    def _costs(self) -> tuple[float, int, bool]:
        """Of one term for one token in the cheaper order: multiplications over those of the matrix, numbers in between; B first?"""
        (m, n), (p, q) = self.A.shape[1:], self.B.shape[1:]
        return min((1 / m + 1 / q, n * p, True), (1 / n + 1 / p, m * q, False))

    def _by_token(self, x: Tensor) -> bool:
        """Whether products take fewer multiplications than forming ΔW, and hold no more in between.

        With R terms, T tokens and W of size 1, forming takes R and products R·T·cost; a training step four times as
        many, and the formed one T more for the gradient of the matrix.
        """
        T, R = x.numel() // x.shape[-1], len(self.A) * (2 if self.starts else 1)
        cost, between, _ = self._costs()
        return R * T * between <= prod(self.A.shape[1:] + self.B.shape[1:]) and R * T * cost < R + (T / 4 if torch.is_grad_enabled() else 0)

    def _columns(self, x: Tensor) -> Tensor:
        """The columns x of ΔW, (..., out): column j·q + t of A⊗B is A's j-th ⊗ B's t-th."""
        A, B = self.factors()
        j, t = x // B.shape[2], x % B.shape[2]
        return (A.permute(2, 1, 0)[j] @ B.permute(2, 0, 1)[t]).flatten(-2)

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind == "embedding":
            change = self._columns(x)
        elif base.site.kind == "linear" and self._by_token(x) and not forms(x, base.W):
            change = remade(x, self.products, list(self.parameters()))
        else:
            return super().forward(base, x, *args, **kwargs)
        y = base(x, *args, **kwargs)
        return y + change.to(y.dtype)

    @torch.no_grad()
    def energies(self) -> Tensor:
        """‖Aₖ⊗Bₖ − A⁰ₖ⊗B⁰ₖ‖² of each term's change, (r,)."""
        A, B = (t.double().flatten(1) for t in (self._A(), self.B))
        if not self.starts:
            return A.square().sum(1) * B.square().sum(1)
        A0, B0 = self.A0.double().flatten(1), self.B0.double().flatten(1)
        dA, dB = A - A0, B - B0
        return dA.square().sum(1) * B.square().sum(1) + 2 * (dA * A0).sum(1) * (B * dB).sum(1) + A0.square().sum(1) * dB.square().sum(1)

    @torch.no_grad()
    def drop(self, terms: list[int]) -> None:
        """Put these terms back to where their change is zero."""
        if not self.starts:
            (self.B if self.sigma is None else self.sigma)[terms] = 0
            return
        self.B[terms] = self.B0[terms]
        if self.sigma is None:
            self.A[terms] = self.A0[terms]
        else:
            self.sigma[terms] = self.A0[terms].flatten(1).norm(dim=1)
            self.A[terms] = self.A0[terms] / self.sigma[terms][:, None, None].clamp(min=torch.finfo(self.A.dtype).tiny)


class Pruning:
    """Halfway through training, each layer's weakest terms go back to their start and stay there."""

    def __init__(self, adapters: dict[str, SoKALayer], share: float, total_steps: int):
        self.adapters, self.share, self.at = adapters, share, total_steps // 2
        self.steps, self.weak = 0, {}

    def step(self):
        self.steps += 1
        if self.steps == self.at:
            for path, adapter in self.adapters.items():
                energies, order = adapter.energies().sort(descending=True)
                self.weak[path] = order[energy_rank(energies, 1 - self.share) :].tolist()
        for path, terms in self.weak.items():
            self.adapters[path].drop(terms)

    def state_dict(self):
        return {"steps": self.steps, "weak": self.weak}

    def load_state_dict(self, state):
        self.steps, self.weak = state["steps"], state["weak"]


class SoKA(Method):
    """SoKA (Chong & Qu 2025, arXiv 2506.15251): W' = W + s·(Σₖ Aₖ⊗Bₖ − Σₖ A⁰ₖ⊗B⁰ₖ), Aₖ (m, n), Bₖ (p, q), mp = out, nq = in.

    The start is the Kronecker-product SVD (KPSVD) of W, `init="gradient"` that of the loss's gradient scaled to ‖W‖, and
    `init="zero"` A random, B = 0, as KronA and LoKr do. It is subtracted, so that the base stays as it is. KPSVD is the
    SVD of the rearranged weight (Van Loan & Pitsianis), not of a plain reshape as in one account of the paper.

    Without `rank` each layer has as many terms as the spectrum of its source asks for, at most `max_rank`: by `rule` the
    fewest with the share `energy` of the sum of squares, the elbow of the curve of its first 64 singular values, or the
    smaller of the two; an elbow less than a tenth of the curve's height below its chord counts as none. The authors' code
    is not public, and neither is their choice of thresholds, shapes and learning rate; those here are the library's.
    With one term and `init="zero"` this is LoKr, whose peft files it reads and writes.
    """

    method, family, title, paper = "soka", "kronecker", "Singular value decomposition on Kronecker adaptation", "arXiv:2506.15251"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-4

    rank: Rank | None = Field(None, description="terms at each layer; by default chosen from the layer's spectrum")
    max_rank: Rank = 16
    rule: Literal["energy", "elbow", "both"] = "both"
    energy: float = Field(0.9, gt=0, le=1)
    init: Literal["weight", "gradient", "zero"] = "weight"
    shape: tuple[PositiveInt, PositiveInt] | None = Field(None, description="(m, n) of the A factors; by default the divisors nearest below the roots of out and in")
    scale: PositiveFloat = 1.0
    train_sigma: bool = Field(False, description="train a weight of each term beside its two factors")
    prune: float = Field(0.0, ge=0, lt=1, description="share of each layer's change, in squares, that may go: halfway through training its weakest terms return to their start")

    def split(self, site: Site) -> tuple[int, int]:
        """(m, n), the shape of A. A convolution's kernels stay whole in B."""
        channels = site.parameter.shape[1] if site.kind == "conv" else site.in_features
        if self.shape is None:
            return divisor(site.out_features, isqrt(site.out_features)), divisor(channels, isqrt(site.in_features))
        m, n = self.shape
        if site.out_features % m or channels % n:
            raise TunesmithError(f"soka: shape ({m}, {n}) does not divide {site.path!r}, {site.out_features} outputs and {channels} inputs; m must divide the first, n the second")
        return m, n

    def choose(self, S: Tensor, total: float) -> int:
        """The number of terms that the leading singular values S, of the energy `total` in all, ask for."""
        by_energy, (bend, depth) = energy_rank(S.square(), self.energy, total), elbow(S[:WINDOW])
        rank = by_energy if self.rule == "energy" or depth < 0.1 else bend if self.rule == "elbow" else min(by_energy, bend)
        return min(rank, self.max_rank)

    def select(self, model):
        # a config of its own for each site, to keep the number of terms that is chosen there
        return {path: (site, over if "method" in over else {"rank": self.rank} | over) for path, (site, over) in super().select(model).items()}

    @property
    def calibrated(self):
        return ("gradient",) if self.init == "gradient" else ()

    def layer(self, site):
        return SoKALayer(self, site)

    def count(self, site):
        m, n = self.split(site)
        a, b = m * n, site.out_features // m * (site.in_features // n)
        return min(self.rank or self.max_rank, a, b) * (a + b + self.train_sigma)

    def stage(self, adapters, total_steps):
        own = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, SoKALayer)}
        return Pruning(own, self.prune, total_steps) if self.prune else None

    peft_type = "LOKR"

    def to_peft(self, configs, model):
        by_path = {s.path: s for s in sites(model)}
        if any(c.rank != 1 or c.init != "zero" or c.train_sigma for c in configs.values()):
            raise TunesmithError("peft's LoKr is one Kronecker term with init='zero' and no train_sigma; save this soka adapter with format='tunesmith'")
        splits = {path: c.split(by_path[path]) for path, c in configs.items()}
        sizes = {path: (s.out_features, s.parameter.shape[1] if s.kind == "conv" else s.in_features) for path, s in by_path.items() if path in configs}
        factors = {m for m, _ in splits.values()} | {n for _, n in splits.values()}
        if all(splits[path] == tuple(divisor(size, isqrt(size)) for size in sizes[path]) for path in configs):
            factors = {-1}
        if len(factors) > 1:
            raise TunesmithError("peft's LoKr has one decompose_factor for all layers, which these shapes do not; save this soka adapter with format='tunesmith'")
        r = max((max(out // m, size // n) + 1) // 2 for (m, n), (out, size) in ((splits[p], sizes[p]) for p in configs))  # so large that peft keeps w2 whole
        alphas = {path: c.scale * r for path, c in configs.items()}
        alpha = next(iter(alphas.values()))
        return super().to_peft(configs, model) | {
            "target_modules": exactly(configs, model), "r": r, "alpha": alpha, "alpha_pattern": patterns(alphas, alpha), "rank_pattern": {},
            "decompose_factor": factors.pop(), "decompose_both": False, "use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        if any(key.endswith(".lokr_t2") for key in found):
            raise TunesmithError("the peft adapter uses use_effective_conv2d, which tunesmith does not read")
        first = {key.partition(".lokr_w1")[0] for key in found if ".lokr_w1" in key}
        check_paths(fields, model, ("linear", "conv"), first)
        shapes = {path: _whole({key[len(path) + 1 :]: t for key, t in found.items() if key.startswith(f"{path}.lokr_w1")}, "lokr_w1").shape for path in first}
        r, alpha = fields.get("r", 8), fields.get("alpha", 8)
        scales = {p: patterned(fields.get("alpha_pattern"), p, alpha) / patterned(fields.get("rank_pattern"), p, r) for p in first}
        return cls(rank=1, init="zero", targets=sorted(first)), {p: {"shape": tuple(shapes[p]), "scale": scales[p]} for p in first}

    def peft_tensors(self, site, own):
        w2 = own["B"][0]
        return {"lokr_w1": own["A"][0], "lokr_w2": w2.view(len(w2), -1, *site.parameter.shape[2:]) if site.kind == "conv" else w2}

    def own_tensors(self, site, theirs):
        w1, w2 = _whole(theirs, "lokr_w1"), _whole(theirs, "lokr_w2")
        return {key: t.flatten(1)[None] for key, t in (("A", w1), ("B", w2)) if t is not None} | {k: t for k, t in theirs.items() if not k.startswith("lokr_w")}


def _whole(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """One of peft's factors, which may be stored as a product of two."""
    if name in tensors:
        return tensors[name]
    a, b = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
    return None if a is None or b is None else a @ b
