"""Pretrained models: loading them by name, and generating text with them."""

from .attention import quick_attention
from .generate import encode_prompt, evaluating, generate
from .load import load, resolve

__all__ = ["encode_prompt", "evaluating", "generate", "load", "quick_attention", "resolve"]
