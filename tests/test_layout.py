"""Layouts: spreading, collecting and indexing agree with the definition, spelled out index by index."""

from __future__ import annotations

import pytest
import torch

from hesso_hf.layout import Layout, Segment, block_layout, candidate_layouts

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


def test_candidates_of_a_fused_qkv_axis() -> None:
    found = candidate_layouts((16, 16), granule=8)
    assert list(found) == ["block", "stride", "segments"]
    assert str(found["block"]) == "block(32)"
    assert str(found["stride"]) == "stride(4x8)"
    assert str(found["segments"]) == "segments(16, 8, 8)"
    assert all(layout.size(3) == 3 * 32 for layout in found.values())


def test_candidates_of_a_plain_axis() -> None:
    assert candidate_layouts((1,), granule=1) == {"block": block_layout(1)}
    assert list(candidate_layouts((2,), granule=1)) == ["block", "stride"]
    assert list(candidate_layouts((8,), granule=8)) == ["block"]


def test_candidates_with_a_shared_key_and_value_end_with_fixed_indices() -> None:
    for layout in candidate_layouts((8,), granule=8, fixed=16).values():
        assert layout.segments[-1] == Segment(fixed=16)
        assert layout.size(5) == 5 * 8 + 16
