"""One label for each text."""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from ...errors import TunesmithError, nearest
from .. import columns as cols


@dataclass
class Classification:
    """Columns: `text`, `label`, and `task` for methods that route by task."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("text", "label", "task")
    optional: ClassVar[tuple[str, ...]] = ("task",)

    @staticmethod
    def fits(dataset) -> bool:
        label = cols.find(dataset.column_names, cols.LABEL)
        return label is not None and cols.find(dataset.column_names, cols.TEXT, [label]) is not None

    def columns(self, dataset, given: dict[str, str] | None = None) -> dict[str, str]:
        names = dataset.column_names
        found = cols.given_columns(names, given, self)
        for role, candidates in (("label", cols.LABEL), ("text", cols.TEXT)):
            if role not in found:
                column = cols.find(names, candidates, list(found.values()))
                if column is None:
                    raise cols.missing(role, names, self.name)
                found[role] = column
        cols.check_filled(dataset, found, self.roles)
        return {role: found[role] for role in self.roles if role in found}

    def labels(self, dataset, columns: dict[str, str]) -> list[str]:
        """The distinct labels, sorted (as numbers if all are). Warns about labels that occur once."""
        counts = Counter(map(str, dataset[columns["label"]]))
        if len(counts) < 2:
            raise TunesmithError(f'the column "{columns["label"]}" holds only the label "{next(iter(counts), "")}"; '
                                 "a classifier needs two or more")
        once = sorted(label for label, times in counts.items() if times == 1)
        if once:
            shown = ", ".join(f'"{label}"' for label in once[:5]) + (", …" if len(once) > 5 else "")
            warnings.warn(f"{len(once)} of {len(counts)} labels occur in one row only and can hardly be learned: {shown}",
                          stacklevel=2)
        return cols.distinct(counts)

    def encode(self, dataset, columns: dict[str, str], tokenizer, labels: list[str] | None = None,
               max_length: int = 512) -> list[dict]:
        """Examples with the class index as `labels`. Raises `TunesmithError` for a label that is not in `labels`."""
        index = {label: i for i, label in enumerate(labels or self.labels(dataset, columns))}
        texts = [cols.as_text(text) for text in dataset[columns["text"]]]
        targets = []
        for row, value in enumerate(dataset[columns["label"]], 1):
            label = str(value)
            if label not in index:
                raise TunesmithError(f'row {row} has the label "{label}", which is not among the {len(index)} labels '
                                     f"of the training data{nearest(label, index)}")
            targets.append(index[label])
        return [{"input_ids": ids, "labels": target}
                for ids, target in zip(truncated(tokenizer, texts, max_length), targets, strict=True)]


def truncated(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """The first `max_length` tokens of each text, special tokens included; very long texts are cut before tokenising."""
    max_length = min(max_length, tokenizer.model_max_length)
    rows = []
    for start in range(0, len(texts), 1000):
        chunk = texts[start:start + 1000]
        rows += _cut(tokenizer, chunk, max_length, 16 * max_length)
    return rows


def _cut(tokenizer, texts: list[str], max_length: int, characters: int) -> list[list[int]]:
    rows = tokenizer([text[:characters] for text in texts], truncation=True, max_length=max_length)["input_ids"]
    # long tokens (runs of spaces, unknown words): too few came out, take twice as much text
    short = [i for i, row in enumerate(rows) if len(row) < max_length and len(texts[i]) > characters]
    if short:
        for i, row in zip(short, _cut(tokenizer, [texts[i] for i in short], max_length, 2 * characters), strict=True):
            rows[i] = row
    # a text of nothing that the tokenizer knows still has to be one token long
    return [row or [tokenizer.unk_token_id or tokenizer.eos_token_id or 0] for row in rows]
