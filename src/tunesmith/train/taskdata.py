"""A task and its columns, for data that was trained on and for other data."""

from dataclasses import fields

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


def check_labels(source: str, rows, columns, task, tokenizer, labels) -> None:
    """Raises `TunesmithError` for evaluation data with a label that training does not have."""
    try:
        task.encode(rows, columns, tokenizer, labels, 4)
    except TunesmithError as error:
        raise TunesmithError(f"{source}, {error}") from error
