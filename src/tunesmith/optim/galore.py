"""GaLore and Natural GaLore: Adam whose moments are those of a matrix's gradient in the gradient's own leading subspace.

G = UΣVᵀ is decomposed every `update_proj_gap` steps; between, g = UᵀG, GV or UᵀGV of the first `rank` singular vectors goes
through Adam and back. The weights stay of full rank; only the optimiser's memory is of low rank.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import TunesmithError, nearest
from ..quantize.formats import BLOCK, blockwise, dynamic_map, unblocked

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether there are negative ones


def sides(shape: tuple[int, int], proj_type: str) -> tuple[bool, bool]:
    """Whether an (m, n) gradient is projected from the left (by U), and from the right (by V).

    `std`: its smaller side is, the right one where both are as large; `reverse_std`: the larger one; `full`: both.
    """
    right = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1], "left": False, "right": True, "full": True}[proj_type]
    return not right or proj_type == "full", right


def subspace(G: Tensor, rank: int, proj_type: str) -> tuple[Tensor | None, Tensor | None]:
    """U (m, rank) and V (n, rank), the first singular vectors of G (m, n), or None for a side that is not projected; in G's dtype.

    Their signs are arbitrary. Raises `TunesmithError` for a gradient that is not finite.
    """
    try:
        U, _, Vh = torch.linalg.svd(G.to(_wide(G)), full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise TunesmithError(f"the gradient of a {tuple(G.shape)} matrix has no singular value decomposition ({error})") from error
    vectors = zip((U, Vh.mT), sides(G.shape, proj_type), strict=True)
    # Clones, since a view would keep all vectors alive, and in one layout, since sums depend on it to the bit.
    return tuple(Q[:, :rank].to(G.dtype).clone(memory_format=torch.contiguous_format) if there else None for Q, there in vectors)


def project(G: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """UᵀGV, without the factors that are None."""
    G = G if U is None else U.mT @ G
    return G if V is None else G @ V


def natural(history: Tensor, current: int, damping: float, relative: bool = False) -> Tensor:
    """(λI + Σ vec(g)vec(g)ᵀ)⁻¹ vec(g_current), in the shape of g, over the gradients `history` (s, *shape); rows of zeros are no gradients.

    λ is `damping` > 0. By Woodbury this is Γ(λI + ΓᵀΓ)⁻¹e for Γ of the columns vec(g): Natural GaLore's (arXiv 2410.16029)
    v/λ − Γ(I + ΓᵀΓ/λ)⁻¹Γᵀv/λ² without its cancellation. `relative`: λ is damping·N for the mean N of ‖g‖², and the result is
    times λ + N, so that it is of g's own scale, and is g where there are no other gradients.
    """
    rows = history.flatten(1)
    gram, scale = rows @ rows.T, 1.0
    if relative:
        norms = gram.diagonal()
        mean = (norms.sum() / (norms > 0).sum().clamp(min=1)).clamp(min=1e-30)  # gradients may all be zero
        damping, scale = damping * mean, (1 + damping) * mean
    unit = torch.zeros_like(rows[:, 0])
    unit[current] = 1
    weights = torch.linalg.solve(gram + damping * torch.eye(len(rows)).to(gram), scale * unit)
    return (weights @ rows).view(history.shape[1:])


@functools.cache
def levels(signed: bool) -> list[float]:
    """The 256 values of an 8-bit moment over its block's largest: the dynamic map, seven decades whose higher ones are finer.

    Block-wise 8-bit optimisers, arXiv 2110.02861.
    """
    if signed:
        return dynamic_map()
    edges = (torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float64) * 10.0 ** (i - 6) for i in range(7))
    return sorted([0.0, 1.0, *(v for e in edges for v in ((e[1:] + e[:-1]) / 2).tolist())])


def _count(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and v >= 1


def _positive(v: Any) -> bool:
    return isinstance(v, int | float) and v > 0


def _from_zero(v: Any) -> bool:
    return isinstance(v, int | float | Tensor) and v >= 0


COUNT = "a whole number of at least 1"


class GaLore(torch.optim.Optimizer):
    """GaLore (Zhao et al. 2024, arXiv 2403.03507), with the moments carried over as they are when the subspace changes.

    A group with a `rank` has its matrices projected; its other tensors, and all of a group without one, get AdamW. Options, each
    of which a group may have its own of: `lr`, `betas`, `eps`, `weight_decay`; `rank` ≥ 1, at most a matrix's smaller side;
    `update_proj_gap` ≥ 1, steps between two decompositions; `scale` > 0 of a projected update; `proj_type`, see `sides`; `bits`:
    32, or 8 for moments that are stored in blocks of 256 (the second one's root is, which takes half as many decades).

    As in the authors' code, ε is added to √v before v's bias is corrected, and weight decay comes after the update. Subspaces are
    in the parameter's dtype, moments in float32 at least. Processes that train together need the same gradients: sum them first.
    Raises `TunesmithError` for an option that is unknown or out of its range, and for a gradient to decompose that is not finite.
    """

    options: ClassVar[dict[str, tuple[Any, Callable[[Any], bool], str]]] = {  # default, whether a value is valid, which values are
        "lr": (1e-3, _from_zero, "at least 0"),
        "betas": ((0.9, 0.999), lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers of at least 0 and below 1"),
        "eps": (1e-6, _positive, "above 0"),
        "weight_decay": (0.0, _from_zero, "at least 0"),
        "rank": (None, lambda v: v is None or _count(v), COUNT),
        "update_proj_gap": (200, _count, COUNT),
        "scale": (1.0, _positive, "above 0"),
        "proj_type": ("std", lambda v: v in PROJ_TYPES, "one of " + ", ".join(PROJ_TYPES)),
        "bits": (32, lambda v: v in (8, 32), "8 or 32"),
    }

    def __init__(self, params: Iterable, lr: float = 1e-3, **options: Any):
        for key in options:
            if key not in self.options:
                raise TunesmithError(f"{type(self).__name__} has no option {key!r}{nearest(key, self.options) or '; it has ' + ', '.join(self.options)}")
        super().__init__(params, {key: default for key, (default, *_) in self.options.items()} | {"lr": lr} | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if wrong := self._wrong(self.param_groups[-1]):
            self.param_groups.pop()
            raise TunesmithError(wrong)

    def _wrong(self, group: dict[str, Any]) -> str | None:
        """What is wrong with a group, in one sentence."""
        for key, (_, valid, what) in self.options.items():
            if not valid(group[key]):
                return f"{type(self).__name__}: {key}={group[key]!r} is not valid; it is {what}"
        side = min((min(p.shape) for p in group["params"] if p.dim() == 2), default=math.inf)
        return (
            f"{type(self).__name__}: rank={group['rank']} is above {side}, the smaller side of a matrix in its group" if side < (group["rank"] or 0) else None
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter with a gradient; returns what `closure`, if there is one, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, self.state[p])
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        k, (b1, b2), lr = state.setdefault("step", 0), group["betas"], group["lr"]
        projected = group["rank"] is not None and p.dim() == 2
        switch = projected and k % group["update_proj_gap"] == 0
        if switch:
            state |= {name: Q for name, Q in zip("UV", subspace(p.grad, group["rank"], group["proj_type"]), strict=True) if Q is not None}
        U, V = state.get("U"), state.get("V")
        g = self.transform(project(p.grad, U, V), group, state, switch) if projected else p.grad

        m, v = (self._moment(state, key, g, group["bits"]) for key in MOMENTS)
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = v.sqrt()
        if group["bits"] == 8:
            for (key, signed), value in zip(MOMENTS.items(), (m, root), strict=True):
                state[key], state[f"{key}_scale"] = blockwise(value, levels(signed))
        N = m.div(root.add_(group["eps"]))
        state["step"] = k + 1
        size = -lr * math.sqrt(1 - b2 ** (k + 1)) / (1 - b1 ** (k + 1))
        if not projected:
            p.add_(N, alpha=size)
        else:
            N = N.to(p.dtype)
            left, right = (U, N) if V is None else (N, V.mT) if U is None else (U, N @ V.mT)
            p.addmm_(left, right, alpha=size * group["scale"])  # the update itself, as large as the weight, is never formed
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])

    def transform(self, g: Tensor, group: dict[str, Any], state: dict[str, Any], switch: bool) -> Tensor:
        """What Adam is given for the projected gradient g; `switch`: the subspace is a new one."""
        return g

    @staticmethod
    def _moment(state: dict[str, Any], key: str, g: Tensor, bits: int) -> Tensor:
        if key not in state:
            zero = torch.zeros_like(g, dtype=_wide(g))
            if bits == 8:
                return zero
            state[key] = zero
        if bits == 32:
            return state[key]
        value = unblocked(state[key], state[f"{key}_scale"], levels(MOMENTS[key]))
        return value if MOMENTS[key] else value.square_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another optimiser's `state_dict()`, to the bit."""
        super().load_state_dict(state_dict)
        # torch's own casts states to the parameter's dtype, which codes and float32 moments are not of.
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[p][key] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


class NaturalGaLore(GaLore):
    """Natural GaLore (Das 2024, arXiv 2410.16029): GaLore whose projected gradient g becomes F̂⁻¹g before Adam.

    F̂ = λI + Σ vec(g)vec(g)ᵀ over the last `history` ≥ 1 projected gradients, the present one among them; see `natural` for
    λ, `damping` > 0 and `relative`. They are forgotten when the subspace changes, unless `clear` is False: they are of the
    old one's basis. The authors' code is `proj_type="full", history=20, damping=1e-3, relative=False, clear=False`.
    """

    options = GaLore.options | {
        "history": (4, _count, COUNT),
        "damping": (1.0, _positive, "above 0"),
        "relative": (True, lambda v: isinstance(v, bool), "true or false"),
        "clear": (True, lambda v: isinstance(v, bool), "true or false"),
    }

    def transform(self, g, group, state, switch):
        g = g.to(_wide(g))
        if "history" not in state:
            state["history"] = g.new_zeros(group["history"], *g.shape)
        if switch and group["clear"]:
            state["history"].zero_()
        current = state["step"] % group["history"]
        state["history"][current] = g
        return natural(state["history"], current, group["damping"], group["relative"])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state, step counters apart."""
    return sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if isinstance(t, Tensor) and key != "step")


def shape_bytes(
    shape: tuple[int, ...], rank: int | None = None, proj_type: str = "std", bits: int = 32, history: int = 0, dtype: torch.dtype = torch.float32
) -> int:
    """`state_bytes` of one parameter, in closed form: 2mn numbers for AdamW; for `std` with m ≥ n 2mr + nr, and s·mr for a history of s."""
    wide, vectors = torch.promote_types(dtype, torch.float32).itemsize, 0
    if rank is not None and len(shape) == 2:
        projected = sides(shape, proj_type)
        vectors = rank * sum(n for n, there in zip(shape, projected, strict=True) if there) * dtype.itemsize
        shape = [rank if there else n for n, there in zip(shape, projected, strict=True)]
    else:
        history = 0
    n = math.prod(shape)
    return vectors + history * n * wide + 2 * (n * wide if bits == 32 else n + math.ceil(n / BLOCK) * wide)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
