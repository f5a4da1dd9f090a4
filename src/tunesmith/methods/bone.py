"""Bone, Bat and MiSS: one small block, starting at zero, shared by all blocks of the weight."""

from math import gcd, prod
from typing import Literal

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import nn
from torch.nn import functional as F

from ..engine.adapter import WeightAdapter
from ..engine.fused import block_sum_linear, shared_block
from ..engine.sites import Site, sites
from ..errors import TunesmithError
from .method import Dropout, Method, Rank, divisor, empty
from .peft_targets import check_paths

WIDEST = 64  # of the blocks that a default chooses to fit the layer


class BoneLayer(WeightAdapter):
    """ΔW[o, j] = D[j mod r, o mod m], D (r, m): y = base(x) + (Σ_g x_g) D for the r-wide blocks x_g of drop(x)."""

    def __init__(self, site: Site, shape: tuple[int, ...], dropout: float):
        super().__init__()
        self.dropout = dropout
        self.D = nn.init.zeros_(empty(*shape, like=site.parameter))

    def merged(self, W, b):
        (out, size), (r, m) = W.shape, self.D.shape
        return W + self.D.T.repeat(out // m, -(-size // r))[:, :size], b

    def forward(self, base, x, *args, **kwargs):
        if base.site.kind == "embedding":
            y = base(x, *args, **kwargs)
            return y + F.embedding(x % len(self.D), self.D).tile(y.shape[-1] // self.D.shape[1]).to(y.dtype)
        if base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        if base.plain:
            return block_sum_linear(x, base.W, base.b, self.D, dropped)
        return base(x) + shared_block(x if dropped is None else dropped, self.D, base.site.out_features)


class BatLayer(WeightAdapter):
    """ΔW_oi = W_oi D + D for the r×r blocks W_oi of W, where D is D_o (`axis="out"`) or D_i (`axis="in"`), D (out/r or in/r, r, r)."""

    def __init__(self, site: Site, shape: tuple[int, ...], axis: str):
        super().__init__()
        self.axis = axis
        self.D = nn.init.zeros_(empty(*shape, like=site.parameter))

    def merged(self, W, b):
        r = self.D.shape[-1]
        blocks = W.to(self.D.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (out/r, r, in/r, r)
        if self.axis == "out":
            change = torch.einsum("oaib,obc->oaic", blocks, self.D).add_(self.D[:, :, None])
        else:
            change = torch.einsum("oaib,ibc->oaic", blocks, self.D).add_(self.D.transpose(0, 1))
        return change.reshape(W.shape).add_(W), b

    def forward(self, base, x, *args, **kwargs):
        if self.axis == "out" or base.site.kind != "linear":
            return super().forward(base, x, *args, **kwargs)
        # Σ_i W_oi (x_i + D_i x_i) + D_i x_i: the input changes block by block, and W' is never formed.
        r = self.D.shape[-1]
        h = torch.einsum("iab,...ib->...ia", self.D.to(x.dtype), x.unflatten(-1, (-1, r)))
        return base(x + h.flatten(-2)) + h.sum(-2).tile(base.site.out_features // r)


class BlockSharing(Method):
    """What the three methods have in common: their paper, and peft's one format for them (MISS), which `miss` reads."""

    family, paper = "block-sharing", "arXiv:2409.15371"
    works_on = ("linear", "embedding", "conv", "attention")
    default_lr = 1e-4  # sums of in/r inputs are √(in/r) times as large as an input

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of D at one site. Raises `TunesmithError` where the layer cannot be cut that way."""
        raise TypeError(f"{type(self).__name__} defines no shape")

    def count(self, site):
        return prod(self.shape(site))

    peft_type = "MISS"

    @property
    def mode(self) -> bool | str:
        """peft's `init_weights`."""
        return True

    @classmethod
    def reads_peft(cls, fields):
        return False

    def to_peft(self, configs, model):
        own = {s.path: s for s in sites(model) if s.path in configs}
        if others := [path for path, s in own.items() if s.kind != "linear" or s.transposed]:
            raise TunesmithError(f"peft's MiSS acts on nn.Linear alone, not on {others[0]!r}; save this adapter with format='tunesmith'")
        shapes = {path: config.shape(own[path]) for path, config in configs.items()}
        kinds = {(c.mode, shapes[path][-2], shapes[path][-1] if c.mode == "mini" else 1) for path, c in configs.items()}
        if len(kinds) > 1:
            raise TunesmithError(f"peft's MiSS has one init_weights, r and mini_r for all layers, this adapter has {', '.join(map(str, sorted(kinds, key=str)))}; save it with format='tunesmith'")
        mode, r, mini_r = kinds.pop()
        return super().to_peft(configs, model) | {"r": r, "mini_r": mini_r, "init_weights": mode}

    def peft_tensors(self, site, own):
        return {"miss_block": own["D"]}


class Bone(BlockSharing):
    """Bone, later MiSS (Kang & Yin 2024, arXiv 2409.15371, v12 eq. 4–6): ΔW[o, j] = D[j mod r, o], D (r, out) from zero.

    It is LoRA with A frozen to the tiled identity, so the layer needs of its input only the sum of its r-wide blocks (the
    last one filled up with zeros). Blocks are contiguous, as in the equations and the code; the text beside them counts
    otherwise. What the paper's first three versions call Bone is `bat`.
    """

    method, title = "bone", "Block affine adaptation"

    rank: Rank = Field(64, description="width of the blocks; the layer's inputs where those are fewer")
    dropout: Dropout = Field(0.0, description="of the inputs of linear layers, before the blocks are summed")

    def shape(self, site):
        return min(self.rank, site.in_features), site.out_features

    def layer(self, site):
        return BoneLayer(site, self.shape(site), self.dropout)

    def to_peft(self, configs, model):
        return super().to_peft(configs, model) | {"miss_dropout": self.dropout}


class Bat(BlockSharing):
    """Bat (Kang 2024, arXiv 2409.15371, there "Bone" until v3): W'_oi = W_oi(I + D) + D for the r×r blocks of W, D from zero.

    `axis="out"`: one D for each row of blocks, as in peft; `axis="in"`: one for each column of blocks, as in RWKV-PEFT,
    which changes the inputs instead of the weight and so costs far less.
    """

    method, title = "bat", "Block affine transformation"

    rank: Rank | None = Field(None, description=f"width of the blocks, a divisor of the layer's inputs and outputs; None: the largest up to {WIDEST}")
    axis: Literal["out", "in"] = Field("out", description="whether the blocks of a row or of a column share their D")

    def shape(self, site):
        rank = divisor(gcd(*site.shape), WIDEST) if self.rank is None else self.rank
        return bat_shape(self.method, site, rank, site.out_features if self.axis == "out" else site.in_features)

    def layer(self, site):
        return BatLayer(site, self.shape(site), self.axis)

    @property
    def mode(self):
        if self.axis == "in":
            raise TunesmithError("peft has no word for bat with axis='in'; save this adapter with format='tunesmith'")
        return "bat"


class MiSS(Bone):
    """MiSS as Hugging Face peft has it (arXiv 2409.15371): `init_weights` True is `bone`, "bat" is `bat`, and "mini" tiles D.

    "mini": ΔW[o, j] = D[j mod r, o mod m] with m = `mini_r`. The paper's eq. 3, shards along the output, is that with
    r = in, but for the order of the outputs.
    """

    method, title = "miss", "Matrix shard sharing"

    init_weights: Literal[True, "mini", "bat"] = True
    mini_r: PositiveInt | None = Field(None, description=f"with init_weights='mini', the width of D, a divisor of the outputs; None: the largest up to {WIDEST}")

    @field_validator("init_weights")
    @classmethod
    def _bat_reads_no_input(cls, value, info: ValidationInfo):
        if value == "bat" and info.data.get("dropout"):
            raise ValueError("bat changes the weight and has no dropout")
        return value

    @field_validator("mini_r")
    @classmethod
    def _of_mini_alone(cls, value, info: ValidationInfo):
        if value is not None and info.data.get("init_weights") != "mini":
            raise ValueError("mini_r needs init_weights='mini'")
        return value

    @property
    def mode(self):
        return self.init_weights

    def shape(self, site):
        if self.init_weights == "bat":
            return bat_shape(self.method, site, self.rank, site.out_features)
        r, out = super().shape(site)
        if self.init_weights is True:
            return r, out
        m = self.mini_r or divisor(out, WIDEST)
        if out % m:
            raise TunesmithError(f"miss: mini_r {m} does not divide the {out} outputs of {site.path!r}; {divisor(out, m)} does")
        return r, m

    def layer(self, site):
        return BatLayer(site, self.shape(site), "out") if self.init_weights == "bat" else super().layer(site)

    @classmethod
    def reads_peft(cls, fields):
        return fields.get("peft_type") in ("MISS", "BONE")  # BONE: its name in older releases

    @classmethod
    def from_peft(cls, fields, model, found):
        paths = {key.rpartition(".")[0] for key in found if key.endswith((".miss_block", ".bone_block"))}
        check_paths(fields, model, ("linear",), paths)
        mode = fields.get("init_weights") or True
        config = cls(
            rank=fields.get("r", 64), dropout=0.0 if mode == "bat" else fields.get("miss_dropout", 0.0), init_weights=mode,
            mini_r=fields.get("mini_r", 1) if mode == "mini" else None, targets=sorted(paths),
        )  # fmt: skip
        return config, {path: {} for path in paths}

    def own_tensors(self, site, theirs):
        return {"D" if key in ("miss_block", "bone_block") else key: t for key, t in theirs.items()}


def bat_shape(method: str, site: Site, r: int, shared: int) -> tuple[int, int, int]:
    out, size = site.shape
    if out % r or size % r:
        fits = divisor(gcd(out, size), r)
        raise TunesmithError(f"{method}: rank {r} does not divide both the {size} inputs and the {out} outputs of {site.path!r}; {fits} does")
    return shared // r, r, r
