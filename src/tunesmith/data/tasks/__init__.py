"""What can be learned from a data set. A task knows its columns, its examples and its headline metric."""

from ...errors import TunesmithError, nearest
from .choice import Choice
from .classification import Classification
from .lm import LanguageModelling
from .math import Math
from .sft import SFT

TASKS = {task.name: task for task in (Classification, SFT, Choice, Math, LanguageModelling)}

__all__ = ["TASKS", "Choice", "Classification", "LanguageModelling", "Math", "SFT", "get", "guess"]


def get(name: str, **options):
    """The task called `name`: classification, sft, choice, math or lm. `options` are its fields, e.g. `prompt="alpaca"`."""
    if name not in TASKS:
        raise TunesmithError(f'task "{name}" is unknown{nearest(name, TASKS)}; it can be {", ".join(TASKS)}')
    return TASKS[name](**options)


def guess(dataset) -> str:
    """The name of the task that the columns and the first answers obviously mean; raises `TunesmithError` if none."""
    for name in ("choice", "math", "sft", "classification", "lm"):
        if TASKS[name].fits(dataset):
            return name
    raise TunesmithError(f"the columns {', '.join(dataset.column_names)} do not tell the task; say which one it is "
                         f"({', '.join(TASKS)}) and which columns it takes")
