"""From a recipe to a run folder: data, model, adapter, loop, evaluation, report."""

from importlib import import_module

# Imported when first used: checking a recipe must not wait for torch.
_HOME = {"Recipe": "recipe", "run": "loop", "prepare": "loop", "RunResult": "loop", "open_run": "folder", "Run": "folder"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
