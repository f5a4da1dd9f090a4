"""Optimisers over a model's adapters."""

from .build import build
from .galore import GaLore, NaturalGaLore, shape_bytes, state_bytes
