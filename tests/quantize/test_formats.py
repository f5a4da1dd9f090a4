"""Number formats: what they cost, how far they are off, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import TunesmithError
from tunesmith.quantize import Format, bits, feedback, formats
from tunesmith.quantize.clusters import kmeans

NAMES = Format.model_fields["format"].annotation.__args__


@given(st.integers(1, 300), st.sampled_from(bits.WIDTHS), st.integers(0, 9))
def test_packed_integers_come_back(n, width, seed):
    codes = torch.randint(0, 2**width, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = bits.pack(codes, width)
    assert torch.equal(bits.unpack(packed, n, width), codes)
    assert len(packed) == bits.size(n, width) <= n * width / 8 + 2
    levels = torch.randn(2**width)
    assert torch.equal(bits.values(packed, n, width, levels), levels[codes.long()])


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 12), st.sampled_from([16, 48, 96, 160]), st.sampled_from([None, 8, 32, "row"]), st.booleans())
def test_bytes_in_closed_form_and_rounding_twice(name, out, size, group, double):
    format = Format(format=name, group_size=group, double_quant=double and name.startswith("nf"))
    W = torch.randn(out, size, generator=torch.Generator().manual_seed(0))
    parts = format.encode(W)
    assert sum(t.nbytes for t in parts.values()) == format.bytes((out, size))
    once = format.decode(parts, (out, size))
    assert once.shape == W.shape and once.dtype == torch.float32
    if not double and name == "nf4":
        assert torch.allclose(format.decode(format.encode(once), (out, size)), once, atol=2e-3)


def test_errors_of_rounding_a_normal_weight():
    """The relative errors of the literature: NF4 .092, E2M1 .106 with an exact scale."""
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def error(format):
        return ((format.decode(format.encode(W), W.shape) - W).norm() / W.norm()).item()

    assert error(Format(format="nf4")) == pytest.approx(0.0920, abs=5e-4)
    assert error(Format(format="nf4", double_quant=True)) == pytest.approx(0.0920, abs=1e-3)
    assert error(Format(format="nf4", group_size=128)) == pytest.approx(0.0956, abs=5e-4)
    assert error(Format(format="mxfp4")) == pytest.approx(0.118, abs=5e-3)
    assert error(Format(format="nvfp4")) == pytest.approx(0.094, abs=2e-3)
    assert error(Format(format="int8")) < 0.006
    assert error(Format(format="sketch4")) < 0.098 and error(Format(format="nf4")) < error(Format(format="nf3")) < error(Format(format="nf2"))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_constants_and_short_rows(name):
    format = Format(format=name)
    for W in (torch.zeros(3, 8), torch.full((2, 24), 0.75), torch.randn(1, 2)):
        back = format.decode(format.encode(W), W.shape)
        assert torch.isfinite(back).all() and torch.allclose(back, W, atol=0.15 * W.abs().max().item() + 1e-7 if W.std() == 0 else 2)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("nf5", "unknown number format 'nf5' .*nf4"),
        ({"format": "int4", "groupsize": 64}, "no field 'groupsize'.*group_size"),
        ({"format": "int4", "group_size": "rows"}, "group_size='rows' is not valid"),
        ({"format": "int4", "group_size": 1}, "at least two weights"),
        ({"format": "int4", "double_quant": True}, "double_quant is for nf formats"),
        (4, "not 4"),
    ],
)
def test_what_is_wrong_with_a_format_is_said(value, match):
    with pytest.raises(TunesmithError, match=match):
        formats.parse(value)


def test_kmeans_finds_separate_clusters_and_weighs():
    rows = torch.tensor([[0.0, 0.1, 5.0, 5.1, 9.0, 9.1], [9.0, 1.0, 1.0, 5.0, 9.0, 5.0]])
    assert torch.allclose(kmeans(rows, 3), torch.tensor([[0.05, 5.05, 9.05], [1.0, 5.0, 9.0]]))
    assert torch.allclose(kmeans(torch.tensor([[0.0, 1.0]]), 1, torch.tensor([1.0, 3.0])), torch.tensor([[0.75]]))


def test_kmeans_against_scikit_learn():
    from sklearn.cluster import KMeans

    rows = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    ours = kmeans(rows, 8)
    for row, centres in zip(rows, ours, strict=True):
        best = KMeans(8, n_init=10, random_state=0).fit(row[:, None].numpy()).inertia_
        assert (row[:, None] - centres).square().amin(1).sum() < 1.15 * best


@pytest.mark.parametrize("name", ["int4", "int3", "nf4", "nf2", "sketch3", "nvfp4"])
@pytest.mark.parametrize("order", [False, True])
def test_calibrated_rounding_keeps_the_outputs(name, order):
    generator = torch.Generator().manual_seed(0)
    W, mix = torch.randn(48, 64, generator=generator), torch.randn(64, 64, generator=generator)
    X = torch.randn(500, 64, generator=generator) @ mix
    format = Format(format=name, group_size=32 if not name.startswith("sketch") else None)

    def error(parts):
        return ((format.decode(parts, W.shape) - W) @ X.T).square().mean().item()

    parts = feedback.encode(W, X.T @ X / 500, format, order)
    assert sum(t.nbytes for t in parts.values()) == format.bytes((48, 64))
    assert error(parts) < 0.8 * error(format.encode(W))


def test_calibration_refuses_what_it_cannot_do():
    with pytest.raises(TunesmithError, match="does not divide a row of 40"):
        feedback.encode(torch.randn(4, 40), torch.eye(40), Format(format="nf4", group_size=32))
    with pytest.raises(TunesmithError, match="not finite"):
        feedback.encode(torch.randn(4, 40), torch.full((40, 40), float("nan")), Format(format="int4"))


def test_a_group_is_the_nearest_that_divides_a_row():
    def group(wanted, row, name="int4"):
        return Format(format=name, group_size=wanted).group((3, row))

    assert [group(64, row) for row in (64, 576, 131, 262, 72, 40)] == [64, 64, 131, 131, 72, 40]
    assert group(None, 131, "mxfp4") == 131 and group(None, 130, "nvfp4") == 13 and group("row", 131) == 131 and group(64, 131, "nf4") == 64
    W = torch.randn(3, 131)
    assert sum(t.nbytes for t in Format(format="int4").encode(W).values()) == 3 * 131 // 2 + 1 + 3 * 3  # codes; a scale in half and a zero for each row
