"""Pretrained models: loading them by name, and generating text with them."""

from .generate import encode_prompt, evaluating, generate
from .load import load, resolve

__all__ = ["encode_prompt", "evaluating", "generate", "load", "resolve"]
