"""Where a model can be adapted: modules found by name and type, each seen as one matrix W (out, in)."""

import re
import warnings
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TunesmithError, nearest

Targets = str | list[str] | dict[str, dict]

# What "all-linear" leaves alone is the model's head; these are the attributes that hold the residual width.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim")


@dataclass
class Site:
    """One place a method acts on.

    `holder` owns the parameters, `owner` is the module whose `forward` reads them (they differ only inside
    `nn.MultiheadAttention`). For a matrix kind, `weight` names the parameter that `matrix` shows as W (out, in):
    `linear`, `embedding` (in = vocabulary), `conv` (in = channels per group × kernel), `attention` (fused or separate
    projections of `nn.MultiheadAttention`). Kinds `norm` and `other` have parameters but no matrix.
    """

    path: str
    kind: str
    holder: nn.Module
    owner: nn.Module
    weight: str | None = None
    bias: str | None = None
    transposed: bool = False
    names: tuple[str, ...] = field(default=())
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # while adapters are built: statistic -> parameter -> what calibration found

    standard: bool = False  # whether the owner computes x Wᵀ + b and nothing else

    def __post_init__(self):
        forward = getattr(type(self.owner), "_tunesmith_base", type(self.owner)).forward
        self.standard = self.kind == "linear" and (forward is nn.Linear.forward or _is_gpt2_conv1d(self.owner))
        self.names = self.names or tuple(name for name, p in self.holder.named_parameters(recurse=False))

    @property
    def values(self) -> dict[str, Tensor]:
        """The parameters as they are now, by name."""
        return {name: self.holder._parameters[name] for name in self.names}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        shape = self.holder._parameters[self.weight].shape
        out, rest = (shape[1], shape[:1]) if self.transposed else (shape[0], shape[1:])
        return out, prod(rest)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def parameter(self) -> nn.Parameter:
        return self.holder._parameters[self.weight or self.names[0]]

    def matrix(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(W (out, in), b (out,) or None) as views of raw parameter values."""
        raw = values[self.weight]
        return (raw.T if self.transposed else raw if raw.dim() == 2 else raw.flatten(1)), values.get(self.bias)

    def _seen(self, statistic: str) -> Tensor | None:
        return self.matrix(self.seen[statistic])[0] if statistic in self.seen else None

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of W on the calibration data, (out, in), where the method asked for it."""
        return self._seen("gradient")

    @property
    def squares(self) -> Tensor | None:
        """The squared gradients of W, (out, in), summed over the backwards of the calibration."""
        return self._seen("squares")

    @property
    def inputs(self) -> Tensor | None:
        """The mean magnitude of each input on the calibration data, (in,)."""
        return self.seen.get("inputs", {}).get("x")

    @property
    def moments(self) -> Tensor | None:
        """The mean of x xᵀ over the inputs x on the calibration data, (in, in)."""
        return self.seen.get("moments", {}).get("x")

    def raw(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """The inverse of `matrix`, in the parameters' own dtypes."""
        stored = self.holder._parameters
        values = {self.weight: (W.T if self.transposed else W.reshape(stored[self.weight].shape)).to(stored[self.weight].dtype)}
        return values if b is None else values | {self.bias: b.to(stored[self.bias].dtype)}

    def call(self, forward, values: dict[str, Tensor], args, kwargs):
        """The owner's computation with other parameter values."""
        if self.standard:
            W, b = self.matrix(values)
            return F.linear(*args, W.to(args[0].dtype), None if b is None else b.to(args[0].dtype))
        with swapped(self.holder, values):
            return forward(self.owner, *args, **kwargs)

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """This site's operator with another matrix W (r, in) and no bias: a linear map, a look-up or a convolution."""
        if self.kind == "embedding":
            return F.embedding(x, W.T)
        W = W.to(x.dtype)
        if self.kind == "conv":
            m = self.holder
            return m._conv_forward(x, W.view(len(W), *m.weight.shape[1:]), None)
        return F.linear(x, W)

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """B (out, r) applied to the channels of h, which `apply` made."""
        B = B.to(h.dtype)
        return F.linear(h.movedim(1, -1), B).movedim(-1, 1) if self.kind == "conv" else F.linear(h, B)


class swapped:
    """Within the block, `module`'s own parameters have other values (tensors that may carry gradients)."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]):
        self.parameters, self.values = module._parameters, values

    def __enter__(self):
        self.before = {name: self.parameters[name] for name in self.values}
        self.parameters.update(self.values)

    def __exit__(self, *exc):
        self.parameters.update(self.before)


def kind_of(module: nn.Module) -> str:
    """`linear`, `embedding`, `conv`, `attention`, `norm`, `other` (has parameters of its own) or `container`."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, nn.Linear) or _is_gpt2_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if weight is not None and weight.dim() == 1 and "norm" in type(module).__name__.lower():
        return "norm"
    return "other" if any(p is not None for p in module._parameters.values()) else "container"


def _is_gpt2_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # weight is (in, out)


def sites(model: nn.Module) -> list[Site]:
    """Every place with parameters, in the model's order (adapters already attached are not part of the model)."""
    found = []
    attention = {}  # out_proj of an nn.MultiheadAttention is read by its parent, never called
    for path, module in model.named_modules():
        if path.split(".")[-1] == "tunesmith" or ".tunesmith." in f".{path}.":
            continue
        kind = kind_of(module)
        if kind == "attention":
            attention[id(module.out_proj)] = module
            projections = {"in_proj": "in_proj_weight"} if module.in_proj_weight is not None else {}
            projections |= {p: f"{p}_weight" for p in ("q_proj", "k_proj", "v_proj") if getattr(module, f"{p}_weight") is not None}
            for name, weight in projections.items():
                bias = "in_proj_bias" if name == "in_proj" and module.in_proj_bias is not None else None
                found.append(Site(f"{path}.{name}".lstrip("."), kind, module, module, weight, bias, names=(weight,) + ((bias,) if bias else ())))
            continue
        if kind == "container":
            continue
        if kind in ("linear", "conv") and _read_past(model, path):
            kind = "other"
        owner = attention.get(id(module), module)
        if kind in ("norm", "other"):
            found.append(Site(path, kind, module, owner))
            continue
        if owner is not module:
            kind = "attention"
        bias = "bias" if module._parameters.get("bias") is not None else None
        transposed = kind == "embedding" or _is_gpt2_conv1d(module)
        found.append(Site(path, kind, module, owner, "weight", bias, transposed))
    return found


def _read_past(model: nn.Module, path: str) -> bool:
    """Whether a layer's weights are read by the module around it, which does not call the layer: those of Mamba's and LFM2's mixers."""
    inside, _, name = path.rpartition(".")
    if name not in ("dt_proj", "conv1d", "conv"):
        return False
    around = model.get_submodule(inside)
    return type(around).__name__.endswith("ShortConv") if name == "conv" else hasattr(around, "A_log")


def width(model: nn.Module) -> int | None:
    """The residual stream's width, from the config or else the commonest input of a linear layer."""
    config = getattr(model, "config", None)
    for name in _WIDTHS:
        if isinstance(value := getattr(config, name, None), int):
            return value
    inputs = [s.in_features for s in sites(model) if s.kind == "linear"]
    return max(set(inputs), key=inputs.count) if inputs else None


def backbone(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model below its head (`model` itself where there is no such part)."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


def head_paths(model: nn.Module) -> list[str]:
    """Paths of the head: what a Hugging Face model has outside its backbone, or the last linear layer."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get else None
    inside = {id(m) for m in backbone(model).modules()}
    bare = hasattr(model, "base_model_prefix") and backbone(model) is model and not re.search("For[A-Z]", type(model).__name__)  # a backbone has no head
    heads = [s.path for s in sites(model) if s.holder is output or id(s.holder) not in inside]
    if heads or bare:
        return heads
    linear = [s.path for s in sites(model) if s.kind == "linear"]
    return linear[-1:]


def matches(pattern: str, path: str) -> bool:
    """True where `path` is `pattern`, ends in `.pattern`, or matches it whole as a regular expression."""
    if path == pattern or path.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def within(path: str, tops: list[str]) -> bool:
    """True where `path` is one of `tops` or lies below one."""
    return any(path == top or path.startswith(top + ".") for top in tops)


def find(model: nn.Module, targets: Targets, works_on: tuple[str, ...], method: str = "the method", skip: list[str] = ()) -> dict[str, tuple[Site, dict]]:
    """The sites that `targets` names, as path → (site, overrides).

    `targets`: `"all-linear"` (every linear layer but the head; convolutions where a model has no other),
    a suffix or regular expression, a list of them, or a mapping from pattern to overrides (first match wins).
    `skip`: module paths left out with all below them.

    Raises `TunesmithError` when nothing matches, or a match is of a kind the method cannot act on; warns of a
    pattern in a list that matched nothing.
    """
    known = [s for s in sites(model) if not within(s.path, skip)]
    if targets == "all-linear":
        return {s.path: (s, {}) for s in _all_linear(model, known, works_on, method)}
    patterns = {targets: {}} if isinstance(targets, str) else targets if isinstance(targets, dict) else dict.fromkeys(targets, {})
    found, used = {}, set()
    for site in known:
        if hits := [p for p in patterns if matches(p, site.path)]:
            found[site.path] = (site, patterns[hits[0]])
            used.update(hits[:1] if isinstance(targets, dict) else hits)
    for pattern in [p for p in patterns if p not in used]:
        message = _unmatched(model, pattern, known, method)
        if not found:
            raise TunesmithError(message)
        warnings.warn(message, stacklevel=4)  # the caller of adapt
    for site, overrides in found.values():
        if "method" not in overrides:  # that method says itself what it works on
            check_kind(site, works_on, method, known)
    return found


def check_kind(site: Site, works_on: tuple[str, ...], method: str, known: list[Site]) -> None:
    """Raises `TunesmithError` for a layer that the method cannot act on, naming one of `known` that it can."""
    if site.kind not in works_on:
        able = [s.path for s in known if s.kind in works_on]
        hint = f"; it works on {', '.join(works_on)} layers" + (f", here for instance {able[0]!r}" if able else "")
        raise TunesmithError(f"{method} cannot act on {site.path!r}, {'an' if site.kind[0] in 'aeo' else 'a'} {site.kind} layer ({type(site.holder).__name__}){hint}")


def _all_linear(model: nn.Module, known: list[Site], works_on: tuple[str, ...], method: str) -> list[Site]:
    heads = head_paths(model)
    for kinds in (("linear", "attention"), ("conv",), ("embedding",), ("norm",), ("other",)):
        if found := [s for s in known if s.kind in kinds and s.kind in works_on and s.path not in heads]:
            return found
    raise TunesmithError(f"{method} found no layer it can act on in {type(model).__name__}; it works on {', '.join(works_on)} layers")


def _unmatched(model: nn.Module, pattern: str, known: list[Site], method: str) -> str:
    paths = [s.path for s in known]
    if any(matches(pattern, p) for p in paths):
        return f"target {pattern!r} of {method} changes nothing: every layer it matches is taken by a target before it; put it first"
    inside = [path for path, _ in model.named_modules() if matches(pattern, path) and path]
    if inside and (below := [p for p in paths if p.startswith(inside[0] + ".")]):
        return f"target {pattern!r} of {method} matches {inside[0]!r}, which holds no weights itself; name layers inside it, such as {below[0]!r}"
    names = {p.split(".")[-1] for p in paths} | set(paths)
    hint = nearest(pattern, names) or f"; the model's layers end in {', '.join(sorted({p.split('.')[-1] for p in paths})[:12])}"
    return f"target {pattern!r} of {method} matches no layer of {type(model).__name__}{hint}"


def float_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype an adapter of this weight trains in: float32, or float64 over a float64 base."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
