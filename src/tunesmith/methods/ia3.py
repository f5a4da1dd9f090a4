"""(IA)³: learned scales of keys, values and feed-forward activations."""

import torch
from torch import nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, Targets, float_dtype, matches
from .method import Method
from .peft_targets import check_paths, target_paths
from .select import keys_and_values, mlp_outputs


class IA3Layer(WeightAdapter):
    """y = l ⊙ base(x), l (out,); at a feed-forward site y = base(l ⊙ x), l (in,)."""

    def __init__(self, site: Site, inputs: bool):
        super().__init__()
        self.inputs = inputs
        size = site.in_features if inputs else site.out_features
        self.l = nn.Parameter(torch.ones(size, dtype=float_dtype(site.parameter), device=site.parameter.device))

    def merged(self, W, b):
        if self.inputs:
            return W * self.l, b
        return W * self.l[:, None], None if b is None else b * self.l

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        return base(x * self.l.to(x.dtype), *args, **kwargs) if self.inputs else base(x, *args, **kwargs) * self.l.to(x.dtype)


class IA3(Method):
    """(IA)³ (Liu et al. 2022, arXiv 2205.05638, eq. 1): one scale per key, value and feed-forward channel.

    By default it acts on the layers named as keys and values and on the linear layer that ends each feed-forward
    block. `feedforward` names the sites whose input is scaled (default: those with more inputs than outputs that
    end a feed-forward block).
    """

    method, family, title, paper = "ia3", "scaling", "Infused adapter by inhibiting and amplifying inner activations", "arXiv:2205.05638"
    works_on = ("linear", "conv", "attention")
    quantized_base_ok = True
    default_lr = 5e-3

    targets: Targets = "default"
    feedforward: list[str] | None = None

    def default(self, model):
        return list({s.path: s for s in keys_and_values(model) + mlp_outputs(model)}.values())

    def select(self, model):
        ends = {s.path for s in mlp_outputs(model)}

        def scales_input(path):
            return path in ends if self.feedforward is None else any(matches(f, path) for f in self.feedforward)

        return {path: (site, {"feedforward": [path] if scales_input(path) else []} | over) for path, (site, over) in super().select(model).items()}

    peft_type = "IA3"

    def to_peft(self, configs, model):
        return super().to_peft(configs, model) | {"feedforward_modules": sorted(p for p, c in configs.items() if c.feedforward)}

    @classmethod
    def from_peft(cls, fields, model, found):
        paths = {key.removesuffix(".ia3_l"): t for key, t in found.items() if key.endswith(".ia3_l")}
        check_paths(target_paths(fields, model, cls.works_on), set(paths), "target_modules")
        feedforward = fields.get("feedforward_modules") or []
        if isinstance(feedforward, str):
            feedforward = [feedforward]
        return cls(targets=sorted(paths), feedforward=feedforward), {p: {"feedforward": [p] if any(matches(f, p) for f in feedforward) else []} for p in paths}

    def peft_tensors(self, site, own):
        return {"ia3_l": own["l"][None] if self.feedforward else own["l"][:, None]}

    def own_tensors(self, site, theirs):
        return {"l": theirs["ia3_l"].flatten()}

    def layer(self, site):
        return IA3Layer(site, bool(self.feedforward))

    def count(self, site):
        return site.in_features if self.feedforward else site.out_features
