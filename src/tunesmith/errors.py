"""The one exception a user of tunesmith meets, and how it names what would have been right."""

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """Bad input, said in one sentence: what was wrong, where, and what would be right."""


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """` (did you mean "lora"?)` for the closest of `choices`, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(f) for f in found)}?)" if found else ""
