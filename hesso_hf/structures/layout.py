"""Where unit j's indices lie on an axis.

U units share an axis as a sequence of segments. A segment of repeat n and block k holds n*U*k indices; unit j owns
i*U*k + j*k + r for i < n, r < k. `block` is one segment with n = 1, `stride` one with n > 1, fused QKV three segments.
Where a unit is a whole layer, an axis of that layer is one `owned` segment: all its indices belong to that one unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `repeat` runs of all units, each owning `block` neighbours; or `fixed` untouched ones.

    With `unit`, the `fixed` indices all belong to that unit.
    """

    repeat: int = 1
    block: int = 1
    fixed: int = 0
    unit: int | None = None

    def __str__(self) -> str:
        if self.fixed:
            return str(self.fixed) if self.unit is not None else f"fixed {self.fixed}"
        return str(self.block) if self.repeat == 1 else f"{self.repeat}x{self.block}"

    def size(self, units: int) -> int:
        """Return the number of indices for `units` units."""
        return self.fixed or self.repeat * units * self.block

    def expand(self, values: torch.Tensor, fixed_value: float) -> torch.Tensor:
        """Spread one value per unit, shape (..., U), over the stretch's indices."""
        *layers, units = values.shape
        if self.unit is not None:
            return values[..., self.unit, None].expand(*layers, self.fixed)
        if self.fixed:
            return values.new_full((*layers, self.fixed), fixed_value)
        return values[..., None, :, None].expand(*layers, self.repeat, units, self.block).reshape(*layers, -1)

    def collect(self, sums: torch.Tensor, units: int) -> torch.Tensor:
        """Add the stretch's per-index sums up per unit: shape (U,)."""
        if self.fixed:
            collected = sums.new_zeros(units)
            if self.unit is not None:
                collected[self.unit] = sums.sum()
            return collected
        if self.repeat * self.block == 1:
            return sums
        return sums.view(self.repeat, units, self.block).sum((0, 2))


@dataclass(frozen=True)
class Layout:
    """The segments of one axis, in order."""

    segments: tuple[Segment, ...]

    @property
    def per_unit(self) -> int:
        """Number of indices that one unit owns."""
        return sum(segment.repeat * segment.block for segment in self.segments if not segment.fixed)

    @property
    def owned(self) -> int:
        """Number of indices that belong to one certain unit."""
        return sum(segment.fixed for segment in self.segments if segment.unit is not None)

    @property
    def kind(self) -> str:
        """`block`, `stride`, `segments` or `owned`."""
        if self.owned:
            return "owned"
        if len(self.segments) > 1:
            return "segments"
        return "block" if self.segments[0].repeat == 1 else "stride"

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.segments))})"

    def size(self, units: int) -> int:
        """Return the axis' length for `units` units."""
        return sum(segment.size(units) for segment in self.segments)

    def fitted(self, units: int, to_units: int, size: int, per_unit: int, by_runs: bool = False) -> Layout | None:
        """Return the layout that a model of other sizes has, or None where they don't fit.

        Args:
            units: of this layout.
            to_units: of the other model.
            size: length of the other model's axis.
            per_unit: indices that one unit owns there; blocks grow and shrink with it.
            by_runs: whether the number of runs does instead (a unit is one channel, in each of the experts).
        """
        if not self.per_unit:
            return Layout((Segment(fixed=size),))
        fixed, fixed_to = self.size(units) - units * self.per_unit, size - to_units * per_unit
        stretches = [segment for segment in self.segments if segment.fixed]
        if fixed_to < 0 or (fixed_to == 0) != (fixed == 0):
            return None
        if len(stretches) > 1 and fixed_to != fixed:
            return None
        block = math.gcd(*(segment.block for segment in self.segments if not segment.fixed))
        if by_runs and per_unit != self.per_unit and (len(self.segments) > 1 or block > 1):
            return None
        if not by_runs and per_unit * block % self.per_unit:
            return None
        segments = []
        for segment in self.segments:
            if segment.fixed:
                segments.append(Segment(fixed=fixed_to if len(stretches) == 1 else segment.fixed))
            elif by_runs:
                segments.append(Segment(segment.repeat * per_unit // self.per_unit, segment.block))
            else:
                segments.append(Segment(segment.repeat, segment.block * per_unit // self.per_unit))
        return Layout(tuple(segments))

    def expand(self, values: torch.Tensor, fixed_value: float = 1.0) -> torch.Tensor:
        """Spread one value per unit, shape (..., U), over the axis; indices of no unit get `fixed_value`."""
        if len(self.segments) == 1:
            segment = self.segments[0]
            plain = segment.repeat * segment.block == 1 and not segment.fixed
            return values if plain else segment.expand(values, fixed_value)
        return torch.cat([segment.expand(values, fixed_value) for segment in self.segments], dim=-1)

    def collect(self, sums: torch.Tensor, units: int) -> torch.Tensor:
        """Add per-index sums, shape (axis length,), up per unit: shape (U,)."""
        if len(self.segments) == 1:
            return self.segments[0].collect(sums, units)
        parts = sums.split([segment.size(units) for segment in self.segments])
        collected = [segment.collect(part, units) for segment, part in zip(self.segments, parts, strict=True)]
        return torch.stack(collected).sum(0)

    def indices(self, units: torch.Tensor, num_units: int) -> torch.Tensor:
        """Return the sorted indices that `units` (and no unit) own on an axis of `num_units` units."""
        keep = torch.zeros(num_units, dtype=torch.bool)
        keep[units] = True
        return self.expand(keep, fixed_value=True).nonzero().flatten()


def block_layout(block: int) -> Layout:
    """Unit j owns [j*block, (j+1)*block)."""
    return Layout((Segment(1, block),))


def owned_layout(size: int, unit: int) -> Layout:
    """All indices belong to unit `unit`."""
    return Layout((Segment(fixed=size, unit=unit),))


def layout_with_rest(repeat: int, block: int, rest: int) -> Layout:
    """Return the layout of so many runs of blocks, and behind them `rest` indices that belong to no unit."""
    runs = (Segment(repeat, block),) if repeat * block else ()
    return Layout((*runs, Segment(fixed=rest)) if rest else runs)


class Spread:
    """Values per unit, (L, U) a structure, spread over the indices of axes: of each layout for all layers at once.

    Args:
        fixed_value: of indices that belong to no unit.
    """

    def __init__(self, units: Mapping[str, torch.Tensor], fixed_value: float) -> None:
        self.units, self._fixed_value = units, fixed_value
        self._rows: dict[tuple[str, Layout, torch.device, torch.dtype], torch.Tensor] = {}

    def along(self, structure: str, layer: int, layout: Layout, like: torch.Tensor | None = None) -> torch.Tensor:
        """Return one value per index of a layer's axis, on the device and in the dtype of a tensor (masks: bool)."""
        values = self.units[structure]
        device, dtype = (like.device, like.dtype) if like is not None else (values.device, values.dtype)
        key = (structure, layout, device, torch.bool if values.dtype == torch.bool else dtype)
        if key not in self._rows:
            self._rows[key] = layout.expand(values.to(*key[2:]), self._fixed_value)
        return self._rows[key][layer]
