"""Data sets: reading them, splitting them, and turning examples into batches. `data.tasks` says what to learn."""

from .batching import batches, by_length, collate, pack
from .load import load
from .rows import fingerprint, per_label, sample, split

__all__ = ["batches", "by_length", "collate", "fingerprint", "load", "pack", "per_label", "sample", "split"]
