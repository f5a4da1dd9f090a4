"""Scores of predictions."""

from collections import Counter
from collections.abc import Sequence

from .extract import json_object


def accuracy(expected: Sequence, predicted: Sequence) -> float:
    return sum(e == p for e, p in zip(expected, predicted, strict=True)) / len(expected)


def macro_f1(expected: Sequence, predicted: Sequence) -> float:
    """Mean over the classes that occur on either side of F1 = 2·hits / (expected + predicted), as scikit-learn counts it."""
    hits = Counter(e for e, p in zip(expected, predicted, strict=True) if e == p)
    sizes = Counter(expected) + Counter(predicted)
    return sum(2 * hits[c] / sizes[c] for c in sizes) / len(sizes)


def json_scores(expected: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """For answers that are JSON objects: share that parses, and share of the expected fields with the expected value.

    Empty when some expected answer is not a JSON object.
    """
    pairs = [(json_object(e), json_object(p)) for e, p in zip(expected, predicted, strict=True)]
    if not pairs or any(e is None for e, _ in pairs):
        return {}
    fields = [p is not None and key in p and p[key] == value for e, p in pairs for key, value in e.items()]
    return {"json_valid": sum(p is not None for _, p in pairs) / len(pairs),
            "json_field_accuracy": sum(fields) / len(fields) if fields else 1.0}
