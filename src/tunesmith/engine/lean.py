"""The blocks between a language model's linear layers, computing what they computed but keeping less for backward.

Found by structure, whatever the model: an RMSNorm, and a gated MLP whose activation is SiLU. A module is taken only
after its class's own forward and the one here agreed bit for bit on random input.
"""

import copyreg
import functools
import weakref
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from .fused import Recipe, traced


def _normalize(h, eps):
    """(x / rms(x), 1 / rms(x)) of h as float32, in the memory of one tensor."""
    x = h.to(torch.float32)
    y = x.pow(2)
    root = torch.rsqrt(y.mean(-1, keepdim=True) + eps)
    return torch.mul(x, root, out=y), root


def _times(x, y):
    """x * y, in x's memory where the types allow it."""
    return x.mul_(y) if x.dtype == torch.promote_types(x.dtype, y.dtype) else x * y


def _rms_norm(eps, h, weight):
    return _times(_normalize(h, eps)[0].to(h.dtype), weight)


def _silu_mul(gate, up):
    return _times(F.silu(gate), up)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and the (N, 1) reciprocal root mean square."""

    @staticmethod
    def forward(ctx, h, weight, eps, recipe):
        x, root = _normalize(h, eps)
        ctx.save_for_backward(h, weight, root)
        ctx.recipe = recipe
        return _times(x.to(h.dtype), weight)

    @staticmethod
    def backward(ctx, g):
        h, weight, root = ctx.saved_tensors
        ctx.recipe.value = None
        gw = gh = None
        x = h.to(torch.float32) * root
        if ctx.needs_input_grad[1]:
            gw = (g * x.to(h.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            gx = (g * weight).to(torch.float32)
            mean = torch.linalg.vecdot(gx, x).unsqueeze(-1).div_(-x.shape[-1])
            gh = gx.addcmul_(x, mean).mul_(root).to(h.dtype)
        return gh, gw, None, None


class _SiLUMul(torch.autograd.Function):
    """Keeps its two inputs."""

    @staticmethod
    def forward(ctx, gate, up, recipe):
        ctx.save_for_backward(gate, up)
        ctx.recipe = recipe
        return _silu_mul(gate, up)

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        ctx.recipe.value = None
        g_gate = g_up = None
        if ctx.needs_input_grad[0]:
            g_gate = torch.ops.aten.silu_backward(g * up, gate)
        if ctx.needs_input_grad[1]:
            g_up = F.silu(gate).mul_(g)
        return g_gate, g_up, None


def _recording(*inputs) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs) and not traced()


def _rms_norm_forward(self, hidden_states):
    if not _recording(hidden_states):
        return self._lean[0].forward(self, hidden_states)
    eps = _eps(self)
    recipe = Recipe(functools.partial(_rms_norm, eps))
    return recipe.attach(_RMSNorm.apply(hidden_states, self.weight, eps, recipe), hidden_states, self.weight)


def _gated_mlp_forward(self, x):
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _recording(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    recipe = Recipe(_silu_mul)
    return self.down_proj(recipe.attach(_SiLUMul.apply(gate, up, recipe), gate, up))


def _eps(module) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _same(cls, forward, module, parts, *inputs) -> bool:
    """Whether both forwards agree bit for bit on a stand-in for the module with the given parts."""
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    stand_in = SimpleNamespace(**plain | parts)
    try:
        with torch.enable_grad():
            return all(torch.equal(cls.forward(stand_in, x), forward(stand_in, x)) for x in inputs)
    except Exception:  # it reads more than the parts: another kind of module
        return False


def _leaner(module: nn.Module):
    """The forward to use in place of the class's own, or None."""
    cls = type(module)
    random = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    if cls.__name__.endswith("RMSNorm") and hasattr(module, "weight") and (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        kinds = torch.float32, torch.bfloat16
        inputs = [normal(3, 40, dtype=kind) for kind in kinds]
        if all(_same(cls, _rms_norm_forward, module, {"weight": normal(40, dtype=kind)}, *inputs) for kind in kinds):
            return _rms_norm_forward
    if set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        gate, up, down = normal(24, 16), normal(24, 16), normal(16, 24)
        parts = {n: functools.partial(F.linear, weight=w) for n, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))}
        if _same(cls, _gated_mlp_forward, module, parts | {"act_fn": module.act_fn}, normal(3, 16)):
            return _gated_mlp_forward
    return None


class _Lean(type):
    """The class of the classes that `lean` gives: pickle makes them anew instead of looking them up by name."""


@functools.cache
def _lean_class(cls: type, forward) -> type:
    body = {"forward": forward, "_lean": (cls, forward), "__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    return _Lean(cls.__name__, (cls,), body)


copyreg.pickle(_Lean, lambda cls: (_lean_class, cls._lean))


_done: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def lean(model: nn.Module) -> nn.Module:
    """Let the model's RMSNorms and SiLU-gated MLPs keep less for backward; outputs stay the same bit for bit.

    In place, returns the model. Modules keep their identity, class name and state_dict keys; modules with an adapter
    of their own, or a forward of their own instance, are left alone. Doing it twice is doing it once.
    """
    if model in _done:
        return model
    _done.add(model)
    found: dict[tuple, object] = {}
    for module in model.modules():
        cls = type(module)
        if hasattr(cls, "_lean") or "forward" in vars(module) or "tunesmith" in module._modules:
            continue
        key = cls, *(type(m) for m in module._modules.values())
        if key not in found:
            found[key] = _leaner(module)
        if found[key]:
            module.__class__ = _lean_class(cls, found[key])
    return model


def unlean(model: nn.Module) -> nn.Module:
    """Undo `lean`."""
    _done.discard(model)
    for module in model.modules():
        if isinstance(type(module), _Lean):
            module.__class__ = type(module)._lean[0]
    return model
