"""(IA)³: learned scales of keys, values and feed-forward activations."""

import re

import torch
from torch import nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, Targets, float_dtype, matches
from .method import Method
from .peft_targets import check_paths, exactly
from .select import keys_and_values, mlp_outputs


class IA3Layer(WeightAdapter):
    """y = l ⊙ base(x), l (out,); at a feed-forward site y = base(l ⊙ x), l (in,) of channels."""

    def __init__(self, site: Site, inputs: bool):
        super().__init__()
        self.inputs, self.groups = inputs, getattr(site.holder, "groups", 1)
        size = input_channels(site) if inputs else site.out_features
        self.l = nn.Parameter(torch.ones(size, dtype=float_dtype(site.parameter), device=site.parameter.device))

    def merged(self, W, b):
        if not self.inputs:
            return W * self.l[:, None], None if b is None else b * self.l
        l = self.l.view(self.groups, 1, -1, 1)  # a convolution's row reads the channels of its group, each through a whole kernel
        return (W.view(self.groups, len(W) // self.groups, l.shape[2], -1) * l).view_as(W), b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        return base(x * self.l.to(x.dtype), *args, **kwargs) if self.inputs else base(x, *args, **kwargs) * self.l.to(x.dtype)


def input_channels(site: Site) -> int:
    return site.holder.in_channels if site.kind == "conv" else site.in_features


class IA3(Method):
    """(IA)³ (Liu et al. 2022, arXiv 2205.05638, eq. 1): one scale per key, value and feed-forward channel.

    By default it acts on the layers named as keys and values and on the linear layer that ends each feed-forward
    block. `feedforward` names the sites whose input is scaled (default: those with more inputs than outputs that
    end a feed-forward block).
    """

    method, family, title, paper = "ia3", "scaling", "Infused adapter by inhibiting and amplifying inner activations", "arXiv:2205.05638"
    works_on = ("linear", "conv", "attention")
    default_lr = 5e-3

    targets: Targets = "default"
    feedforward: list[str] | None = None

    def default(self, model):
        return list({s.path: s for s in keys_and_values(model) + mlp_outputs(model)}.values())

    def select(self, model):
        ends = {s.path for s in mlp_outputs(model)}

        def scales_input(path):
            return path in ends if self.feedforward is None else any(matches(f, path) for f in self.feedforward)

        found = super().select(model).items()
        return {p: (s, over if "method" in over else {"feedforward": [p] if scales_input(p) else []} | over) for p, (s, over) in found}

    peft_type = "IA3"

    def to_peft(self, configs, model):
        return super().to_peft(configs, model) | {"feedforward_modules": exactly([p for p, c in configs.items() if c.feedforward], model)}

    @classmethod
    def from_peft(cls, fields, model, found):
        paths = {key.removesuffix(".ia3_l"): t for key, t in found.items() if key.endswith(".ia3_l")}
        check_paths(fields, model, cls.works_on, set(paths))
        feedforward = fields.get("feedforward_modules") or []
        # peft takes the entries of a list as ends of the path, whole names or not
        ends = {p for p in paths if (re.fullmatch(feedforward, p) if isinstance(feedforward, str) else p.endswith(tuple(feedforward)))}
        return cls(targets=sorted(paths), feedforward=sorted(ends)), {p: {"feedforward": [p] if p in ends else []} for p in paths}

    def peft_tensors(self, site, own):
        shape = [1] * site.parameter.dim()
        shape[1 if self.feedforward or site.kind == "conv" else 0] = -1
        return {"ia3_l": own["l"].view(shape)}

    def own_tensors(self, site, theirs):
        return {"l" if key == "ia3_l" else key: t.flatten() for key, t in theirs.items()}

    def layer(self, site):
        return IA3Layer(site, bool(self.feedforward))

    def count(self, site):
        return input_channels(site) if self.feedforward else site.out_features
