"""Layouts: spreading, collecting and indexing agree with the definition, spelled out index by index."""

from __future__ import annotations

import pytest
import torch

from hesso_hf.errors import UnsupportedStructureError
from hesso_hf.structures import cut
from hesso_hf.structures.groups import Axis
from hesso_hf.structures.layout import Layout, Segment, block_layout, owned_layout
from hesso_hf.structures.proof.ownership import NOBODY, UNKNOWN, layout_of

UNITS = 5
LAYOUTS = {
    "one index a unit": block_layout(1),
    "block": block_layout(4),
    "stride": Layout((Segment(repeat=3, block=1),)),
    "stride of blocks": Layout((Segment(repeat=2, block=4),)),
    "fused qkv": Layout((Segment(1, 6), Segment(1, 3), Segment(1, 3))),
    "shared key and value": Layout((Segment(1, 4), Segment(fixed=7))),
    "fixed first": Layout((Segment(fixed=2), Segment(repeat=2, block=3), Segment(fixed=1))),
}


def owners(layout: Layout) -> list[int | None]:
    """The unit that owns each index, written from the definition: unit j owns i*U*k + j*k + r; None for fixed."""
    owner: list[int | None] = []
    for segment in layout.segments:
        if segment.fixed:
            owner += [None] * segment.fixed
            continue
        stretch: list[int | None] = [None] * (segment.repeat * UNITS * segment.block)
        for i in range(segment.repeat):
            for j in range(UNITS):
                for r in range(segment.block):
                    stretch[i * UNITS * segment.block + j * segment.block + r] = j
        owner += stretch
    return owner


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def test_sizes_agree_with_the_definition(layout: Layout) -> None:
    owner = owners(layout)
    assert layout.size(UNITS) == len(owner)
    assert [owner.count(j) for j in range(UNITS)] == [layout.per_unit] * UNITS


def test_expand_gives_each_index_its_units_value(layout: Layout) -> None:
    values = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5])
    expected = [-9.0 if j is None else float(values[j]) for j in owners(layout)]
    assert layout.expand(values, fixed_value=-9.0).tolist() == expected


def test_expand_keeps_bool_and_leaves_fixed_indices_unmasked(layout: Layout) -> None:
    pruned = torch.tensor([True, False, False, True, False])
    spread = layout.expand(pruned, fixed_value=False)
    assert spread.dtype == torch.bool
    assert spread.tolist() == [j is not None and bool(pruned[j]) for j in owners(layout)]


def test_collect_sums_each_units_indices(layout: Layout) -> None:
    owner = owners(layout)
    sums = torch.randn(len(owner), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [sum(float(s) for s, j in zip(sums, owner, strict=True) if j == unit) for unit in range(UNITS)]
    torch.testing.assert_close(layout.collect(sums, UNITS), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_indices_are_those_of_the_units_and_the_fixed_ones(layout: Layout, kept: list[int]) -> None:
    expected = [index for index, j in enumerate(owners(layout)) if j is None or j in kept]
    assert layout.indices(torch.tensor(kept), UNITS).tolist() == expected


FUSED, SHARED = LAYOUTS["fused qkv"], LAYOUTS["shared key and value"]


@pytest.mark.parametrize(
    ("layout", "to_units", "size", "per_unit", "expected"),
    [
        (block_layout(4), 7, 7 * 10, 10, "block(10)"),
        (block_layout(4), 2, 2 * 4, 4, "block(4)"),
        (Layout((Segment(3, 1),)), 9, 27, 3, "stride(3x1)"),
        (Layout((Segment(2, 4),)), 3, 3 * 12, 12, "stride(2x6)"),
        (FUSED, 4, 4 * 24, 24, "segments(12, 6, 6)"),
        (FUSED, 4, 4 * 4, 4, "segments(2, 1, 1)"),
        (SHARED, 6, 6 * 10 + 20, 10, "segments(10, fixed 20)"),
    ],
)
def test_a_layout_is_carried_over_to_other_sizes(
    layout: Layout, to_units: int, size: int, per_unit: int, expected: str
) -> None:
    fitted = layout.fitted(UNITS, to_units, size, per_unit)
    assert str(fitted) == expected
    assert fitted is not None
    assert (fitted.size(to_units), fitted.per_unit) == (size, per_unit)


@pytest.mark.parametrize("to_units", [1, 4, 9])
def test_every_layout_fits_itself_at_another_number_of_units(layout: Layout, to_units: int) -> None:
    assert layout.fitted(UNITS, to_units, layout.size(to_units), layout.per_unit) == layout


@pytest.mark.parametrize(
    ("layout", "size", "per_unit"),
    [
        (block_layout(4), UNITS * 4 + 1, 4),  # an index too many that belonged to nobody nowhere
        (block_layout(4), UNITS * 4 - 1, 4),  # one too few
        (SHARED, UNITS * 4, 4),  # those that belong to nobody are gone
        (FUSED, UNITS * 10, 10),  # 10 don't divide as 6, 3 and 3
        (Layout((Segment(4, 1),)), UNITS * 6, 6),  # 6 don't divide over four runs
        (LAYOUTS["fixed first"], UNITS * 6 + 9, 6),  # which of two stretches would have grown?
    ],
)
def test_a_layout_that_does_not_fit_is_none(layout: Layout, size: int, per_unit: int) -> None:
    assert layout.fitted(UNITS, UNITS, size, per_unit) is None


@pytest.mark.parametrize("experts", [3, 4, 16])
def test_with_more_experts_a_channel_lies_in_more_runs(experts: int) -> None:
    """A unit of a matrix of all experts' rows is a channel in each: runs are added, blocks stay single rows."""
    four = Layout((Segment(repeat=4, block=1),))
    fitted = four.fitted(UNITS, 7, 7 * experts, experts, by_runs=True)
    assert fitted == Layout((Segment(experts, 1),))
    assert four.fitted(UNITS, 7, 7 * 8, 8) == Layout((Segment(4, 2),))  # what heads that grow would be


@pytest.mark.parametrize("layout", [block_layout(2), FUSED, SHARED])
def test_blocks_and_several_segments_take_no_more_runs(layout: Layout) -> None:
    size, per_unit = layout.size(UNITS) + UNITS * layout.per_unit, 2 * layout.per_unit
    assert layout.fitted(UNITS, UNITS, size, per_unit, by_runs=True) is None
    assert layout.fitted(UNITS, UNITS, layout.size(UNITS), layout.per_unit, by_runs=True) == layout


def owner_tensor(layout: Layout) -> torch.Tensor:
    return torch.tensor([NOBODY if j is None else j for j in owners(layout)])


def test_a_layout_is_read_off_the_owners(layout: Layout) -> None:
    owner = owner_tensor(layout)
    found = layout_of(owner, UNITS)
    assert found is not None
    assert torch.equal(found.expand(torch.arange(UNITS), fixed_value=NOBODY), owner)
    assert (found.per_unit, found.size(UNITS)) == (layout.per_unit, len(owner))


@pytest.mark.parametrize(
    "owner",
    [
        [1, 0, 2, 3, 4],
        [4, 3, 2, 1, 0],
        [0, 0, 1, 2, 3, 4],  # blocks of several lengths
        [0, 1, 2, 3],  # a unit owns nothing
        [0, 1, 2, 3, 4, 0, 1, 2],  # some own more
        [0, 1, NOBODY, 2, 3, 4],  # a gap inside a run
        [0, 1, 2, 3, 4, 5],  # there is no unit 5
        [0, 1, 2, UNKNOWN, 4],
        [UNKNOWN] * 5,
    ],
)
def test_units_that_lie_otherwise_have_no_layout(owner: list[int]) -> None:
    assert layout_of(torch.tensor(owner), UNITS) is None


def test_an_axis_of_nobody_has_a_layout_without_units() -> None:
    found = layout_of(torch.full((6,), NOBODY), UNITS)
    assert found is not None
    assert (found.per_unit, found.size(UNITS)) == (0, 6)


def test_an_owned_axis_belongs_to_one_unit() -> None:
    layout = owned_layout(3, unit=1)
    assert (layout.size(UNITS), layout.per_unit, layout.owned, str(layout)) == (3, 0, 3, "owned(3)")
    assert layout.expand(torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5])).tolist() == [1.5] * 3
    assert layout.collect(torch.tensor([1.0, 2.0, 4.0]), UNITS).tolist() == [0.0, 7.0, 0.0, 0.0, 0.0]
    assert layout.indices(torch.tensor([0, 1]), UNITS).tolist() == [0, 1, 2]
    assert layout.indices(torch.tensor([0, 2]), UNITS).tolist() == []


def test_an_axis_that_is_shorter_than_its_units_need_is_named() -> None:
    axis = Axis("embeddings.weight", 1, Layout((Segment(1, 1),)))
    with pytest.raises(UnsupportedStructureError, match=r"embeddings.weight dimension 1 \(8\) is shorter than its 10"):
        cut._cut(torch.zeros(3, 8), axis, torch.tensor([0, 9]), 10)
