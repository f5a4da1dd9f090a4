"""tunesmith: parameter-efficient fine-tuning, every method on one engine."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "tunesmith.errors": ["TunesmithError"],
    "tunesmith.engine.model": ["trainable", "activate", "disabled", "merge", "unmerge", "detach"],
    "tunesmith.engine.calls": ["mixed", "tasks", "auxiliary_loss"],
    "tunesmith.engine.account": ["summary", "Summary"],
    "tunesmith.engine.loss": ["causal_lm_loss"],
    "tunesmith.schedule": ["stages", "IST", "LightPEFT"],
    "tunesmith.pruning": ["prune"],
    "tunesmith.methods.store": ["save", "load"],
    "tunesmith.methods": [
        "adapt", "Method", "MethodInfo", "co_permuted", "density", "drop_encoder", "ranks", "few_shot", "AdaLoRA", "Bat", "BitFit", "Bone", "Combined", "Convpass", "DePT", "DoRA", "FacTTK", "FacTTT", "FourierFT", "Full", "HUT", "IA3", "ID3", "L4Q", "LinearProbe",
        "LNTuning", "LoftQ", "LoRA", "MaskTuning", "MHR", "MiSS", "MoLA", "NeuroAda", "PaCA", "ParallelAdapter", "PEQA", "PiSSA", "Poly", "PrefixTuning", "PromptTuning", "PTuning", "QWHA", "RepAdapter", "RSLoRA", "S2FT", "S2LoRA", "SeriesAdapter", "SHiRA", "SketchTune", "SNELL", "SNELLA", "SoKA", "SPTAdapter", "SPTLoRA", "SSF",
        "TransformedLoRA", "VeRA", "VPT", "WaRA",
    ],
}  # fmt: skip
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
_CALLED = ("methods", "quantize")  # modules that are called: methods() lists the registry, quantize(model) packs weights
__all__ = sorted([*_WHERE, *_CALLED])


def __getattr__(name: str):
    """Names load on first use, so that importing tunesmith costs next to nothing."""
    if name in _CALLED:
        return importlib.import_module(f"tunesmith.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
