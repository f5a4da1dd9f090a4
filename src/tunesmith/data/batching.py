"""Examples to batches: grouping by length, padding, packing. Everything here is a function of its arguments alone."""

import random
from collections.abc import Iterable, Sequence

import torch

from ..errors import TunesmithError

IGNORE = -100
"""Label of a position that no loss is taken on."""


def by_length(lengths: Sequence[int], order: Iterable[int], batch_size: int,
              max_tokens: int | None = None) -> list[list[int]]:
    """Cut `order` into batches of at most `batch_size` indices and, padded, at most `max_tokens` tokens.

    An example that is longer than `max_tokens` on its own is a batch of one.
    """
    cut: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if not cut or len(cut[-1]) == batch_size or max_tokens and longest * (len(cut[-1]) + 1) > max_tokens:
            cut.append([])
            longest = lengths[i]
        cut[-1].append(i)
    return cut


def batches(examples: Sequence[dict], batch_size: int, seed: int = 0, epoch: int = 0, *, group_by_length: bool = True,
            max_tokens: int | None = None) -> list[list[int]]:
    """Index batches of one epoch: every index once, order drawn from `(seed, epoch)` only, so that a run can resume.

    With `group_by_length` the shuffled examples are sorted by length within windows of 50 batches (fewer when there are
    fewer than 200), which keeps padding low and each epoch's batches new, and then the batches are shuffled.
    """
    if batch_size < 1:
        raise TunesmithError(f"batch_size is {batch_size}; it must be at least 1")
    lengths = [len(example["input_ids"]) for example in examples]
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    draw.shuffle(order)
    if group_by_length:
        window = batch_size * max(1, min(50, len(order) // (4 * batch_size)))
        order = [i for start in range(0, len(order), window)
                 for i in sorted(order[start:start + window], key=lengths.__getitem__)]
    cut = by_length(lengths, order, batch_size, max_tokens)
    draw.shuffle(cut)
    return cut


def _padded(rows: Sequence[Sequence[int]], fill: int, side: str) -> torch.Tensor:
    width = max(map(len, rows))
    pad = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([[*p, *row] if side == "left" else [*row, *p] for row, p in zip(rows, pad, strict=True)])


def collate(examples: Sequence[dict], pad_id: int, side: str = "right",
            dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Pad examples to the longest of the batch.

    Returns int64 `input_ids` (b, t), `attention_mask` (b, t), `task_ids` (b,) where examples have one, and `labels`:
    (b,) class indices, or (b, t) with -100 where no loss is taken. Packed examples also get `position_ids` (b, t), and
    their mask is (b, 1, t, t), additive and of `dtype` (which must be the model's), so that a document sees only itself.
    """
    ids = [example["input_ids"] for example in examples]
    batch = {"input_ids": _padded(ids, pad_id, side)}
    if "segment_ids" in examples[0]:
        batch["position_ids"] = _padded([example["position_ids"] for example in examples], 0, side)
        segments = _padded([example["segment_ids"] for example in examples], 0, side)
        batch["attention_mask"] = segment_mask(segments, dtype)
    else:
        batch["attention_mask"] = _padded([[1] * len(row) for row in ids], 0, side)
    if "task_ids" in examples[0]:
        batch["task_ids"] = torch.tensor([example["task_ids"] for example in examples])
    if "labels" in examples[0]:
        labels = [example["labels"] for example in examples]
        batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else _padded(labels, IGNORE, side)
    return batch


def segment_mask(segment_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(b, t) document numbers → (b, 1, t, t) additive mask, causal within each document.

    Additive rather than boolean: eager attention adds the mask, and SDPA takes either. Padding (document 0) sees
    padding, so that no row is without a key.
    """
    t = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = same & torch.ones(t, t, dtype=torch.bool, device=segment_ids.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min)[:, None]


def pack(examples: Sequence[dict], max_length: int) -> list[dict]:
    """Lay documents end to end in blocks of at most `max_length` tokens, without cutting any (best fit, longest first).

    Each block has `input_ids`, `labels`, `position_ids` (from 0 in each document) and `segment_ids` (1, 2, …). The
    first label of a document is -100: it would be predicted from the document before. The summed loss of the blocks
    is that of the examples; source: best-fit packing, arXiv 2404.10830.

    Raises `TunesmithError` for an example longer than `max_length`.
    """
    blocks: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(max_length + 1)]  # free tokens -> blocks with exactly that much room
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i)):
        need = len(examples[i]["input_ids"])
        if need > max_length:
            raise TunesmithError(f"example {i} has {need} tokens and does not fit a block of {max_length}")
        free = next((n for n in range(need, max_length + 1) if room[n]), None)
        if free is None:
            blocks.append([])
            free, block = max_length, len(blocks) - 1
        else:
            block = room[free].pop()
        blocks[block].append(i)
        room[free - need].append(block)
    return [{
        "input_ids": [t for i in block for t in examples[i]["input_ids"]],
        "labels": [t for i in block for t in [IGNORE, *examples[i]["labels"][1:]]],
        "position_ids": [p for i in block for p in range(len(examples[i]["input_ids"]))],
        "segment_ids": [n for n, i in enumerate(block, 1) for _ in examples[i]["input_ids"]],
    } for block in blocks]
