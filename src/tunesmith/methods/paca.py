"""PaCA: a few columns of each weight are trained in place; of the layer's input only theirs is kept for backward."""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from ..engine.sites import Site
from ..errors import TunesmithError
from .entries import ChosenLayer, drawn, top
from .lora import LoRA
from .method import Method, Rank, Seed


class PaCA(Method):
    """PaCA (Woo et al. 2025, arXiv 2503.01905): `rank` input columns of W are trained, W̃_S = W_S + (α/r)·v.

    The authors' layer trains P = W_S·r/α + v in the place of W_S; v has the same gradient and the same steps of Adam,
    and leaves the base as it is (their layer computes with columns a step old, and loses the original ones). It is LoRA
    whose A picks inputs, and a peft file of it is one of LoRA. `choice`: columns drawn at random, as in the paper; those
    of the largest or smallest norm; or of the largest norm of the gradient on calibration data, which their code leaves
    unfinished. LLaMA2-7B has 10,878,976 trained parameters at rank 8, LoRA 19,988,480.
    """

    method, family, title, paper = "paca", "selective", "Partial connection adaptation", "arXiv:2503.01905"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 2e-3

    rank: Rank = 8
    alpha: PositiveFloat = 8
    choice: Literal["random", "largest", "smallest", "gradient"] = Field("random", description="which columns of W")
    seed: Seed = Field(0, description="of the random columns; each layer draws its own")

    @property
    def calibrated(self):
        return ("gradient",) if self.choice == "gradient" else ()

    def columns(self, site: Site) -> Tensor:
        """The chosen columns, ascending. Ties go to the lower index."""
        if site.in_features < self.rank:
            raise TunesmithError(f"paca: {site.path!r} has {site.in_features} inputs, too few for rank={self.rank}; choose a lower rank, or leave the layer out of the targets")
        scored = site.gradient if self.calibrated else site.matrix(site.values)[0].detach()
        if self.choice == "random" or scored is None or scored.is_meta:
            return drawn(site, self.seed, site.in_features, self.rank).to(site.parameter.device)
        norms = torch.linalg.vector_norm(scored.float(), dim=0)
        return top(-norms if self.choice == "smallest" else norms, self.rank)

    def layer(self, site):
        return ChosenLayer(site, self.columns(site), 1, self.alpha / self.rank)

    def count(self, site):
        return self.rank * site.out_features

    peft_type = "LORA"

    @classmethod
    def reads_peft(cls, fields):
        return False

    def _as_lora(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=self.alpha)

    def to_peft(self, configs, model):
        return self._as_lora().to_peft({path: config._as_lora() for path, config in configs.items()}, model)

    def peft_tensors(self, site, own):
        A = F.one_hot(own["index"].long(), site.in_features).to(own["v"].dtype)
        return self._as_lora().peft_tensors(site, {"A": A, "B": own["v"]})
