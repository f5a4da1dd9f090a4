"""SHiRA: one to two per cent of a weight's entries are trained under a fixed mask."""

from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from ..engine.sites import Site
from ..errors import TunesmithError
from .entries import ChosenLayer, drawn, top
from .method import Method, Rank, Seed
from .peft_targets import check_paths, exactly

Share = Annotated[float, Field(gt=0, le=1)]


class SHiRA(Method):
    """Sparse high-rank adapters (Bhardwaj et al. 2024, arXiv 2406.13175): W + S, S being K trained entries of a fixed mask.

    K is `density` of each matrix, or with `rank` what LoRA of that rank trains, r(m + n), as in Hugging Face peft. `mask`
    (section 3.1): `struct`, every f-th row and the main diagonal; `random`; `magnitude`, the largest |W| (WM);
    `gradient`, the largest |∂L/∂W| on calibration data; `snip`, the largest |W·∂L/∂W|. Gradients are summed with their signs. `task`
    counts adapters that are to share no entry: task t has the entries ranked tK + 1 to (t + 1)K.
    """

    method, family, title, paper = "shira", "selective", "Sparse high-rank adapters", "arXiv:2406.13175"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-3

    density: Share = Field(0.01, description="share of each matrix that trains")
    rank: Rank | None = Field(None, description="instead of density: train as many entries as LoRA of this rank has")
    mask: Literal["struct", "random", "magnitude", "gradient", "snip"] = "magnitude"
    task: NonNegativeInt = Field(0, description="adapters with different numbers share no entry")
    seed: Seed = Field(0, description="of random masks")
    same: bool = Field(False, description="random masks of layers of one shape are the same, as in peft")

    @property
    def calibrated(self):
        return ("gradient",) if self.mask in ("gradient", "snip") else ()

    def step(self) -> int:
        """f, of which every f-th row of a `struct` mask trains."""
        return max(1, round(1 / self.density))

    def count(self, site):
        m, n = site.shape
        if self.mask == "struct":
            rows = range(self.task % self.step(), m, self.step())
            return len(rows) * n + min(m, n) - sum(row < n for row in rows)
        wanted = self.rank * (m + n) if self.rank else ceil(self.density * m * n)
        if wanted * (self.task + 1) > m * n:
            of = f"rank={self.rank}" if self.rank else f"density={self.density}"
            raise TunesmithError(f"shira: {site.path!r} has {m * n:,} entries, too few for {of} and task={self.task}, which need {wanted * (self.task + 1):,}; lower them, or leave the layer out of the targets")
        return wanted

    def positions(self, site: Site) -> Tensor:
        """The flat positions that train, ascending, (K,)."""
        (m, n), k, where = site.shape, self.count(site), site.parameter.device
        if self.mask == "struct":
            mask = torch.zeros(m, n, dtype=torch.bool, device=where)
            mask.fill_diagonal_(True)
            mask[self.task % self.step() :: self.step()] = True
            return mask.flatten().nonzero()[:, 0]
        scored = site.gradient if self.calibrated else site.matrix(site.values)[0].detach()
        if self.mask == "random" and self.same:
            order = torch.randperm(m * n, generator=torch.Generator().manual_seed(self.seed))
            return order[k * self.task : k * (self.task + 1)].sort().values.to(where)
        if self.mask == "random" or scored is None or scored.is_meta:
            return drawn(site, self.seed, m * n, k, skip=k * self.task).to(where)
        if self.mask == "snip":
            scored = scored * site.matrix(site.values)[0].detach()
        scored = scored.abs().flatten()
        best = top(scored, k * (self.task + 1))
        return best[~torch.isin(best, top(scored, k * self.task))] if self.task else best

    def layer(self, site):
        return ChosenLayer(site, self.positions(site))

    peft_type = "SHIRA"

    def to_peft(self, configs, model):
        ranks = {c.rank if c.mask != "struct" else None for c in configs.values()}
        if len(ranks) > 1 or None in ranks:
            raise TunesmithError("peft's SHiRA trains as many entries as LoRA of one rank has: this adapter, by density or with several ranks, is to be saved with format='tunesmith'")
        seed = self.seed if self.mask == "random" and self.same and not self.task else None
        return {"target_modules": exactly(configs, model), "r": ranks.pop(), "mask_type": "random", "random_seed": seed}

    @classmethod
    def from_peft(cls, fields, model, found):
        paths = {key.removesuffix(".shira_weight") for key in found if key.endswith(".shira_weight")}
        check_paths(fields, model, ("linear",), paths)
        seed = fields.get("random_seed")
        if seed is None and (bare := [path for path in paths if f"{path}.shira_indices" not in found]):
            raise TunesmithError(f"the peft adapter holds values without their positions at {bare[0]!r}, and no random_seed to draw them from: it cannot be read")
        config = cls(rank=fields.get("r", 32), mask="random", same=True, seed=seed or 0, targets=sorted(paths))
        return config, {path: {} for path in paths}

    def peft_tensors(self, site, own):
        if site.kind != "linear" or site.transposed:
            raise TunesmithError(f"peft's SHiRA acts on nn.Linear alone, not on {site.path!r}; save this adapter with format='tunesmith'")
        index = own["index"]
        return {"shira_weight": own["v"], "shira_indices": torch.stack([index // site.in_features, index % site.in_features]).int()}

    def own_tensors(self, site, theirs):
        if "shira_indices" not in theirs:
            return {"v": theirs["shira_weight"], "index": self.positions(site).cpu()}
        rows, columns = theirs["shira_indices"].long()
        index, order = (rows * site.in_features + columns).sort()
        return {"v": theirs["shira_weight"][order], "index": index}
