"""What is done to whole data sets: a fingerprint, an even sample, a held-out part."""

import hashlib
import json
import random

from ..errors import TunesmithError


def is_text_file(dataset) -> bool:
    """Rows are the lines of a .txt file, which belong together (each keeps its line end)."""
    return dataset.column_names == ["text"] and len(dataset) > 0 and str(dataset[0]["text"]).endswith("\n")


def fingerprint(dataset) -> str:
    """SHA-256 of the rows, whatever file format they came from."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def sample(dataset, limit: int | None):
    """At most `limit` rows, evenly spread over the data set (files are often sorted by label); of a text, its start."""
    if limit is None or limit >= len(dataset):
        return dataset
    if limit < 1:
        raise TunesmithError(f"limit is {limit}; it must be at least 1")
    if is_text_file(dataset):
        return dataset.select(range(limit))
    return dataset.select([i * len(dataset) // limit for i in range(limit)])


def per_label(dataset, count: int, label_column: str, seed: int = 0):
    """At most `count` rows of each label, drawn with `seed`, in the original order."""
    order = list(range(len(dataset)))
    random.Random(f"{seed}/per label").shuffle(order)
    labels, taken, kept = list(map(str, dataset[label_column])), {}, []
    for i in order:
        if taken.setdefault(labels[i], 0) < count:
            taken[labels[i]] += 1
            kept.append(i)
    return dataset.select(sorted(kept))


def split(dataset, fraction: float, seed: int = 0, label_column: str | None = None):
    """Hold out about `fraction` of the rows: returns (train, held out), both in the original order.

    With `label_column` the share is the same for every label, and a label's last row is never taken from train. The
    lines of a text file are cut once, the end being held out.
    """
    n = len(dataset)
    if not 0 < fraction < 1:
        raise TunesmithError(f"the held-out share is {fraction}; it must lie between 0 and 1")
    if n < 2:
        raise TunesmithError(f"{n} row cannot be split into train and validation; give an eval file")
    if is_text_file(dataset):
        cut = min(max(round(n * (1 - fraction)), 1), n - 1)
        return dataset.select(range(cut)), dataset.select(range(cut, n))
    order = list(range(n))
    random.Random(f"{seed}/split").shuffle(order)
    if label_column:
        labels = [str(label) for label in dataset[label_column]]
        order.sort(key=labels.__getitem__)  # stable: still random within a label
        first = {labels[i]: i for i in reversed(order)}
        if len(first) < n:
            order = [i for i in order if first[labels[i]] != i]
    want = min(max(round(n * fraction), 1), len(order))
    m = len(order)
    # every m/want-th row of the order: proportional in each label
    held = {order[i] for i in range(m) if (i + 1) * want // m > i * want // m}
    return dataset.select([i for i in range(n) if i not in held]), dataset.select(sorted(held))
