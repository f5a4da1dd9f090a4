"""NeuroAda: every neuron gets k trained connections, beside the largest of those it has."""

from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from ..engine.sites import Site
from .entries import ChosenLayer, drawn, generator, top
from .method import Method, Seed


class NeuroAda(Method):
    """NeuroAda (Zhang et al. 2025, arXiv 2510.18940): W̃_ij = W_ij + Δ_ij at the `k` inputs j of each output i, Δ from zero.

    `choice`: the inputs of largest |W_ij|, as in the paper, or of the smallest; of the largest |∂L/∂W_ij| on calibration
    data, summed with its sign; or at random. `neurons`: the share of the outputs that train, drawn at random. Δ is kept
    in float32 and applied apart from a base of lower precision, into which the authors' code adds it, where changes of
    less than 2⁻⁹ of these largest weights vanish. LLaMA-7B has 1,359,872 trained parameters with k = 1, 0.020 %.
    """

    method, family, title, paper = "neuroada", "selective", "Top connections of every neuron", "arXiv:2510.18940"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 5e-3

    k: PositiveInt = Field(1, description="trained inputs of each neuron; all of a layer's where it has fewer")
    choice: Literal["magnitude", "smallest", "gradient", "random"] = "magnitude"
    neurons: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of a layer's outputs that train")
    seed: Seed = Field(0, description="of what is drawn at random; each layer draws its own")

    @property
    def calibrated(self):
        return ("gradient",) if self.choice == "gradient" else ()

    def _size(self, site: Site) -> tuple[int, int]:
        return ceil(self.neurons * site.out_features), min(self.k, site.in_features)

    def positions(self, site: Site) -> Tensor:
        """The flat positions that train, ascending, (K,): k in each row that trains."""
        rows, k = self._size(site)
        scored = site.gradient if self.calibrated else site.matrix(site.values)[0].detach()
        if self.choice == "random" or scored is None or scored.is_meta:
            scored = torch.rand(site.shape, generator=generator(site, self.seed))
        scored = scored.abs()
        columns = top(-scored if self.choice == "smallest" else scored, k)
        positions = torch.arange(site.out_features, device=columns.device)[:, None] * site.in_features + columns
        if rows < len(positions):
            positions = positions[drawn(site, self.seed, len(positions), rows).to(positions.device)]
        return positions.flatten().to(site.parameter.device)

    def layer(self, site):
        return ChosenLayer(site, self.positions(site))

    def count(self, site):
        rows, k = self._size(site)
        return rows * k
