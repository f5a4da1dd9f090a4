"""Word problems: the model writes a solution, and the number or letter it ends in is compared."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from ...errors import TunesmithError
from .. import columns as cols
from .. import extract
from . import prompts
from .sft import encode_conversations, row_messages

QUESTION = ("question", "instruction", "problem", "prompt")
ANSWER = ("answer", "label", "solution", "target")
RATIONALE = ("rationale", "output", "solution")
RULES = ("official", "strict")
_LETTERS = re.compile(r"\s*\(?[A-E]\)?\.?\s*")


@dataclass
class Math:
    """Columns: `question`, `answer` (a number, a letter A–E, or a GSM8K solution ending in "#### n"), and `rationale`.

    `prompt` "alpaca" is the LLM-Adapters prompt to the letter, in its training and evaluation variants; "chat" the
    tokenizer's template (default where there is one). `rule` says which letter counts as the answer; both are
    reported. `num_beams` is 1 here and 4 in the paper.
    """

    prompt: str | None = None
    rule: str = "official"
    num_beams: int = 1
    name: ClassVar[str] = "math"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("question", "answer", "rationale")
    optional: ClassVar[tuple[str, ...]] = ("rationale",)

    def __post_init__(self):
        if self.rule not in RULES:
            raise TunesmithError(f'extraction rule "{self.rule}" is unknown; it can be {" or ".join(RULES)}')

    @staticmethod
    def fits(dataset) -> bool:
        question = cols.find(dataset.column_names, QUESTION)
        answer = cols.find(dataset.column_names, ANSWER[:1])
        if question is None or answer is None:
            return False
        some = [cols.as_text(value) for value in dataset[:20][answer]]
        return all("####" in a or _LETTERS.fullmatch(a) or re.fullmatch(r"\s*-?[\d,]*\.?\d+\s*", a) for a in some)

    def columns(self, dataset, given: dict[str, str] | None = None) -> dict[str, str]:
        names = dataset.column_names
        found = cols.given_columns(names, given, self)
        for role, candidates in (("question", QUESTION), ("answer", ANSWER), ("rationale", RATIONALE)):
            if role not in found and (column := cols.find(names, candidates, list(found.values()))):
                found[role] = column
            if role not in found and role != "rationale":
                raise cols.missing(role, names, self.name)
        cols.check_filled(dataset, found, ("question", "answer"))
        self.golds(dataset, found)
        return {role: found[role] for role in self.roles if role in found}

    def labels(self, dataset, columns: dict[str, str]) -> None:
        return None

    def golds(self, dataset, columns: dict[str, str]) -> list[float] | list[str]:
        """The right answers: letters if every one is, else numbers."""
        finals = [cols.as_text(answer).rpartition("####")[2].strip() for answer in dataset[columns["answer"]]]
        if all(_LETTERS.fullmatch(final) for final in finals):
            return [extract.letter(final) for final in finals]
        numbers = [extract.number(final) for final in finals]
        wrong = next((row for row, value in enumerate(numbers, 1) if math.isinf(value)), None)
        if wrong:
            raise TunesmithError(f'row {wrong}: the answer "{finals[wrong - 1][:40]}" holds no number and not every '
                                 "answer is a letter A–E")
        return numbers

    def score(self, text: str, gold: float | str, rule: str | None = None) -> tuple[str, bool]:
        """(the answer found in `text` or "", whether it is right)."""
        if isinstance(gold, str):
            found = extract.letter(text, rule or self.rule)
            return found, found == gold
        value = extract.number(text)
        return ("" if math.isinf(value) else f"{value:g}"), extract.same_number(value, gold)

    def solutions(self, dataset, columns: dict[str, str]) -> list[str]:
        """What a model learns to write: the worked answer without GSM8K's <<…>>, ending in "The answer is N."

        A rationale that does not end in the gold answer (those of the LLM-Adapters test files are a model's own, and
        often wrong) is not learned from; only the last sentence is.
        """
        written = []
        for row, gold in zip(dataset, self.golds(dataset, columns), strict=True):
            worked, mark, final = cols.as_text(row[columns["answer"]]).rpartition("####")
            end = f"The answer is {final.strip()}."
            if not mark and columns.get("rationale") in row and not cols.is_blank(row[columns["rationale"]]):
                worked = cols.as_text(row[columns["rationale"]])
                if not self.score(worked, gold, "strict")[1]:
                    worked = ""
                elif re.search(r"The answer is[^.]*\S\.?\s*$", worked):
                    end = ""
            written.append("\n".join(part for part in (re.sub(r"<<.*?>>", "", worked).strip(), end) if part))
        return written

    def style(self, tokenizer) -> str:
        return prompts.style_for(tokenizer, self.prompt, "alpaca")

    def questions(self, dataset, columns: dict[str, str]) -> list[str]:
        return [cols.as_text(question) for question in dataset[columns["question"]]]

    def encode(self, dataset, columns: dict[str, str], tokenizer, labels: list[str] | None = None,
               max_length: int = 512) -> list[dict]:
        """Examples whose loss is on the solution."""
        pairs = zip(self.questions(dataset, columns), self.solutions(dataset, columns), strict=True)
        return encode_conversations([row_messages(*pair) for pair in pairs], tokenizer, self.style(tokenizer), max_length)
