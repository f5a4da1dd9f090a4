"""A conversation on standard input and output, with a run or with an untouched model."""

import sys
from collections.abc import Iterable, Iterator

from .. import models
from ..engine.model import virtual_tokens
from ..errors import TunesmithError
from . import base
from .folder import is_run, open_run, pick_device


def chat(target: str, system: str | None = None, max_new_tokens: int = 256, lines: Iterable[str] | None = None) -> None:
    """Answer each line (default: standard input), printing tokens as they come. `/reset` forgets, `/quit` ends.

    Raises `TunesmithError` for a run whose task is not to write text.
    """
    from transformers import GenerationConfig, TextStreamer

    if is_run(target):
        run = open_run(target)
        if run.task.name == "classification":
            raise TunesmithError(f"{target} classifies and does not write text; use `tunesmith predict {target} TEXT`")
        model, tokenizer = run.model, run.tokenizer
    else:
        model, tokenizer = base.load(target, "sft")
        model.to(pick_device("auto"))
    ends = {tokenizer.eos_token_id, *_ids(model.generation_config.eos_token_id)} - {None}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id)
    room = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    room -= virtual_tokens(model)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in lines if lines is not None else _typed():
        line = line.strip()
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        ids = _encode(tokenizer, messages)
        while len(ids) + max_new_tokens > room and len(messages) > len(start) + 2:
            del messages[len(start) : len(start) + 2]  # the oldest question and its answer
            ids = _encode(tokenizer, messages)
        if len(ids) + max_new_tokens > room:
            print(f"that is {len(ids):,} tokens; this model takes {room - max_new_tokens:,} before an answer of {max_new_tokens:,}", file=sys.stderr)
            messages.pop()
            continue
        import torch

        with torch.inference_mode():
            inputs = torch.tensor([ids], device=next(model.parameters()).device)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer)
        messages.append({"role": "assistant", "content": tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)})


def _encode(tokenizer, messages: list[dict]) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:  # a model that only goes on writing
        text = "\n".join(m["content"] for m in messages)
    return models.encode_prompt(tokenizer, text)


def _ids(value) -> list[int]:
    return value if isinstance(value, list) else [value]


def _typed() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - gives input() a history

    print("/reset forgets the conversation, /quit ends it", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
