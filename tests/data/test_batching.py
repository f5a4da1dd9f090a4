"""Batches, padding and packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tunesmith.data import batches, collate, pack
from tunesmith.data.batching import segment_mask
from tunesmith.errors import TunesmithError

torch.set_num_threads(1)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=80)


def examples_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, tiny.VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]


@given(lengths, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.one_of(st.none(), st.integers(1, 100)))
@settings(deadline=None)
def test_an_epoch_has_every_index_once_and_is_a_function_of_seed_and_epoch(lengths, size, seed, epoch, group, max_tokens):
    examples = examples_of(lengths)
    options = {"group_by_length": group, "max_tokens": max_tokens}
    cut = batches(examples, size, seed, epoch, **options)
    assert sorted(i for batch in cut for i in batch) == list(range(len(lengths))) and max(map(len, cut)) <= size
    assert cut == batches(examples, size, seed, epoch, **options)
    if max_tokens:
        assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in cut)
    else:
        assert len(cut) == -(-len(lengths) // size)


def test_epochs_and_seeds_differ_and_the_order_never_changes_between_versions():
    examples = examples_of([7, 3, 5, 1, 8, 2, 6, 4])
    assert batches(examples, 3, 0, 0) == [[7, 6, 4], [1, 2, 0], [3, 5]], "a run begun with an older version could not resume"
    assert len({str(batches(examples, 3, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    with pytest.raises(TunesmithError, match="batch_size is 0"):
        batches(examples, 0, 0, 0)


def test_grouping_by_length_saves_padding():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 200, (1000,), generator=draw).tolist()
    examples = examples_of(lengths)

    def padded(group):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches(examples, 16, 0, 0, group_by_length=group))

    assert padded(True) < 1.1 * sum(lengths) < 1.6 * sum(lengths) < padded(False)


@given(lengths, st.sampled_from(["left", "right"]), st.integers(0, 4))
@settings(deadline=None)
def test_collate_pads_and_nothing_else(lengths, side, pad_id):
    examples = examples_of(lengths)
    batch = collate(examples, pad_id, side)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), ((len(lengths), max(lengths)), torch.int64)
    )
    for i, example in enumerate(examples):
        there = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][there].tolist() == example["input_ids"] and batch["labels"][i][there].tolist() == example["labels"]
        assert (batch["input_ids"][i][~there] == pad_id).all() and (batch["labels"][i][~there] == -100).all()
        assert there.tolist() == sorted(there.tolist(), reverse=side == "right")


def test_collate_of_class_indices_and_of_inputs_alone():
    batch = collate([{"input_ids": [5, 6], "labels": 3}, {"input_ids": [7], "labels": 0}], 0)
    assert batch["labels"].tolist() == [3, 0] and "labels" not in collate([{"input_ids": [5]}], 0)


@given(lengths, st.integers(40, 100))
@settings(deadline=None)
def test_packing_keeps_every_document_whole(lengths, max_length):
    examples = examples_of(lengths)
    blocks = pack(examples, max_length)
    found = []
    for block in blocks:
        size = len(block["input_ids"])
        assert size <= max_length and all(len(values) == size for values in block.values())
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for n, (start, end) in enumerate(zip(starts, [*starts[1:], size], strict=True), 1):
            assert block["position_ids"][start:end] == list(range(end - start)) and set(block["segment_ids"][start:end]) == {n}
            assert block["labels"][start] == -100
            found.append((block["input_ids"][start:end], block["labels"][start + 1 : end]))
    assert sorted(found) == sorted((e["input_ids"], e["labels"][1:]) for e in examples)
    # best fit: no two blocks could be one, but for the order in which they were filled
    assert len(blocks) <= 2 * sum(lengths) // max_length + 1


def test_a_document_that_does_not_fit_is_said():
    with pytest.raises(TunesmithError, match="example 1 has 9 tokens and does not fit a block of 8"):
        pack(examples_of([3, 9]), 8)


def summed_loss(model, batch):
    labels = batch.pop("labels")
    logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_loss_and_gradient_are_those_of_the_examples_alone(kind, attention):
    model = tiny.BUILDERS[kind](attn_implementation=attention).double()
    examples = examples_of([9, 4, 17, 2, 12, 5])
    alone = sum(summed_loss(model, collate([example], 0)) for example in examples)
    expected = torch.autograd.grad(alone, list(model.parameters()))
    blocks = pack(examples, 24)
    assert len(blocks) < 4 and len({len(block["input_ids"]) for block in blocks}) > 1, "several documents in a block, and padding"
    packed = summed_loss(model, collate(blocks, 0, dtype=torch.float64))
    torch.testing.assert_close(packed, alone, rtol=1e-10 if attention == "sdpa" else 1e-6, atol=0)
    tolerance = {"rtol": 1e-7, "atol": 1e-10} if attention == "sdpa" else {"rtol": 1e-3, "atol": 1e-5}  # eager: softmax in float32
    for got, want in zip(torch.autograd.grad(packed, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_a_document_does_not_see_the_others():
    mask = segment_mask(torch.tensor([[1, 1, 2, 2, 0]]))[0, 0]
    assert (mask == 0).int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert torch.isfinite(segment_mask(torch.tensor([[1, 2]]), torch.bfloat16)).all()
