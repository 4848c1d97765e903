"""Layouts of any shape: what is spread, collected, read off and cut agrees with who owns which index."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hesso_hf.structures import cut
from hesso_hf.structures.groups import Axis
from hesso_hf.structures.layout import Layout, Segment
from hesso_hf.structures.proof.ownership import NOBODY, layout_of
from tests.support.properties import decided

runs = st.builds(Segment, repeat=st.integers(1, 3), block=st.integers(1, 4))
fixed = st.builds(Segment, fixed=st.integers(1, 5))
layouts = st.lists(runs | fixed, min_size=1, max_size=4).map(tuple).map(Layout).filter(lambda layout: layout.per_unit)
units = st.integers(2, 6)


def owners(layout: Layout, count: int) -> torch.Tensor:
    """Who owns each index, from the definition: unit j owns i*U*k + j*k + r; nobody owns fixed ones."""
    found: list[int] = []
    for segment in layout.segments:
        if segment.fixed:
            found += [NOBODY] * segment.fixed
        else:
            found += [j for _ in range(segment.repeat) for j in range(count) for _ in range(segment.block)]
    return torch.tensor(found)


@decided
@given(layouts, units)
def test_spreading_and_collecting_are_each_others_transpose(layout: Layout, count: int) -> None:
    owner = owners(layout, count)
    assert layout.size(count) == len(owner)
    assert torch.equal(layout.expand(torch.arange(count), fixed_value=NOBODY), owner)
    values, sums = torch.arange(1.0, count + 1), torch.arange(1.0, len(owner) + 1)
    assert layout.expand(values, 0.0) @ sums == values @ layout.collect(sums, count)


@decided
@given(layouts, units)
def test_what_is_read_off_the_owners_spreads_alike(layout: Layout, count: int) -> None:
    owner = owners(layout, count)
    found = layout_of(owner, count)
    assert found is not None
    assert torch.equal(found.expand(torch.arange(count), fixed_value=NOBODY), owner)


@decided
@given(layouts, units, st.integers(1, 6))
def test_a_layout_fits_itself_at_any_number_of_units(layout: Layout, count: int, other: int) -> None:
    assert layout.fitted(count, other, layout.size(other), layout.per_unit) == layout


@decided
@given(layouts, units, st.integers(0, 1), st.data())
def test_a_cut_takes_what_masking_leaves(layout: Layout, count: int, dim: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    owner = owners(layout, count)
    shape = (len(owner), 3) if dim == 0 else (3, len(owner))
    tensor, axis = torch.arange(1.0, 3 * len(owner) + 1).view(shape), Axis("weight", dim, layout)
    masked, pruned = tensor.clone(), torch.ones(count, dtype=torch.bool)
    pruned[kept] = False
    axis.mask_(masked, pruned)
    small = cut._cut(tensor, axis, torch.tensor(kept), count)
    stays = torch.isin(owner, torch.tensor([NOBODY, *kept]))
    assert torch.equal(small, tensor.index_select(dim, stays.nonzero().flatten()))
    assert masked.sum() == small.sum()
    assert small.shape[dim] == layout.size(len(kept))
