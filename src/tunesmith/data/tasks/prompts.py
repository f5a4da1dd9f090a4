"""Prompts, and which part of an example is learned."""

from collections.abc import Sequence

from ...errors import TunesmithError
from ...models import encode_prompt
from ..batching import IGNORE

_PAD = " " * 16
_TASK = "Below is an instruction that describes a task"
_CONTEXT = f"{_TASK}, paired with an input that provides further context"
_WRITE = "Write a response that appropriately completes the request."
# The prompts of LLM-Adapters, letter for letter: its training prompt (finetune.py) differs from the one it is
# evaluated with (evaluate.py) in spaces, and scores depend on them. Keys: (training, with input).
ALPACA = {
    (True, False): f"{_TASK}. {_WRITE}  \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n"
                   f"{_PAD}### Response:\n{_PAD}",
    (True, True): f"{_CONTEXT}. {_WRITE} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n"
                  f"{_PAD}### Input:\n{_PAD}{{input}}\n{_PAD}\n{_PAD}### Response:\n{_PAD}",
    (False, False): f"{_TASK}. {_WRITE} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n"
                    f"{_PAD}### Response:\n{_PAD}",
    (False, True): f"{_CONTEXT}. {_WRITE}\n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n"
                   f"{_PAD}### Input:\n{_PAD}{{input}}\n\n{_PAD}### Response:\n{_PAD}",
}
STYLES = ("chat", "alpaca", "plain")


def alpaca(instruction: str, input: str = "", training: bool = False) -> str:
    """The LLM-Adapters prompt up to the place where the answer begins."""
    return ALPACA[training, bool(input)].format_map({"instruction": instruction, "input": input})


def style_for(tokenizer, style: str | None, otherwise: str) -> str:
    """`style`, or by default the tokenizer's chat template where it has one."""
    if style is None:
        return "chat" if tokenizer.chat_template else otherwise
    if style not in STYLES:
        raise TunesmithError(f'prompt style "{style}" is unknown; it can be {", ".join(STYLES)}')
    if style == "chat" and not tokenizer.chat_template:
        raise TunesmithError('prompt style "chat" needs a tokenizer with a chat template; use "alpaca" or "plain"')
    return style


def _merged(message: dict) -> dict:
    content = f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]
    return {"role": message["role"], "content": content}


def prompt(tokenizer, messages: Sequence[dict], style: str, training: bool = False) -> str:
    """The text after which the next answer comes.

    `messages` are {"role", "content"}, a user's with "input" where there is further context. "chat" is the
    tokenizer's template; "alpaca" the LLM-Adapters prompt of the last user message; "plain" a tidy Alpaca-like one.
    """
    if style == "chat":
        return _chat(tokenizer, messages, True)
    if style == "alpaca":
        last = next(m for m in reversed(messages) if m["role"] == "user")
        return alpaca(last["content"], last.get("input", ""), training)
    heads = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    return "".join(f"{heads.get(m['role'], '')}{_merged(m)['content']}\n\n" for m in messages) + "### Response:\n"


def _chat(tokenizer, messages: Sequence[dict], ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template([_merged(m) for m in messages], tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # noqa: BLE001 - templates are programs and raise what they like
        raise TunesmithError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def spans(tokenizer, messages: Sequence[dict], style: str) -> list[tuple[str, bool]]:
    """A conversation as (text, is it learned) pieces: every answer of the assistant is learned, up to its end token.

    Where a template rewrites earlier turns, or for prompts of one turn, only the last answer is.
    """
    if style != "chat":
        return [(prompt(tokenizer, messages[:-1], style, training=True), False), (messages[-1]["content"], True)]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _chat(tokenizer, messages[:i], True), _chat(tokenizer, messages[:i + 1], False)
            if not after.startswith(before):
                after = before + message["content"]
            if not before.startswith(done):
                pieces, done = [], ""
            end = _after_end_token(after, tokenizer.eos_token)
            pieces += [(before[len(done):], False), (after[len(before):end], True)]
            done = after[:end]
    return pieces


def _after_end_token(text: str, eos: str | None) -> int:
    at = text.rfind(eos) if eos else -1
    return at + len(eos) if eos and at >= 0 and not text[at + len(eos):].strip() else len(text)


def supervised(tokenizer, pieces: Sequence[tuple[str, bool]], max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a text in pieces, -100 where nothing is learned; it ends in EOS.

    The whole text is tokenised at once if each beginning of it, tokenised alone, is a prefix of the whole (checked);
    otherwise piece by piece, so that the learned tokens follow exactly what generation will see. When it is too long,
    the beginning of the prompt goes first, down to `max_length // 2` tokens before the answer, and then the end.
    """
    ids, labels = _tokens(tokenizer, pieces)
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1] != eos:
        ids, labels = [*ids, eos], [*labels, eos]
    max_length = min(max_length, tokenizer.model_max_length)
    over = len(ids) - max_length
    if over > 0:
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        left = min(over, max(0, start - max_length // 2))
        ids, labels = ids[left:left + max_length], labels[left:left + max_length]
    return {"input_ids": ids, "labels": labels}


def _tokens(tokenizer, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    whole = encode_prompt(tokenizer, "".join(text for text, _ in pieces))
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    for piece, learned in pieces:
        text += piece
        start = encode_prompt(tokenizer, text)
        if whole[:len(start)] != start or len(start) < len(ids):
            break
        labels += start[len(ids):] if learned else [IGNORE] * (len(start) - len(ids))
        ids = start
    else:
        return ids, labels
    ids, labels = [], []
    for piece, learned in pieces:
        part = tokenizer.encode(piece, add_special_tokens=False) if ids else encode_prompt(tokenizer, piece)
        ids += part
        labels += part if learned else [IGNORE] * len(part)
    return ids, labels
