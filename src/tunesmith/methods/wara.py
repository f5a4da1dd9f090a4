"""WaRA: low-rank adaptation in a wavelet domain, of the features or of the grid of tokens; and WaveFT, sparse in it."""

from math import isqrt
from typing import Literal

import pywt
import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import Adapter, WeightAdapter
from ..engine.fused import forms, remade
from ..engine.sites import Site, float_dtype
from ..errors import TunesmithError, nearest
from .lora import LoRALayer
from .method import Method, Rank, empty
from .svd import leading

Pair = tuple[list[float], list[float]]  # low-pass and high-pass filter
PREFIX = 16  # at most so many class and register tokens before a grid


def filters(wavelet: str) -> tuple[Pair, Pair]:
    """(analysis, synthesis) filters, both so that `spread` with them gives the rows of the transform and the columns of its inverse."""
    w = pywt.Wavelet(wavelet)
    return (w.dec_lo[::-1], w.dec_hi[::-1]), (w.rec_lo, w.rec_hi)


def spread(c: Tensor, f: list[float]) -> Tensor:
    """c (..., h) at every other place, filtered round the circle (periodization): (..., 2h)."""
    z = torch.stack([c, torch.zeros_like(c)], -1).flatten(-2)
    return sum(a * z.roll(k + 1 - len(f) // 2, -1) for k, a in enumerate(f))


def collect(x: Tensor, f: list[float]) -> Tensor:
    """The transpose of `spread`: x (..., 2h) → (..., h)."""
    return sum(a * x.roll(len(f) // 2 - 1 - k, -1) for k, a in enumerate(f))[..., ::2]


def in_bands(rows: Tensor, pair: Pair, levels: int) -> Tensor:
    """Rows (r, h) of coefficients put into each of the 2^levels bands in turn: (bands·r, bands·h)."""
    rows = rows[None]
    for _ in range(levels):
        rows = torch.cat([spread(rows, f) for f in pair])
    return rows.flatten(0, 1)


def matrix(size: int, pair: Pair, like: Tensor) -> Tensor:
    """The one-level transform, (size, size), low band first; with synthesis filters the transpose of its inverse."""
    eye = torch.eye(size // 2, dtype=like.dtype, device=like.device)
    return torch.cat([spread(eye, f) for f in pair])


class BandsLayer(LoRALayer):
    """ΔW = s·F⁻¹ diag(BA, …, BA) F over the bands of the features, A (r, in/bands), B (out/bands, r).

    A low-rank change of rank bands·r with the transformed factors: transforming those costs 2r vectors a step, transforming
    inputs and outputs one for each token.
    """

    dropout, bias = 0.0, None

    def __init__(self, config: "WaRA", site: Site):
        WeightAdapter.__init__(self)
        self.scale, self.levels, (self.analysis, self.synthesis) = config.scaling, config.levels, filters(config.wavelet)
        self.create(config, site, *config.band_sizes(site))

    def create(self, config, site, out, size):
        self.A, self.B = empty(config.rank, size, like=site.parameter), empty(out, config.rank, like=site.parameter)
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nn.init.zeros_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (bands·r, in), B (out, bands·r)) with ΔW = s·B A."""
        return in_bands(self.A, self.analysis, self.levels), in_bands(self.B.T, self.synthesis, self.levels).T


class TinyLayer(BandsLayer):
    """B and A are fixed, UΣ½ and Σ½Vᵀ of the low band of W; what is trained stands between: diag(m), or Σ vᵢPᵢ with fixed random Pᵢ."""

    def create(self, config, site, out, size):
        r, u = min(config.rank, out, size), config.coefficients
        W = site.matrix(site.values)[0].detach().to(float_dtype(site.parameter))
        for _ in range(self.levels):
            W = collect(collect(W, self.synthesis[0]).T, self.analysis[0]).T
        if W.is_meta:
            U, S, Vh = W.new_empty(out, r), W.new_empty(r), W.new_empty(r, size)
        else:
            U, S, Vh = leading(W, r)
        self.m = empty(u or r, like=site.parameter)
        nn.init.zeros_(self.m)
        P = torch.randn(u, r, r, generator=torch.Generator().manual_seed(config.seed)) / r**0.5 if u else torch.eye(r)[:, :, None] * torch.eye(r)[:, None]
        # made anew from the base and the seed at loading
        self.register_buffer("P", P.to(W), persistent=False)
        self.register_buffer("A", in_bands(S.sqrt()[:, None] * Vh, self.analysis, self.levels), persistent=False)
        self.register_buffer("B", in_bands((U * S.sqrt()).T, self.synthesis, self.levels).T.contiguous(), persistent=False)

    def factors(self):
        R = torch.einsum("u,urs->rs", self.m, self.P)
        return self.A, (self.B.unflatten(1, (2**self.levels, -1)) @ R).flatten(1)


class GridLayer(Adapter):
    """ΔY = s·IDWT2(g·f(A DWT2(X)))·Bᵀ over the H×W grid of the last H·W tokens; class and register tokens before it get none.

    The channels' map commutes with the grid's transform, so that only the r channels between A and B are transformed.
    g holds a gain for each band: coarsest low-low, then of each level low-high, high-low, high-high (rows, columns).
    """

    why_not = "the update mixes the tokens of a grid, which no change of the weights does; keep it attached, or train version='v1'"

    def __init__(self, config: "WaRA", site: Site):
        super().__init__()
        if site.kind != "linear":
            raise TunesmithError(f"wara v2 cannot act on {site.path!r}, inside nn.MultiheadAttention, where it does not see the tokens; use version='v1' there")
        self.path, self.scale, self.grid, self.levels = site.path, config.scaling, config.grid, config.levels
        self.analysis, self.synthesis = filters(config.wavelet)
        self.act = F.gelu if config.activation == "gelu" else None
        self.A, self.B = empty(config.rank, site.in_features, like=site.parameter), empty(site.out_features, config.rank, like=site.parameter)
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nn.init.zeros_(self.B)
        self.gain, details = None, 3 * config.levels
        if config.trains_gains:
            self.gain = nn.Parameter(torch.ones(1 + details, dtype=self.A.dtype, device=self.A.device))
        # None: with all gains 1 and nothing between A and B the transform cancels
        self.fixed = [1.0] + [0.0] * details if config.bands == "low" else [1.0] * (1 + details) if self.act else None

    def forward(self, base, x, *args, **kwargs):
        y, u = base(x, *args, **kwargs), F.linear(x, self.A.to(x.dtype))
        if x.dim() == 4:  # a grid already
            z = self.change(u)
        else:
            H, W = self._size(x)
            z = self.change(u[:, x.shape[1] - H * W :].unflatten(1, (H, W))).flatten(1, 2)
            z = F.pad(z, (0, 0, x.shape[1] - H * W, 0))
        return y + self.scale * F.linear(z.to(y.dtype), self.B.to(y.dtype))

    def _size(self, x: Tensor) -> tuple[int, int]:
        if x.dim() != 3:
            raise TunesmithError(f"wara v2 at {self.path!r} needs tokens, (batch, tokens, features), and met {tuple(x.shape)}; leave this layer out of targets")
        H, W = self.grid or (isqrt(x.shape[1]),) * 2
        if not 0 <= x.shape[1] - H * W <= PREFIX:
            raise TunesmithError(f"wara v2 at {self.path!r} met {x.shape[1]} tokens, which are no grid of {H}×{W} after at most {PREFIX} others; set grid")
        return H, W

    def change(self, u: Tensor) -> Tensor:
        """u (batch, H, W, r) with its bands weighted."""
        gain = self.fixed if self.gain is None else self.gain
        if gain is None:
            return u
        with torch.autocast(u.device.type, enabled=False):
            return self.weighted(u.movedim(-1, 1).to(self.A.dtype), gain).movedim(1, -1)

    def weighted(self, u: Tensor, gain: Tensor | list[float]) -> Tensor:
        H, W = u.shape[-2:]
        if H % 2 or W % 2:
            u = F.pad(u, (0, W % 2, 0, H % 2), mode="replicate")
        (rows, columns), (back, across) = ([matrix(n, pair, u) for n in u.shape[-2:]] for pair in (self.analysis, self.synthesis))
        (ll, lh), (hl, hh) = (half.chunk(2, -1) for half in (rows @ u @ columns.T).chunk(2, -2))
        act = self.act or (lambda c: c)
        ll = self.weighted(ll, gain[:-3]) if len(gain) > 4 else gain[0] * act(ll)
        low, high = torch.cat([ll, gain[-3] * act(lh)], -1), torch.cat([gain[-2] * act(hl), gain[-1] * act(hh)], -1)
        return (back.T @ torch.cat([low, high], -2) @ across)[..., :H, :W]


class SparseLayer(WeightAdapter):
    """ΔW = s·S_out C S_inᵀ, C with n trained coefficients at random places and S the inverse one-level transform.

    As in WaveFT's code the transform is not periodic, the coefficients lie in the middle of a grid that is larger by the
    filter's length less 2, and its top right quarter is high along the outputs, its bottom left along the inputs.
    """

    def __init__(self, config: "WaRA", site: Site):
        super().__init__()
        self.scale, self.filters = config.scaling, filters(config.wavelet)[1]
        extra = len(self.filters[0]) - 2
        self.shape, self.grid = site.shape, tuple(n + extra + (n + extra) % 2 for n in site.shape)
        (out, size), (rows, columns) = self.shape, self.grid
        self.spectrum = empty(config.count(site), like=site.parameter)
        nn.init.zeros_(self.spectrum)
        place = torch.randperm(out * size, generator=torch.Generator().manual_seed(config.seed))[: len(self.spectrum)]
        i, j = place // size + (rows - out) // 2, place % size + (columns - size) // 2
        row, column = i % (rows // 2) + rows // 2 * (j >= columns // 2), j % (columns // 2) + columns // 2 * (i >= rows // 2)
        # made anew from the seed at loading
        self.register_buffer("row", row.to(site.parameter.device), persistent=False)
        self.register_buffer("column", column.to(site.parameter.device), persistent=False)

    def _kernel(self) -> Tensor:
        return self.spectrum.new_tensor(self.filters)[:, None]

    def synthesis(self, c: Tensor, size: int) -> Tensor:
        """S c (..., size) of coefficients c, low band first."""
        y = F.conv_transpose1d(c.reshape(-1, 2, c.shape[-1] // 2), self._kernel(), stride=2, padding=len(self.filters[0]) - 2)
        return y[:, 0, :size].view(*c.shape[:-1], size)

    def analysis(self, x: Tensor) -> Tensor:
        """Sᵀ x, the coefficients' part in x (..., size)."""
        x = F.pad(x, (0, x.shape[-1] % 2))
        y = F.conv1d(x.reshape(-1, 1, x.shape[-1]), self._kernel(), stride=2, padding=len(self.filters[0]) - 2)
        return y.view(*x.shape[:-1], -1)

    def merged(self, W, b):
        C = W.new_zeros(self.grid, dtype=self.spectrum.dtype).index_put((self.row, self.column), self.spectrum)
        out, size = self.shape
        return W + self.scale * self.synthesis(self.synthesis(C, size).T, out).T, b

    def change(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            c = self.analysis(x.to(self.spectrum.dtype))[..., self.column] * (self.scale * self.spectrum)
            c = c.new_zeros(*c.shape[:-1], self.grid[0]).index_add(-1, self.row, c)
            return self.synthesis(c, self.shape[0]).to(x.dtype)

    def forward(self, base, x, *args, **kwargs):
        if forms(x, base.W):
            return super().forward(base, x, *args, **kwargs)
        y = base(x, *args, **kwargs)
        return y + remade(x, self.change, [self.spectrum]).to(y.dtype)


LAYERS = {"v1": BandsLayer, "v2": GridLayer, "tiny": TinyLayer, "waveft": SparseLayer}


class WaRA(Method):
    """WaRA (Heidari et al. 2025, arXiv 2506.24092), whose first and second version differ, and its sibling WaveFT.

    `v1`: the wavelet coefficients of a layer's input (features × tokens) go through one BA for all bands and back:
    since all bands share it, the tokens' transform cancels, and W' = W + s·F⁻¹ diag(BA, BA) F for the transform F of the features.
    `v2`: the patch tokens of an image as a grid, its bands through one BA; each band has a gain, without which this is
    LoRA on the patches. Gains, as `activation` and `bands`, are the library's. `tiny`: v1 with A and B fixed from the
    SVD of W's low band and only `coefficients` numbers trained between them (by default the `rank` of a diagonal).
    `waveft`: n_frequency coefficients of W's own transform (Bilican et al. 2025, arXiv 2505.12532).

    The authors' code is not public: start, scale and sizes are the library's. With `levels` > 1, v1 and tiny split all
    bands again, so that they stay of one size, v2 the low-low band.
    """

    method, family, title, paper = "wara", "wavelet", "Wavelet low-rank adaptation", "arXiv:2506.24092"
    works_on = ("linear", "attention")
    default_lr = 1e-3

    version: Literal["v1", "v2", "tiny", "waveft"] = "v1"
    rank: Rank = 8
    scale: PositiveFloat | None = Field(None, description="factor of the change; by default 1, with waveft 25")
    wavelet: str = Field("haar", description="a discrete wavelet of PyWavelets, such as haar, db2, bior2.2")
    levels: PositiveInt = Field(1, le=16)
    grid: tuple[PositiveInt, PositiveInt] | None = Field(None, description="v2: rows and columns of patches; by default by the model's config, or a square")
    gains: bool = Field(True, description="v2: train a gain for each band")
    bands: Literal["all", "low"] = Field("all", description="v2: which bands the update has")
    activation: Literal["none", "gelu"] = Field("none", description="v2: between A and B")
    coefficients: PositiveInt | None = Field(None, description="tiny: trained numbers, each the weight of a random matrix between the factors")
    n_frequency: PositiveInt = Field(2592, description="waveft: trained coefficients, at most the layer's size")
    seed: int = Field(777, ge=0, description="of the places of waveft's coefficients and of tiny's random matrices")

    @field_validator("wavelet")
    @classmethod
    def _known(cls, name):
        if name not in (known := pywt.wavelist(kind="discrete")):
            raise ValueError(f"not a discrete wavelet of PyWavelets{nearest(name, known)}")
        return name

    @property
    def scaling(self) -> float:
        return self.scale or (25.0 if self.version == "waveft" else 1.0)

    @property
    def trains_gains(self) -> bool:
        return self.gains and self.bands == "all"

    def band_sizes(self, site: Site) -> tuple[int, int]:
        """(out, in) of one band of the features."""
        bands = 2**self.levels
        if site.out_features % bands or site.in_features % bands:
            raise TunesmithError(f"wara cannot halve the {site.out_features} outputs and {site.in_features} inputs of {site.path!r} {self.levels} times; leave the layer out of targets")
        return site.out_features // bands, site.in_features // bands

    def select(self, model):
        found, grid = super().select(model), self.grid or image_grid(model)
        if self.version != "v2" or grid is None:
            return found
        return {path: (site, over if "method" in over else {"grid": grid} | over) for path, (site, over) in found.items()}

    def layer(self, site):
        return LAYERS[self.version](self, site)

    def count(self, site):
        out, size = site.out_features, site.in_features
        if self.version == "waveft":
            return min(self.n_frequency, out * size)
        if self.version == "v2":
            return self.rank * (out + size) + (3 * self.levels + 1) * self.trains_gains
        out, size = self.band_sizes(site)
        return self.rank * (out + size) if self.version == "v1" else self.coefficients or min(self.rank, out, size)


def image_grid(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches, where the model's config says them."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not image or not patch:
        return None
    (H, W), (h, w) = ((n, n) if isinstance(n, int) else tuple(n) for n in (image, patch))
    return H // h, W // w
