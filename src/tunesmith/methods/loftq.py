"""LoftQ: LoRA that starts from what quantisation took from the weight."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from ..quantize import Format, PackedWeight
from .lora import LoRA, LoRALayer, pissa


class LoftQLayer(LoRALayer):
    """y = base(x) + s·B A x with s·B₀A₀ the best approximation of W − Q of rank r."""

    def __init__(self, config, site):
        super().__init__(config, site)
        W = site.parameter
        if isinstance(W, PackedWeight) and W.original is not None:
            with torch.no_grad():
                A, B = pissa(W.original.to(self.A.dtype) - W.dequantize().to(self.A.dtype), config.rank, self.scale)
                self.A.zero_()[: len(A)], self.B[:, : B.shape[1]] = A, B


class LoftQ(LoRA):
    """LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): Q = q(W − BA) and BA = SVD_r(W − Q) in turn, then LoRA on Q.

    It starts from the original weights: `ts.quantize(model, format, keep=True)`, and `rounding=LoftQ(iterations=5).rounding` for
    more than one turn; a recipe does both. The factors are divided by √s, so that s·BA is the difference whatever α is (peft
    leaves that out). On a base that is not quantised, or whose originals were not kept, it starts as LoRA.
    """

    method, title, paper = "loftq", "LoRA-fine-tuning-aware quantisation", "arXiv:2310.08659"
    from_original = True

    alpha: PositiveFloat = 8
    init: Literal["kaiming", "gaussian"] = "kaiming"
    iterations: Annotated[int, Field(ge=1, le=100)] = 1

    def layer(self, site):
        return LoftQLayer(self, site)

    def rounding(self, W: Tensor, format: Format, keep: bool = False) -> PackedWeight:
        """Q after so many turns; of all turns the one with the least ‖W − Q − BA‖."""
        exact, low, best = W.detach().float(), 0.0, None
        for _ in range(self.iterations):
            Q = PackedWeight.of(exact - low, format).dequantize()
            A, B = pissa(exact - Q, self.rank, 1.0)
            rest = (exact - Q - B @ A).norm()
            if best is None or rest < best[0]:
                best = rest, exact - low
            low = B @ A
        return PackedWeight(format, format.encode(best[1]), W.shape, W.dtype, W.detach() if keep else None)
