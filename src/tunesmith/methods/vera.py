"""VeRA: one pair of frozen random matrices for all layers; each layer trains two vectors of scales."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.sites import Site, float_dtype, sites
from ..errors import TunesmithError
from .lora import LoRALayer
from .method import Dropout, Method, Rank, Seed, empty
from .peft_targets import check_paths, exactly


class Projections(nn.Module):
    """A (r, inputs) and B (outputs, r), Kaiming-uniform, drawn on the CPU one after the other, as Hugging Face peft draws them.

    One module in all adapters of a model. They are real where the base is hollow: no file fills them in.
    """

    def __init__(self, config: "VeRA", places: list[Site]):
        super().__init__()
        outputs, inputs = (max(sizes) for sizes in zip(*(site.shape for site in places), strict=True))
        like = places[0].parameter
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (("A", (config.rank, inputs)), ("B", (outputs, config.rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to("cpu" if like.is_meta else like.device, float_dtype(like)), persistent=config.save_projection)


class VeRALayer(LoRALayer):
    """y = base(x) + b ∘ B (d ∘ A drop(x)), A (r, in) and B (out, r) the first columns and rows of the shared matrices.

    d is folded into B with b: A then takes no gradient, so that x is not kept and its product with one (2·r·in
    operations for each row of x) is not made; what d and b need comes from the gradient of the (out, r) product.
    """

    def __init__(self, config: "VeRA", site: Site, projections: Projections):
        WeightAdapter.__init__(self)
        self.scale, self.dropout, self.bias = 1.0, config.dropout, None
        self.shape, self.projections = site.shape, projections
        self.d, self.b = empty(config.rank, like=site.parameter), empty(site.out_features, like=site.parameter)
        nn.init.constant_(self.d, config.d_initial)
        nn.init.zeros_(self.b)

    def factors(self) -> tuple[Tensor, Tensor]:
        out, size = self.shape
        A, B = (t.to(self.b.device) for t in (self.projections.A[:, :size], self.projections.B[:out]))
        return A, B * torch.outer(self.b, self.d)


class VeRA(Method):
    """VeRA (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2): W + Λ_b B Λ_d A with A and B frozen, random and shared.

    A is as wide and B as high as the largest layer needs. The file holds d and b alone: A and B are drawn again, bit for
    bit, from `projection_prng_key`. Layers of another rank or key have a pair of their own. Trained are r + out
    numbers a layer: 24,576 for RoBERTa-base with rank 256 on queries and values, 61,440 for RoBERTa-large.
    """

    method, family, title, paper = "vera", "low-rank", "Vector-based random matrix adaptation", "arXiv:2310.11454"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 1e-2

    rank: Rank = 256
    d_initial: float = Field(0.1, description="what every entry of d starts from")
    dropout: Dropout = 0.0
    projection_prng_key: Seed = Field(0, description="the seed of the random matrices")
    save_projection: bool = Field(False, description="hold the matrices in the file, for a peft file whose own are not what its key draws")

    def build(self, model, configs, by_path):
        groups: dict[tuple, list[Site]] = {}
        for path, config in configs.items():
            groups.setdefault(config._pair(), []).append(by_path[path])
        pairs = {pair: Projections(next(c for c in configs.values() if c._pair() == pair), places) for pair, places in groups.items()}
        return {path: (by_path[path], VeRALayer(config, by_path[path], pairs[config._pair()])) for path, config in configs.items()}

    def _pair(self) -> tuple:
        """Layers that agree in this share their matrices."""
        return self.rank, self.projection_prng_key, self.save_projection

    def count(self, site):
        return self.rank + site.out_features

    peft_type = "VERA"

    def to_peft(self, configs, model):
        if len({(c._pair(), c.dropout) for c in configs.values()}) > 1:
            raise TunesmithError("peft's VeRA has one r, projection_prng_key and vera_dropout for all layers; save this adapter with format='tunesmith'")
        common = next(iter(configs.values()))
        return {
            "target_modules": exactly(configs, model), "r": common.rank, "projection_prng_key": common.projection_prng_key, "save_projection": True,
            "vera_dropout": common.dropout, "d_initial": common.d_initial, "bias": "none", "fan_in_fan_out": any(s.transposed for s in sites(model) if s.path in configs),
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        if fields.get("bias", "none") != "none":
            raise TunesmithError(f"the peft adapter trains biases beside VeRA (bias={fields['bias']!r}), which tunesmith does not read")
        paths = {key.removesuffix(".vera_lambda_d") for key in found if key.endswith(".vera_lambda_d")}
        check_paths(fields, model, ("linear",), paths)
        places = [site for site in sites(model) if site.path in paths]
        config = cls(
            rank=fields.get("r", 256), d_initial=fields.get("d_initial", 0.1), dropout=fields.get("vera_dropout", 0.0),
            projection_prng_key=fields.get("projection_prng_key", 0), targets=[site.path for site in places],
        )  # fmt: skip
        given = {name: found.pop(key) for name in "AB" if (key := f"base_model.vera_{name}") in found}
        if len(given) < 2 and fields.get("save_projection", True):
            raise TunesmithError("the peft file lacks base_model.vera_A or vera_B, though its config says save_projection")
        drawn = Projections(config, places)
        if any(not torch.equal(getattr(drawn, name).cpu(), t.to(drawn.A.dtype)) for name, t in given.items()):
            config = config.model_copy(update={"save_projection": True})
            found |= {f"{config.targets[0]}.projections.{name}": t for name, t in given.items()}
        return config, dict.fromkeys(config.targets, {})

    def peft_tensors(self, site, own):
        if site.kind != "linear":
            raise TunesmithError(f"peft's VeRA acts on linear layers alone, not on {site.path!r}; save this adapter with format='tunesmith'")
        return {f"vera_lambda_{key}": own[key] for key in "db"}

    def peft_shared(self, adapters):
        projections = next(iter(adapters.values())).projections
        return {"base_model.vera_A": projections.A, "base_model.vera_B": projections.B}

    def own_tensors(self, site, theirs):
        return {key.removeprefix("vera_lambda_"): t for key, t in theirs.items()}
