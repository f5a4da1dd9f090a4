"""SketchTune: each row's weights take a few values, and these train."""

from typing import Annotated, Literal

from pydantic import Field

from ..quantize import Format
from .method import Method
from .parts import PartLayer


class SketchTune(Method):
    """SketchTune (Zhang et al. 2024, arXiv 2410.06364): Ŵ[o, p, j] = g[o, p, C[o, p, j]], of which the tables g alone train.

    A row is cut into `groups_per_row` runs with a table of 2^bits values each. On a base in a sketch format its own codes and
    tables serve; otherwise each weight is sketched here by k-means without data (the authors publish no sketching code;
    `ts.quantize(model, "sketch4", calibrate=…)` is LeanQuant's rule, of the same authors). Biases stay, tables train in
    float32 and are read as float16 (the authors' layer drops the bias and trains in bfloat16, where most steps round away).
    """

    method, family, title, paper = "sketchtune", "quantised", "Fine-tunable sketches", "arXiv:2410.06364"
    identity = False
    default_lr = 1e-4

    bits: Literal[2, 3, 4] = 4
    groups_per_row: Annotated[int, Field(ge=1)] = 4

    def format(self, width: int) -> Format:
        return Format(format=f"sketch{self.bits}", group_size=max(2, width // self.groups_per_row))

    def layer(self, site):
        return PartLayer("table", self.format(site.in_features), site)

    def param_groups(self, adapters, lr):
        return [group | {"weight_decay": 0.0} for group in super().param_groups(adapters, lr)]  # the tables are the weights

    def count(self, site):
        format = getattr(site.parameter, "format", None) or self.format(site.in_features)
        return 2**format.bits * site.out_features * site.in_features // format.group(site.shape)
