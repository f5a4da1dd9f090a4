"""FacT: one pair of factors for all layers of a model, and a small core of each layer between them."""

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, width
from ..errors import TunesmithError
from .lora import LoRALayer
from .method import Dropout, Method, Rank, empty


class Factors(nn.Module):
    """U (r, d) and V (d, r) of all layers; in the Tucker form also the core C (r, r, r) and P (r, slices), a column for each block of d × d."""

    def __init__(self, config: "FacT", like: Tensor):
        super().__init__()
        r, d = config.rank, config.width
        self.U, self.V = empty(r, d, like=like), empty(d, r, like=like)
        nn.init.kaiming_uniform_(self.U, a=5**0.5)
        nn.init.zeros_(self.V)
        if config.slices:
            self.C, self.P = empty(r, r, r, like=like), empty(r, config.slices, like=like)
            nn.init.xavier_uniform_(self.C), nn.init.xavier_uniform_(self.P)


class FacTLayer(LoRALayer):
    """ΔW = s·(I_m ⊗ V) Σ (I_n ⊗ U), W (out, in) of m × n blocks of d × d, the last ones cut off where they do not fit; Σ (m·r, n·r).

    In the tensor train Σ is the layer's own. In the Tucker form it is made of slices M_k = Σ_j P[j, k]·C[:, :, j], (r, r).
    """

    def __init__(self, config: "FacT", site: Site, factors: Factors):
        WeightAdapter.__init__(self)
        self.scale, self.dropout, self.bias = config.scale, config.dropout, None
        self.shape, self.blocks, self.slice, self.shared = site.shape, config.blocks(site), config.slice, factors
        if not config.slices:
            m, n = self.blocks
            self.sigma = empty(m * config.rank, n * config.rank, like=site.parameter)
            nn.init.kaiming_uniform_(self.sigma, a=5**0.5)

    def middle(self) -> Tensor:
        """Σ (m·r, n·r)."""
        if hasattr(self, "sigma"):
            return self.sigma
        (m, n), f = self.blocks, self.shared
        M = f.C @ f.P[:, self.slice : self.slice + m * n]  # (r, r, m·n)
        if (m, n) == (3, 1):  # queries, keys and values in one: their slices one below the other
            return M.permute(2, 1, 0).flatten(0, 1)
        return M.reshape(len(M), -1).T if n == 1 else M.reshape(m * len(M), -1)  # the order of the authors' files

    def factors(self):
        (out, size), (m, n), f = self.shape, self.blocks, self.shared
        return torch.block_diag(*[f.U] * n)[:, :size], (f.V @ self.middle().unflatten(0, (m, -1))).flatten(0, 1)[:out]


class FacT(Method):
    """FacT (Jie and Deng 2023, arXiv 2212.03145): the changes of all layers as one tensor, decomposed; subclasses say how.

    d is the width of the residual stream. The authors choose s for each task among 0.01, 0.1, 1, 10, 100. `dropout` drops inputs
    of the layer; theirs, 0.1, is behind Σ.
    """

    family, paper = "low-rank", "arXiv:2212.03145"
    works_on = ("linear", "attention")

    rank: Rank = 16
    scale: PositiveFloat = 1.0
    dropout: Dropout = 0.0
    width: int = Field(0, ge=0, description="d; filled in")
    slice: int = Field(0, ge=0, description="the first of the layer's slices; filled in")
    slices: int = Field(0, ge=0, description="slices of all layers; filled in")

    def blocks(self, site: Site) -> tuple[int, int]:
        """(m, n): how many times d a site's outputs and inputs are, rounded up."""
        return tuple(-(-size // (self.width or size)) for size in site.shape)

    def allot(self, model, configs, by_path):
        if (d := width(model)) is None:
            raise TunesmithError(f"{self.method} needs the width of the residual stream, and {type(model).__name__} has no linear layer that shows it")
        return {path: config.model_copy(update={"width": d}) for path, config in configs.items()}

    def build(self, model, configs, by_path):
        shared: dict[int, Factors] = {}
        for path, config in configs.items():
            if config.rank not in shared:
                shared[config.rank] = Factors(config, by_path[path].parameter)
        return {path: (by_path[path], FacTLayer(config, by_path[path], shared[config.rank])) for path, config in configs.items()}


class FacTTT(FacT):
    """FacT-TT (Jie and Deng 2023, arXiv 2212.03145): a tensor train, ΔW = s·V Σ U with Σ of each layer; 61,440 numbers for ViT-B/16. See `FacT`."""

    method, title = "fact-tt", "Factor tuning, tensor train"

    def count(self, site):
        m, n = self.blocks(site)
        return 2 * self.rank * self.width + m * n * self.rank**2


class FacTTK(FacT):
    """FacT-TK (Jie and Deng 2023, arXiv 2212.03145): Tucker, ΔW = s·V Σ U with Σ of a common core; 86,528 numbers for ViT-B/16. See `FacT`."""

    method, title = "fact-tk", "Factor tuning, Tucker"

    rank: Rank = 32

    def allot(self, model, configs, by_path):
        taken: dict[int, int] = {}
        configs, first = super().allot(model, configs, by_path), {}
        for path, config in configs.items():
            m, n = config.blocks(by_path[path])
            first[path] = taken.get(config.rank, 0)
            taken[config.rank] = first[path] + m * n
        return {path: config.model_copy(update={"slice": first[path], "slices": taken[config.rank]}) for path, config in configs.items()}

    def count(self, site):
        return 2 * self.rank * self.width + self.rank**3 + self.rank * self.slices
