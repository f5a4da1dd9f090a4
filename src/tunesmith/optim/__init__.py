"""Optimisers over a model's adapters."""

from .build import build
