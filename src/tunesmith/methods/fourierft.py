"""FourierFT: a few coefficients of the weight change's two-dimensional spectrum."""

import functools
import re
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.fused import forms, spectral_linear
from ..engine.sites import Site, sites
from ..errors import TunesmithError
from .method import Method, Seed, empty
from .peft_targets import check_paths, exactly

ALPHA = 150.0


def pattern(counts: dict[str, int], otherwise: int) -> dict[str, int]:
    """peft's n_frequency_pattern: the first of its sorted keys that is the end of a path holds, or else the one that is the path."""
    plain = {path: n for path, n in counts.items() if n != otherwise}

    def found(path):
        return plain.get(next((key for key in sorted(plain) if re.match(rf".*\.{key}$", path)), path), otherwise)

    if all(found(path) == n for path, n in counts.items()):
        return plain
    parts = {path: path.rpartition(".") for path in counts}
    return {rf"(?<=^{re.escape(top)}\.){re.escape(leaf)}" if top else leaf: counts[path] for path, (top, _, leaf) in parts.items()}


@functools.lru_cache(64)
def entries(size: int, n: int, seed: int) -> Tensor:
    """The n entries of a spectrum of that size, row by row; every layer of one size has the same ones."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n].clone()


class FourierFTLayer(WeightAdapter):
    """y = base(x) + α·Re(ifft2 F) x, F (out, in) zero but for the spectrum (n,) at fixed entries.

    For few rows of x, or few entries, the change of the weight is not formed on a linear layer: the inverse transform over both
    axes is one of x and one of y with the sparse F between them. For one row of x, forward and backward, that is
    7.5·in·log₂ in + 5·out·log₂ out + 12n operations; forming the matrix takes 2·out·in for its gradient, and three transforms of
    5·out·in·log₂(out·in) however many the rows. But those run near the machine's full speed and the 12n, here and there in
    memory, do not: where n times the rows exceeds the matrix's entries, forming it is the faster one (measured on two CPUs).
    """

    def __init__(self, config: "FourierFT", site: Site):
        super().__init__()
        self.shape, self.scaling = site.shape, config.alpha(site)
        n = config.count(site)
        self.spectrum = empty(n, like=site.parameter)
        nn.init.normal_(self.spectrum) if config.init == "normal" else nn.init.zeros_(self.spectrum)
        where = entries(site.out_features * site.in_features, n, config.random_loc_seed)
        where = where if site.parameter.is_meta else where.to(site.parameter.device)
        self.register_buffer("rows", where // site.in_features, persistent=False)
        self.register_buffer("columns", where % site.in_features, persistent=False)

    def merged(self, W, b):
        F = self.spectrum.new_zeros(self.shape).index_put((self.rows, self.columns), self.spectrum)
        return W + self.scaling * torch.fft.ifft2(F).real, b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear" or forms(x, base.W) or len(self.spectrum) * x.shape[:-1].numel() > self.shape[0] * self.shape[1]:
            return super().forward(base, x, *args, **kwargs)
        return base(x, *args, **kwargs) + spectral_linear(x, self.spectrum, self.rows, self.columns, self.shape[0], self.scaling)


class FourierFT(Method):
    """FourierFT (Gao et al. 2024, arXiv 2405.03003, eq. 2–4): W + α·Re(ifft2 F), F with n trained entries (algorithm 1).

    The spectrum starts from N(0, 1), as in the paper and Hugging Face peft, so that the first output is not the base's;
    `init="zeros"` starts from the base. The change's entries are then of the size α·√(n/2)/(out·in), which the paper's α
    make small in models as wide as its own: below RoBERTa-base's 768 × 768 the default shrinks with the layer, so that
    they are as small there. A layer with fewer than `n_frequency` entries trains them all. 24,000 numbers for n = 1000 on
    the queries and values of RoBERTa-base, 64,000 for LLaMA2-7B.
    """

    method, family, title, paper = "fourierft", "spectral", "Fourier-transform fine-tuning", "arXiv:2405.03003"
    works_on = ("linear", "conv", "attention")
    identity = False
    default_lr = 5e-2

    n_frequency: PositiveInt = 1000
    scaling: PositiveFloat | None = Field(None, description="α; default: 150, in layers smaller than 768 × 768 so much less; the paper has 300 for LLaMA and ViT")
    random_loc_seed: Seed = Field(777, description="the seed of the entries")
    init: Literal["normal", "zeros"] = "normal"

    def alpha(self, site: Site) -> float:
        return self.scaling or ALPHA * min(1.0, site.out_features * site.in_features / 768**2)

    def layer(self, site):
        return FourierFTLayer(self, site)

    def count(self, site):
        return min(self.n_frequency, site.out_features * site.in_features)

    peft_type = "FOURIERFT"

    def to_peft(self, configs, model):
        if len({(c.scaling, c.random_loc_seed) for c in configs.values()}) > 1:
            raise TunesmithError("peft's FourierFT has one scaling and random_loc_seed for all layers; save this adapter with format='tunesmith'")
        common, places = next(iter(configs.values())), [s for s in sites(model) if s.path in configs]
        counts = {s.path: configs[s.path].count(s) for s in places}
        n = max(counts.values())
        return {
            "target_modules": exactly(configs, model), "n_frequency": n, "n_frequency_pattern": pattern(counts, n),
            "scaling": common.scaling or ALPHA, "random_loc_seed": common.random_loc_seed, "init_weights": common.init == "zeros", "bias": "none",
            "fan_in_fan_out": any(s.transposed for s in places),
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        if fields.get("bias", "none") != "none":
            raise TunesmithError(f"the peft adapter trains biases beside FourierFT (bias={fields['bias']!r}), which tunesmith does not read")
        spectra = {key.removesuffix(".fourierft_spectrum"): t for key, t in found.items() if key.endswith(".fourierft_spectrum")}
        check_paths(fields, model, ("linear",), set(spectra))
        config = cls(
            n_frequency=fields.get("n_frequency", 1000), scaling=fields.get("scaling", ALPHA), random_loc_seed=fields.get("random_loc_seed", 777),
            init="zeros" if fields.get("init_weights") else "normal", targets=sorted(spectra),
        )  # fmt: skip
        return config, {path: {} if len(t) == config.n_frequency else {"n_frequency": len(t)} for path, t in spectra.items()}

    def peft_tensors(self, site, own):
        if site.kind != "linear":
            raise TunesmithError(f"peft's FourierFT acts on linear layers alone, not on {site.path!r}; save this adapter with format='tunesmith'")
        return {"fourierft_spectrum": own["spectrum"] * (self.alpha(site) / (self.scaling or ALPHA))}

    def own_tensors(self, site, theirs):
        return {key.removeprefix("fourierft_"): t for key, t in theirs.items()}
