"""Schemes to try for a structure: layouts from the gradients, powers of c guessed, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ...errors import UnsupportedStructureError
from ..build import num_units
from ..groups import AxisName, Branch, Scheme
from ..layout import Layout, layout_with_rest
from .bench import Bench
from .branches import Division, discover_branches
from .norms import has_bare_layernorm
from .residual_stream import StreamAxis, inner_powers, stream_axes, stream_powers, written_patterns
from .width_constants import constants_by_width, powers_against


def inner_schemes(
    bench: Bench, structure: str, branches: list[Branch], axes: list[AxisName], division: Division
) -> Iterator[Scheme]:
    """Yield schemes for units inside the blocks, whose axes are divided into these branches."""
    yield from schemes_of(bench, branches, num_units(structure, bench.sizes), axes, bundle=division.bundle)


def schemes_of(
    bench: Bench,
    branches: list[Branch],
    units: int,
    axes: list[AxisName],
    granule: int = 1,
    per_channel: int = 0,
    bundle: int = 1,
) -> Iterator[Scheme]:
    """Yield schemes with these branches' layouts: units of each layer first, then those that all layers share."""
    known = stream_axes(bench.model, bench.axis_map, axes)
    shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
    for shared in (False, True):
        for powers in inner_powers(known):
            yield Scheme(
                tuple(branches), units // bundle, shifts, powers, shared=shared, granule=granule,
                per_channel=per_channel, bundle=bundle,
            )  # fmt: skip


def stream_schemes(bench: Bench, axes: list[AxisName]) -> Iterator[Scheme]:
    """Schemes for the residual stream: layouts by the slope, powers by the stream's structure."""
    units = bench.width
    layouts: dict[AxisName, Layout] = {}
    for name, dim in axes:
        info = bench.axis_map.parameters[name]
        runs, rest = divmod(info.shape[dim], units)
        layouts[info.pattern, dim] = layout_with_rest(runs, 1, rest)
    known, after = bench.stream(axes)
    found = constants_by_width(bench.model_class, bench.config, bench.sizes, bench.axis_map.coupling is not None)
    against = powers_against(bench.model, bench.input_ids, bench.axis_map, found) if found else {}
    for info in bench.axis_map.parameters.values():
        if info.pattern in against:
            layouts[info.pattern, 0] = layout_with_rest(0, 1, info.shape[0])
    shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
    centred = _subtracts_mean(bench, known)
    branch = Branch(("residual stream", 0), layouts)
    more = partial(bench.sides(axes, after).further_places, known)
    for powers in stream_powers(known, after, bench.tied, centred, more):
        writers = written_patterns(known, powers) if centred else frozenset()
        yield Scheme((branch,), units, shifts, powers | against, writers)


def _subtracts_mean(bench: Bench, axes: list[StreamAxis]) -> bool:
    """Tell whether the norms of the stream subtract the mean.

    Raises:
        UnsupportedStructureError: where some do and some don't.
    """
    kinds = {axis.vector.subtracts_mean: axis for axis in axes if axis.vector.kind == "scale"}
    bare = has_bare_layernorm(bench.model, bench.width)
    if len(kinds) == 2 or (bare and False in kinds):
        raise UnsupportedStructureError(
            f"some norms of the stream subtract its mean ({kinds[True].info.module if True in kinds else 'one'}), "
            f"others don't ({kinds[False].info.module})"
        )
    return bare or True in kinds


def mlp_by_width(bench: Bench, axes: list[AxisName]) -> Scheme:
    """Return the scheme of an MLP, or a mixer, whose channels are so many for each channel of the stream.

    Raises:
        UnsupportedStructureError: where they aren't.
    """
    width = bench.width
    sizes = {bench.axis_map.parameters[name].shape[dim] for name, dim in axes}
    units = min(sizes)
    if units % width:
        raise UnsupportedStructureError(f"{axes[0][0]} dimension {axes[0][1]} follows neither heads nor the stream")
    branches = discover_branches(bench.gradients, bench.axis_map, axes, units, 1)
    return next(schemes_of(bench, branches, units, axes, per_channel=units // width))
