"""The one exception a user of tunesmith meets, and how it names what would have been right."""

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """Bad input, said in one sentence: what was wrong, where, and what would be right."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """` (did you mean "lora"?)` for the closest of `choices`, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(f) for f in found)}?)" if found else ""


def invalid(what: str, error, fields: Iterable[str], noun: str = "field") -> str:
    """The first thing that a pydantic `ValidationError` says is wrong with `what`, which has these fields, in one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])[:80]
    if first["type"] == "extra_forbidden":
        return f"{what} has no {noun} {key!r}{nearest(key, fields) or '; it has ' + ', '.join(fields)}"
    return f"{what}: {key}={first['input']!r:.80} is not valid: {first['msg'].lower()}"
