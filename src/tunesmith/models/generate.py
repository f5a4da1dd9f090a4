"""Greedy or beam-search text from prompts, the same for a prompt alone and in any batch."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from .hub import quiet


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own training flag back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a text that a model goes on writing: a leading BOS where the tokenizer adds one, never an EOS.

    A BOS that a chat template already wrote into the text is not doubled.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer.encode("a")[:1] == [bos]:
        ids = [bos, *ids]
    return ids


def _end_tokens(model, tokenizer) -> list[int]:
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids] if ids is not None else [])
    return sorted(found)


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[:min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _stopping(tokenizer, stop: Sequence[str], width: int):
    """Ends a row once a stop string is in the text after its first `width` tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtStopString(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            # a stop string spans at most as many tokens as it has bytes
            tail = input_ids[:, width:][:, -max(len(s.encode()) for s in stop) - 1:]
            return torch.tensor([any(s in text for s in stop) for text in tokenizer.batch_decode(tail)],
                                device=input_ids.device)

    return StoppingCriteriaList([AtStopString()] if stop else [])


def generate(model, tokenizer, prompts: Sequence[str | list[int]], max_new_tokens: int = 128, batch_size: int = 8,
             stop: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None,
             num_beams: int = 1, virtual: int = 0) -> list[str]:
    """The continuation of each prompt, in the order given, ended at EOS, at a `stop` string (left out) or by length.

    `prompts` are texts or token ids. Prompts of similar length share a batch, padded on the left, with positions that
    start at each prompt's first token. `progress(done, total)` is called after every batch. Sampling settings of the
    model are ignored: the answer is the greedy one (or the best of `num_beams`). Training flags are restored. `virtual`:
    tokens that an adapter puts before each prompt.
    """
    from transformers import GenerationConfig

    stop = [s for s in stop or () if s]
    encoded = [encode_prompt(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad
    positions = (getattr(model.config, "max_position_embeddings", None) or sys.maxsize) - virtual
    max_new_tokens = min(max_new_tokens, positions - 1)
    # a prompt that is too long keeps its end; an empty one still needs a token to start from
    encoded = [ids[max_new_tokens - positions:] or [start] for ids in encoded]
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams, use_cache=True,
                              eos_token_id=ends or None, pad_token_id=pad, repetition_penalty=1.0,
                              no_repeat_ngram_size=0)
    device = next(model.parameters()).device
    results = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))  # longest first: memory runs out early
    window = getattr(model.config, "sliding_window", None) or getattr(model.config, "window_size", None) or sys.maxsize
    if virtual and max(map(len, encoded), default=0) + virtual + max_new_tokens > window:
        # padding would push the virtual tokens out of the window: no row gets any
        alike = [list(rows) for _, rows in itertools.groupby(order, key=lambda i: len(encoded[i]))]
    else:
        alike = [order]
    batches = [rows[first:first + batch_size] for rows in alike for first in range(0, len(rows), batch_size)]
    done = 0

    with evaluating(model), quiet():  # transformers warns about the sampling settings that are ignored
        for batch in batches:
            width = max(len(encoded[i]) for i in batch)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch], device=device)

            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config,
                                    stopping_criteria=_stopping(tokenizer, stop, width))
            for i, row in zip(batch, output[:, width:].tolist(), strict=True):
                length = next((n for n, token in enumerate(row) if token in ends), len(row))
                results[i] = _cut(tokenizer.decode(row[:length], skip_special_tokens=True), stop)
            done += len(batch)
            if progress:
                progress(done, len(order))
    return results
