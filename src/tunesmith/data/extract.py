"""Answers out of generated text, by the rules of LLM-Adapters (arXiv 2304.01933, evaluate.py and commonsense_evaluate.py)."""

import json
import math
import re

TOLERANCE = 1e-3
"""A number is right when it is within this of the gold one."""


def number(text: str) -> float:
    """The last number in `text` with commas removed, infinity if there is none. "10-3=7" ends in 7, "1e3" in 3."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else math.inf


def letter(text: str, rule: str = "official") -> str:
    """A choice A–E, "" if there is none.

    `rule` "official" takes the first such capital anywhere, as the paper's code does ("A car…" gives A); "strict"
    takes the one after "answer is".
    """
    if rule == "strict":
        found = re.search(r"answer is:?\s*\(?([A-E])\b", text)
        return found[1] if found else ""
    found = re.search(r"A|B|C|D|E", text)
    return found[0] if found else ""


def option(text: str, options: list[str]) -> str:
    """The first of `options` that occurs in `text` (case counts), "" if none does."""
    found = re.search("|".join(map(re.escape, options)), text)
    return found[0] if found else ""


def same_number(predicted: float, gold: float) -> bool:
    return abs(predicted - gold) <= TOLERANCE


def same_answer(expected: str, predicted: str) -> bool:
    """Equal texts, or equal JSON objects however they are written."""
    value = json_object(expected)
    return expected == predicted or value is not None and value == json_object(predicted)


def json_object(text: str) -> dict | None:
    """`text` as a JSON object, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
