"""Positions in few bytes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tunesmith as ts
from tunesmith.engine.pack import pack, packable, packed_size, unpack


@given(st.sets(st.integers(0, 2**62), min_size=1, max_size=50))
def test_comes_back(positions):
    t = torch.tensor(sorted(positions))
    assert packable(t) and torch.equal(unpack(pack(t)), t) and packed_size(t) == len(pack(t))


def test_one_byte_for_gaps_below_128():
    t = torch.arange(0, 127 * 1000, 127, dtype=torch.int32)
    assert len(pack(t)) == 1000
    assert len(pack(torch.tensor([0, 128, 128 + 2**14]))) == 1 + 2 + 3


@pytest.mark.parametrize("t", [torch.tensor([3, 2]), torch.tensor([1, 1]), torch.tensor([-1, 2]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]), torch.tensor([], dtype=torch.long)])
def test_other_tensors_are_left_alone(t):
    assert not packable(t) and packed_size(t) == t.numel() * t.element_size()


@pytest.mark.parametrize("data", [[], [128], [1, 200], [255] * 9 + [1, 0]])
def test_damage(data):
    with pytest.raises(ValueError, match="not packed positions"):
        unpack(torch.tensor(data, dtype=torch.uint8))


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_are_read_or_refused(data):
    try:
        assert unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8)).dtype == torch.int64
    except ValueError:
        pass


@pytest.mark.parametrize("wrong", [24, 2**31 - 1])
def test_a_file_with_positions_outside_of_the_layer_is_refused(wrong, tmp_path):
    base = nn.Sequential(nn.Linear(6, 4))
    model = ts.adapt(copy.deepcopy(base), ts.SHiRA(rank=1), targets=["0"])
    model[0].tunesmith.adapters["default"].index[-1] = wrong
    ts.save(model, tmp_path / "a")
    with pytest.raises(ts.TunesmithError, match="'0.index' points outside of the layer, which has positions 0 to 23"):
        ts.load(base, tmp_path / "a")
    assert type(base[0]) is nn.Linear
