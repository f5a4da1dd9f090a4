"""A task and its columns, for data that was trained on and for other data."""

import contextlib
from dataclasses import fields

import tunesmith as ts

from ..data import columns as cols
from ..data import tasks
from ..errors import TunesmithError, nearest


def task_of(name: str, options: dict):
    """The task with its options. Raises `TunesmithError` for an option it does not have."""
    known = [field.name for field in fields(tasks.TASKS[name])]
    for key in options:
        if key not in known:
            raise TunesmithError(f"task {name} has no option {key!r}{nearest(key, known) or '; it has ' + (', '.join(known) or 'none')}")
    return tasks.get(name, **options)


def columns_of(task, rows, columns: dict[str, str]) -> dict[str, str]:
    """The columns of other data for the same task: of the same names where they are there, guessed otherwise."""
    return task.columns(rows, {role: column for role, column in columns.items() if column in rows.column_names})


def check_known(source: str, rows, columns, task, tokenizer, labels: list[str] | None, task_names: list[str] | None) -> None:
    """Raises `TunesmithError` for evaluation data with a label or a task that training does not have, or without tasks."""
    if task_names and "task" not in columns:
        raise TunesmithError(f"{source} has no column for the task of its rows, which the training data have")
    try:
        cols.task_ids(rows, columns, task_names)
        if labels:
            task.encode(rows, columns, tokenizer, labels, 4)
    except TunesmithError as error:
        raise TunesmithError(f"{source}, {error}") from error


def with_tasks(examples: list[dict], ids: list[int] | None) -> list[dict]:
    """The examples, each with its row's task as `task_ids`, where that is known."""
    return examples if ids is None else [example | {"task_ids": task} for example, task in zip(examples, ids, strict=True)]


def in_tasks(model, ids):
    """The context `tunesmith.tasks(model, ids)`, or nothing where there are no ids."""
    return contextlib.nullcontext() if ids is None else ts.tasks(model, ids)
