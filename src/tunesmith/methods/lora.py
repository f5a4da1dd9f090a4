"""LoRA: a low-rank change of the weight, with the rsLoRA scale, the PiSSA, OLoRA and LoRA-GA starts and LoRA+ learning rates."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.fused import lowrank_linear
from ..engine.sites import Site, sites
from ..errors import TunesmithError
from .method import Dropout, Method, Rank, empty, saved_sites, values_of
from .peft_targets import check_paths, exactly, patterned, patterns


class LoRALayer(WeightAdapter):
    """y = base(x) + s·B A drop(x), A (r, in), B (out, r); with a start from W, s·(BA − B₀A₀) for B₀A₀ what A and B started as."""

    dims: ClassVar[dict[str, tuple[str, ...]]] = {"A": ("rank", "in"), "B": ("out", "rank"), "A0": ("rank", "in"), "B0": ("out", "rank"), "bias": ("out",)}

    def __init__(self, config: "LoRA", site: Site):
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.A = empty(config.rank, site.in_features, like=site.parameter)
        self.B = empty(site.out_features, config.rank, like=site.parameter)
        nn.init.zeros_(self.B)
        self.starts = config.init in STARTS
        if config.init == "gaussian":
            nn.init.normal_(self.A, std=1 / config.rank)
        elif config.init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=5**0.5)
        else:
            self._start(site.gradient if config.calibrated else site.matrix(site.values)[0], STARTS[config.init])
        if config.bias != "none" and site.bias:
            self.bias = nn.Parameter(site.values[site.bias].detach().to(self.A.dtype).clone())
        else:
            self.bias = None

    @torch.no_grad()
    def _start(self, matrix: Tensor | None, factor: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]) -> None:
        """A₀ and B₀ from the weight or its gradient (None where a file brings them), zero beyond its rank. The base stays as it is."""
        nn.init.zeros_(self.A)
        if matrix is not None and not matrix.is_meta:
            A, B = factor(matrix.detach().to(self.A.dtype), len(self.A), self.scale)
            self.A[: len(A)], self.B[:, : B.shape[1]] = A, B
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B A."""
        return (torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], 1)) if self.starts else (self.A, self.B)

    def merged(self, W, b):
        A, B = self.factors()
        return torch.addmm(W.to(A.dtype), B, A, alpha=self.scale), b if self.bias is None else self.bias

    def forward(self, base, x, *args, **kwargs):
        site = base.site
        if site.kind == "conv" and site.holder.groups > 1 and not (self.dropout and self.training):
            return super().forward(base, x, *args, **kwargs)
        A, B = self.factors()
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout and self.training and x.is_floating_point() else x
        if site.kind == "linear" and base.plain:
            return lowrank_linear(x, base.W, base.b if self.bias is None else self.bias, A, B, self.scale, None if dropped is x else dropped)
        y = (base if self.bias is None else base.with_values(base.values | {site.bias: self.bias}))(x, *args, **kwargs)
        return y + self.scale * site.mix(site.apply(dropped, A), B).to(y.dtype)


def pissa(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA eq. 2–3: A₀ = S½Vᵀ, B₀ = US½ of the top r singular triplets of W, here divided by s."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """OLoRA, algorithm 1: W = QR; A₀ is the first r rows of R, B₀ the first r columns of Q."""
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def gradient(G: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA-GA, algorithm 1: A₀ is the first r right singular vectors of the gradient, B₀ the left ones from r to 2r, both times out^¼/√γ."""
    U, _, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    size = len(G) ** 0.25 / GAMMA**0.5
    return size * V[:, :r].T, size * U[:, r : 2 * r]


STARTS = {"pissa": pissa, "olora": olora, "gradient": gradient}
GAMMA = 16  # the default of LoRA-GA's code


class LoRA(Method):
    """LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3): W + (α/r)·BA.

    `rslora` scales by α/√r (arXiv 2312.03732); `lr_ratio` trains B with lr·ratio (LoRA+, arXiv 2402.12354). Three starts
    take s·B₀A₀ off again, so that the base stays untouched and the first output is its own: `init="pissa"` from the top
    singular triplets of W (arXiv 2404.02948), "olora" from W = QR (arXiv 2406.01775), and "gradient" from the singular
    vectors of the loss's gradient on some batches (LoRA-GA, arXiv 2407.05000, as in the authors' code with its scale
    "stable" and direction "ArB2r"; Hugging Face peft scales B alone, and by the singular values too).
    """

    method, family, title, paper = "lora", "low-rank", "Low-rank adaptation", "arXiv:2106.09685"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 1e-3

    rank: Rank = 8
    alpha: PositiveFloat = 16
    dropout: Dropout = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "pissa", "olora", "gradient"] = "kaiming"
    bias: Literal["none", "lora_only", "all"] = "none"
    lr_ratio: PositiveFloat = Field(1.0, description="LoRA+: learning rate of B over that of A")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def calibrated(self):
        return ("gradient",) if self.init == "gradient" else ()

    def layer(self, site):
        return LoRALayer(self, site)

    def count(self, site):
        bias = site.out_features if self.bias != "none" and site.bias else 0
        return self.rank * (site.in_features + site.out_features) + bias

    def resized(self, rank):
        return self.model_copy(update={"rank": rank, "alpha": self.scale * (rank**0.5 if self.rslora else rank)})

    def build(self, model, configs, by_path):
        built = super().build(model, configs, by_path)
        if self.bias == "all":
            saved = {s.path for s in saved_sites(self, model)}
            built |= {s.path: (s, values_of(s, (s.bias or "bias",))) for s in sites(model) if (s.bias or "bias") in s.names and s.path not in built.keys() | saved}
        return built

    def param_groups(self, adapters, lr):
        if self.lr_ratio == 1:
            return super().param_groups(adapters, lr)
        params = {id(p): (name, p) for a in adapters.values() for name, p in a.named_parameters() if p.requires_grad}.values()
        fast = [p for name, p in params if name == "B" or p.dim() == 1]  # LoRA+ counts vectors with B
        slow = [p for name, p in params if not (name == "B" or p.dim() == 1)]
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * self.lr_ratio}]

    peft_type = "LORA"

    @classmethod
    def reads_peft(cls, fields):
        return super().reads_peft(fields) and cls.method == lora_kind(fields)

    def _plain(self) -> "LoRA":
        """The config of twice the rank whose factors hold B₀A₀ too: a start from gradients cannot be made again."""
        return self.model_copy(update={"rank": 2 * self.rank, "alpha": self.alpha * (2**0.5 if self.rslora else 2), "init": "kaiming"})

    def to_peft(self, configs, model):
        configs = {p: c._plain() if c.calibrated else c for p, c in configs.items()}
        common = next(iter(configs.values()))
        starts = {c.init if c.init in STARTS else True for c in configs.values()}
        if len(starts) > 1:
            raise TunesmithError("the peft format has one start (init) for all layers; save this adapter with format='tunesmith'")
        return {
            "target_modules": exactly(configs, model), "r": common.rank, "lora_alpha": common.alpha, "lora_dropout": self.dropout, "bias": self.bias,
            "use_rslora": self.rslora, "use_dora": "magnitude" in self.tensor_names, "init_lora_weights": starts.pop(),
            "rank_pattern": patterns({p: c.rank for p, c in configs.items()}, common.rank),
            "alpha_pattern": patterns({p: c.alpha for p, c in configs.items()}, common.alpha),
            "fan_in_fan_out": any(s.transposed for s in sites(model) if s.path in configs and s.kind == "linear"),
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields, model, found):
        refuse_peft_options(fields)
        A = {key.partition(".lora_")[0]: t for key, t in found.items() if ".lora_A." in key or key.endswith(".lora_embedding_A")}
        check_paths(fields, model, cls.works_on, set(A))
        rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
        start = lora_start(fields)
        init = "pissa" if start.startswith("pissa") else "olora" if start == "olora" else "kaiming"
        config = cls(rank=rank, alpha=alpha, dropout=fields.get("lora_dropout", 0.0), rslora=bool(fields.get("use_rslora")), bias=fields.get("bias", "none"), init=init, targets=sorted(A))
        # the tensor's own shape decides the rank: sorted JSON keys make overlapping patterns ambiguous
        return config, {p: {"rank": len(t), "alpha": patterned(fields.get("alpha_pattern"), p, alpha)} for p, t in A.items()}

    def peft_tensors(self, site, own):
        if self.init == "olora" and (site.kind != "linear" or site.transposed):
            raise TunesmithError(f"peft's OLoRA acts on nn.Linear alone, not on {site.path!r}; save this adapter with format='tunesmith'")
        if self.calibrated:
            own = own | {"A": torch.cat([own["A"], own["A0"]]), "B": torch.cat([own["B"], -own["B0"]], 1)}
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"} if site.kind == "embedding" else {"A": "lora_A.weight", "B": "lora_B.weight"}
        named = {(names | OTHERS)[key]: t for key, t in own.items() if key in names or key in OTHERS}
        if site.kind == "conv":
            kernel = site.holder.weight.shape[1:]
            named["lora_A.weight"] = named["lora_A.weight"].view(-1, *kernel)
            ones = [1] * (len(kernel) - 1)
            named["lora_B.weight"] = named["lora_B.weight"].view(*named["lora_B.weight"].shape, *ones)
            if "lora_magnitude_vector" in named:
                named["lora_magnitude_vector"] = named["lora_magnitude_vector"].view(1, -1, *ones)
        return named

    def own_tensors(self, site, theirs):
        names = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"} | {v: k for k, v in OTHERS.items()}
        names |= {"bias": "bias", "lora_magnitude_vector.weight": "magnitude"}
        flat = {"A": 1, "B": 1, "magnitude": 0}
        return {(own := names.get(key, key)): t.flatten(flat[own]) if t.dim() > 2 and own in flat else t for key, t in theirs.items()}

    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B")


OTHERS = {"magnitude": "lora_magnitude_vector", "bias": "base_layer.bias"}
UNREAD = ("layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config")


def lora_start(fields: dict) -> str:
    return str(fields.get("init_lora_weights", True)).lower()


def lora_kind(fields: dict) -> str:
    """The registry name of the method that a peft LoRA config describes."""
    return "dora" if fields.get("use_dora") else "pissa" if lora_start(fields).startswith("pissa") else "lora"


def refuse_peft_options(fields: dict) -> None:
    """Raises `TunesmithError` for peft options that change the maths in ways not read here."""
    for option in UNREAD:
        if fields.get(option):
            raise TunesmithError(f"the peft adapter uses {option}, which tunesmith does not read")
    if (start := lora_start(fields)) in ("corda", "lora_ga"):
        raise TunesmithError(f"the peft adapter's base was changed by init_lora_weights={start!r}; save it with peft's path_initial_model_for_weight_conversion first")


class RSLoRA(LoRA):
    """rsLoRA (Kalajdzievski 2023): LoRA with the scale α/√r, so that higher ranks learn as fast as lower ones."""

    method, title, paper = "rslora", "Rank-stabilised LoRA", "arXiv:2312.03732"
    rslora: bool = True


class PiSSA(LoRA):
    """PiSSA (Meng et al. 2024): LoRA started from the principal singular triplets of W."""

    method, title, paper = "pissa", "Principal singular values and vectors adaptation", "arXiv:2404.02948"
    init: Literal["kaiming", "gaussian", "pissa", "olora", "gradient"] = "pissa"
    alpha: PositiveFloat = 8
    default_lr = 2e-4
