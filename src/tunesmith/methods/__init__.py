"""Every method, one file each. To add one: write its file and import its class here."""

import sys
from dataclasses import dataclass
from types import ModuleType

from .dora import DoRA
from .full import BitFit, Full, LinearProbe, LNTuning
from .ia3 import IA3
from .lora import LoRA, PiSSA, RSLoRA
from .method import Method, adapt, parse, registry
from .prefix_tuning import PrefixTuning
from .prompt_tuning import PromptTuning
from .series_adapter import SeriesAdapter


@dataclass(frozen=True)
class MethodInfo:
    """What the registry says of a method."""

    name: str
    family: str
    title: str
    paper: str
    mergeable: bool
    quantized_base_ok: bool
    works_on: tuple[str, ...]


class _Methods(ModuleType):
    """This package is also the function that lists what is in it: `tunesmith.methods()`."""

    def __call__(self) -> list[MethodInfo]:
        """Every registered method."""
        facts = ("family", "title", "paper", "mergeable", "quantized_base_ok", "works_on")
        return [MethodInfo(name, *(getattr(cls, fact) for fact in facts)) for name, cls in registry.items()]


sys.modules[__name__].__class__ = _Methods
