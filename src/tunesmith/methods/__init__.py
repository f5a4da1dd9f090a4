"""Every method, one file each. To add one: write its file and import its class here."""

import sys
from dataclasses import dataclass
from types import ModuleType

from .adalora import AdaLoRA, ranks
from .bone import Bat, Bone, MiSS
from .combined import Combined
from .convpass import Convpass
from .dept import DePT
from .dora import DoRA
from .fact import FacTTK, FacTTT
from .fourierft import FourierFT
from .full import BitFit, Full, LinearProbe, LNTuning
from .hut import HUT
from .ia3 import IA3
from .id3 import ID3
from .l4q import L4Q
from .loftq import LoftQ
from .lora import LoRA, PiSSA, RSLoRA
from .mask_tuning import MaskTuning
from .method import Method, adapt, parse, registry
from .mhr import MHR, Poly, few_shot
from .mola import MoLA
from .neuroada import NeuroAda
from .p_tuning import PTuning, drop_encoder
from .paca import PaCA
from .parallel_adapter import ParallelAdapter
from .peqa import PEQA
from .prefix_tuning import PrefixTuning
from .prompt_tuning import PromptTuning
from .qwha import QWHA
from .repadapter import RepAdapter
from .s2_lora import S2LoRA
from .s2ft import S2FT, co_permuted
from .series_adapter import SeriesAdapter
from .shira import SHiRA
from .sketchtune import SketchTune
from .snell import SNELL, density
from .snella import SNELLA
from .soka import SoKA
from .spt import SPTAdapter, SPTLoRA
from .ssf import SSF
from .transformed_lora import TransformedLoRA
from .vera import VeRA
from .vpt import VPT
from .wara import WaRA


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
