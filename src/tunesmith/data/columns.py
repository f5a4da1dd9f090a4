"""Which column plays which role: given, or guessed when obvious; and whether its values can be used."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence

from ..errors import TunesmithError, nearest

TEXT = ("text", "sentence", "utterance", "message", "query", "review", "comment", "content", "tweet", "document",
        "question", "input", "description", "title", "body")
LABEL = ("label", "labels", "category", "intent", "class", "target", "sentiment", "topic", "tag", "label_text")
PROMPT = ("prompt", "instruction", "question", "query", "input", "user")
RESPONSE = ("response", "completion", "output", "answer", "reply", "assistant", "target")


def find(names: Sequence[str], candidates: Sequence[str], taken: Sequence[str] = ()) -> str | None:
    """The first of `candidates` that is a column, whatever its case."""
    lower = {name.lower(): name for name in reversed(list(names)) if name not in taken}
    return next((lower[c] for c in candidates if c in lower), None)


def given_columns(names: Sequence[str], given: Mapping[str, str] | None, task) -> dict[str, str]:
    """`given`, less the optional roles whose column these data do not have (a warning says so).

    Raises `TunesmithError` for a role the task does not have and for a column that is not there.
    """
    found, roles = dict(given or {}), task.roles
    for role, column in list(found.items()):
        if role in task.optional and column not in names:
            warnings.warn(f'there is no column "{column}" (for {role}){nearest(column, names)}; it is left out', stacklevel=3)
            del found[role]
            continue
        if role not in roles:
            raise TunesmithError(f'task {task.name} has no column role "{role}"{nearest(role, roles)}; '
                                 f"its roles are {', '.join(roles)}")
        if column not in names:
            raise TunesmithError(f'there is no column "{column}" (for {role}){nearest(column, names)}; '
                                 f"the columns are {', '.join(names)}")
    return found


def missing(role: str, names: Sequence[str], task: str) -> TunesmithError:
    return TunesmithError(f"task {task} needs a column for {role}, and none of the columns {', '.join(names)} "
                          f"is obviously it; say which, for example columns: {{{role}: {names[0] if names else '…'}}}")


def is_blank(value) -> bool:
    """None, NaN, an empty list, or text of nothing but white space."""
    return (value is None or isinstance(value, float) and math.isnan(value)
            or isinstance(value, str) and not value.strip() or isinstance(value, list) and not value)


def check_filled(dataset, columns: Mapping[str, str], roles: Sequence[str]) -> None:
    """Raises `TunesmithError` naming the rows (counted from 1) in which a column of `roles` is blank."""
    for role in roles:
        if role in columns:
            rows = [n for n, value in enumerate(dataset[columns[role]], 1) if is_blank(value)]
            if rows:
                more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
                raise TunesmithError(f'the column "{columns[role]}" ({role}) is blank in row{"s" if len(rows) > 1 else ""} '
                                     f"{', '.join(map(str, rows[:5]))}{more} of {len(dataset)}; fill or remove them")


def distinct(values) -> list[str]:
    """The values there are, sorted (as numbers if all are)."""
    found = {str(value) for value in values}
    return sorted(found, key=int) if all(value.isdecimal() for value in found) else sorted(found)


def task_names(dataset, columns: Mapping[str, str]) -> list[str] | None:
    """The tasks that the column of the role `task` names, or None without such a column."""
    return distinct(dataset[columns["task"]]) if "task" in columns else None


def task_ids(dataset, columns: Mapping[str, str], known: Sequence[str] | None) -> list[int] | None:
    """Each row's place among the `known` tasks; None where nothing is known or said of tasks.

    Raises `TunesmithError` for a task that is not among them.
    """
    if known is None or columns.get("task") not in dataset.column_names:
        return None
    index = {task: i for i, task in enumerate(known)}
    for row, value in enumerate(dataset[columns["task"]], 1):
        if str(value) not in index:
            raise TunesmithError(f'row {row} is of task "{value}", which is not among the {len(index)} tasks of the training data'
                                 f"{nearest(str(value), index)}")
    return [index[str(value)] for value in dataset[columns["task"]]]


def as_text(value) -> str:
    """A cell as the text a model reads: JSON for objects, `true` for True, `3` for 3.0."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)
