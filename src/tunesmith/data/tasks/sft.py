"""Supervised fine-tuning on conversations: the loss is on the answers only."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

from ...errors import TunesmithError
from .. import columns as cols
from . import prompts

MESSAGES = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass
class SFT:
    """Columns: `messages` (lists of {"role", "content"}), or `prompt` and `response`, with `input` and `system` if there.
    `task` is for methods that route by task.

    `prompt` is the prompt style: the tokenizer's chat template where it has one, else "plain".
    """

    prompt: str | None = None
    name: ClassVar[str] = "sft"
    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("messages", "prompt", "response", "input", "system", "task")
    optional: ClassVar[tuple[str, ...]] = ("input", "system", "task")

    @staticmethod
    def fits(dataset) -> bool:
        names = dataset.column_names
        if cols.find(names, MESSAGES):
            return True
        prompt = cols.find(names, cols.PROMPT)
        return prompt is not None and cols.find(names, cols.RESPONSE[:-1], [prompt]) is not None

    def columns(self, dataset, given: dict[str, str] | None = None) -> dict[str, str]:
        names = dataset.column_names
        found = cols.given_columns(names, given, self)
        if not found.keys() - {"task"} and (column := cols.find(names, MESSAGES)):
            found["messages"] = column
        if "messages" in found:
            cols.check_filled(dataset, found, ("messages", "task"))
            self._check_messages(dataset, found["messages"])
            return {role: found[role] for role in ("messages", "task") if role in found}
        for role, candidates in (("prompt", cols.PROMPT), ("response", cols.RESPONSE)):
            if role not in found:
                column = cols.find(names, candidates, list(found.values()))
                if column is None:
                    raise cols.missing(role, names, self.name)
                found[role] = column
        for role in ("input", "system"):
            if role not in found and role in names and role not in found.values():
                found[role] = role
        cols.check_filled(dataset, found, ("prompt", "response", "task"))
        return {role: found[role] for role in self.roles if role in found}

    @staticmethod
    def _check_messages(dataset, column: str) -> None:
        for row, value in enumerate(dataset[column], 1):
            try:
                turns = _turns(value)
            except (AttributeError, KeyError, TypeError) as error:
                raise TunesmithError(f'row {row}: the column "{column}" should hold messages such as '
                                     '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]') from error
            if turns[-1]["role"] != "assistant" or cols.is_blank(turns[-1]["content"]):
                raise TunesmithError(f"row {row}: the last message is not an answer of the assistant")

    def labels(self, dataset, columns: dict[str, str]) -> None:
        return None

    def conversations(self, dataset, columns: dict[str, str]) -> list[list[dict]]:
        """Each row as messages {"role", "content"}, the last one being the assistant's answer."""
        if "messages" in columns:
            return [_turns(value) for value in dataset[columns["messages"]]]
        texts = []
        for role in ("prompt", "response", "input", "system"):
            there = columns.get(role) in dataset.column_names
            texts.append([cols.as_text(v) if not cols.is_blank(v) else "" for v in dataset[columns[role]]] if there
                         else [""] * len(dataset))
        return [row_messages(*row) for row in zip(*texts, strict=True)]

    def style(self, tokenizer) -> str:
        return prompts.style_for(tokenizer, self.prompt, "plain")

    def encode(self, dataset, columns: dict[str, str], tokenizer, labels: list[str] | None = None,
               max_length: int = 512) -> list[dict]:
        """Examples whose `labels` are -100 except on the assistant's answers. Warns how many were too long."""
        return encode_conversations(self.conversations(dataset, columns), tokenizer, self.style(tokenizer), max_length)


def _turns(value: list[dict]) -> list[dict]:
    turns = [{"role": turn.get("role") or turn["from"], "content": turn.get("content") or turn.get("value") or ""}
             for turn in value]
    return [{"role": _ROLES.get(turn["role"], turn["role"]), "content": turn["content"]} for turn in turns]


def row_messages(question: str, answer: str, context: str = "", system: str = "") -> list[dict]:
    """A question and its answer as messages."""
    first = [{"role": "system", "content": system}] if system else []
    asked = {"role": "user", "content": question} | ({"input": context} if context else {})
    return [*first, asked, {"role": "assistant", "content": answer}]


def encode_conversations(conversations: list[list[dict]], tokenizer, style: str, max_length: int) -> list[dict]:
    examples = [prompts.supervised(tokenizer, prompts.spans(tokenizer, messages, style), max_length)
                for messages in conversations]
    cut = sum(len(example["input_ids"]) == max_length for example in examples)
    if cut:
        warnings.warn(f"{cut} of {len(examples)} examples fill max_length={max_length} tokens and may have been cut",
                      stacklevel=3)
    return examples
