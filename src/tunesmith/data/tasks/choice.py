"""Multiple choice: the candidate answer to which the model gives the highest probability."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ...errors import TunesmithError, nearest
from .. import columns as cols
from . import prompts
from .math import QUESTION
from .sft import encode_conversations, row_messages

CHOICES = ("choices", "options", "candidates", "endings")
ANSWER = ("answer", "answerkey", "answer_key", "label", "correct", "target")
_ADAPTERS = re.compile(r"(answer|ending|option|solution)\d+|true|false")
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


class Question(NamedTuple):
    text: str
    candidates: list[str]
    """What the model may write."""
    names: list[str]
    """How the candidates are called in the data."""
    answer: int


@dataclass
class Choice:
    """Columns: `question`, `answer` and, unless the question lists its options as in LLM-Adapters, `choices`.

    In the LLM-Adapters format the answer is a label ("answer3") and the candidates are "the correct answer is answer1" …;
    the labels are taken from the "Answer format: answer1/answer2/…" that ends the question. With a column `choices`
    (a list, or {"text": [...], "label": [...]}) the candidates are its texts, and `answer` is an index from 0, a
    letter, one of the labels, or the text itself.
    """

    prompt: str | None = None
    name: ClassVar[str] = "choice"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    optional: ClassVar[tuple[str, ...]] = ("choices",)

    @staticmethod
    def fits(dataset) -> bool:
        names = dataset.column_names
        question, answer = cols.find(names, QUESTION), cols.find(names, ANSWER)
        if question is None or answer is None:
            return False
        return cols.find(names, CHOICES) is not None or answer == "answer" and all(
            isinstance(value, str) and _ADAPTERS.fullmatch(value) for value in dataset[:20][answer])

    def columns(self, dataset, given: dict[str, str] | None = None) -> dict[str, str]:
        names = dataset.column_names
        found = cols.given_columns(names, given, self)
        for role, candidates in (("question", QUESTION), ("choices", CHOICES), ("answer", ANSWER)):
            if role not in found and (column := cols.find(names, candidates, list(found.values()))):
                found[role] = column
            if role not in found and role != "choices":
                raise cols.missing(role, names, self.name)
        cols.check_filled(dataset, found, self.roles)
        found = {role: found[role] for role in self.roles if role in found}
        self.questions(dataset, found)
        return found

    def labels(self, dataset, columns: dict[str, str]) -> None:
        return None

    def questions(self, dataset, columns: dict[str, str]) -> list[Question]:
        """Every row with its candidates. Raises `TunesmithError` for a row whose answer is none of them."""
        answers = dataset[columns["answer"]]
        texts = [cols.as_text(text) for text in dataset[columns["question"]]]
        if columns.get("choices") in dataset.column_names:
            rows = zip(texts, dataset[columns["choices"]], answers, strict=True)
            return [_from_choices(n, *row) for n, row in enumerate(rows, 1)]
        common = sorted({cols.as_text(answer) for answer in answers})
        return [_from_text(n, text, cols.as_text(answer), common)
                for n, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)]

    def style(self, tokenizer) -> str:
        return prompts.style_for(tokenizer, self.prompt, "alpaca")

    def encode(self, dataset, columns: dict[str, str], tokenizer, labels: list[str] | None = None,
               max_length: int = 512) -> list[dict]:
        """Examples whose loss is on the right candidate."""
        conversations = [row_messages(q.text, q.candidates[q.answer]) for q in self.questions(dataset, columns)]
        return encode_conversations(conversations, tokenizer, self.style(tokenizer), max_length)


def _from_text(row: int, text: str, answer: str, common: list[str]) -> Question:
    found = _FORMAT.search(text)
    names = found[1].split("/") if found else common
    if answer not in names:
        raise TunesmithError(f'row {row}: the answer "{answer}" is none of {", ".join(names)}{nearest(answer, names)}')
    if len(names) < 2:
        raise TunesmithError(f'row {row} has one answer to choose from; end the question in "Answer format: a/b/…" '
                             "or give a column of choices")
    return Question(text, [f"the correct answer is {name}" for name in names], names, names.index(answer))


def _from_choices(row: int, text: str, choices, answer) -> Question:
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError as error:
            raise TunesmithError(f'row {row}: the choices "{choices[:40]}" are not a list such as ["a", "b"]') from error
    if isinstance(choices, dict):
        texts, names = list(choices["text"]), [str(label) for label in choices["label"]]
    else:
        texts = [cols.as_text(choice) for choice in choices]
        names = [chr(ord("A") + i) for i in range(len(texts))]
    key = cols.as_text(answer)
    where = (texts.index(key) if key in texts else names.index(key) if key in names
             else int(key) if key.isdecimal() and int(key) < len(texts) else None)
    if where is None:
        raise TunesmithError(f'row {row}: the answer "{key}" is none of the choices {", ".join(texts)[:80]}')
    return Question(text, texts, names, where)
