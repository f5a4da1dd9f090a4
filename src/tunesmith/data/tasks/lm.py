"""Plain language modelling: every token is learned."""

from dataclasses import dataclass
from typing import ClassVar

from ...errors import TunesmithError
from ...models import encode_prompt
from .. import columns as cols
from ..rows import is_text_file


@dataclass
class LanguageModelling:
    """Column: `text`. The lines of a .txt file are one text; the rows of other files are texts with an EOS after each."""

    name: ClassVar[str] = "lm"
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("text",)
    optional: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def fits(dataset) -> bool:
        return cols.find(dataset.column_names, cols.TEXT) is not None and len(dataset.column_names) == 1

    def columns(self, dataset, given: dict[str, str] | None = None) -> dict[str, str]:
        names = dataset.column_names
        found = cols.given_columns(names, given, self)
        column = found.get("text") or cols.find(names, cols.TEXT)
        if column is None:
            raise cols.missing("text", names, self.name)
        if not is_text_file(dataset):
            cols.check_filled(dataset, {"text": column}, self.roles)
        return {"text": column}

    def labels(self, dataset, columns: dict[str, str]) -> None:
        return None

    def encode(self, dataset, columns: dict[str, str], tokenizer, labels: list[str] | None = None,
               max_length: int = 512) -> list[dict]:
        """The token stream cut into chunks of `max_length`; a last chunk of one token, which predicts nothing, is left out."""
        texts = [cols.as_text(text) for text in dataset[columns["text"]]]
        if is_text_file(dataset):
            ids = encode_prompt(tokenizer, "".join(texts))
        else:
            end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            ids = [token for text in texts for token in [*encode_prompt(tokenizer, text), *end]]
        max_length = min(max_length, tokenizer.model_max_length)
        chunks = [ids[i:i + max_length] for i in range(0, len(ids), max_length)]
        examples = [{"input_ids": chunk, "labels": chunk} for chunk in chunks if len(chunk) > 1]
        if not examples:
            raise TunesmithError(f'the column "{columns["text"]}" holds fewer than two tokens of text')
        return examples
