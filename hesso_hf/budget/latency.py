"""Latency budget: the forward time of the matrix products, from a table of shapes timed on the device."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from ..structures.groups import PruningGroups
from ..structures.layers import LAYER_UNITS, in_stack
from ..structures.shape_probe import AxisMap, ParameterInfo
from .cost import Counts, Factor, moving_sizes

_POINTS = 4  # sizes timed along each axis
_REPEATS = 5


@dataclass
class LatencyTable:
    """Forward milliseconds of all matrix products for TOKENS tokens, bilinear between timed shapes.

    Attributes:
        products: (number of equal products, output side, input side), each fixed or counted in kept units.
        units: units a layer of each structure in the full model.
        pools: into how many runs these are split that keep equally many.
    """

    products: list[tuple[Factor | int, Factor | int, Factor | int]]
    units: dict[str, int]
    pools: dict[str, int]
    device: torch.device
    dtype: torch.dtype
    tokens: int = 128
    timed: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(self, kept: Counts) -> np.ndarray:
        """Price kept units (milliseconds); structures that aren't named stay whole."""
        total: np.ndarray = np.zeros(())
        for count, *sides in self.products:
            total = total + self._size(count, kept) * self._interpolate(
                [self._size(side, kept) for side in sides], sides
            )
        return total

    def _size(self, side: Factor | int, kept: Counts) -> np.ndarray:
        if isinstance(side, int):
            return np.asarray(side, dtype=np.float64)
        structure, per_unit, fixed = side
        return np.asarray(kept.get(structure, self.units[structure]), dtype=np.float64) * per_unit + fixed

    def _interpolate(self, sizes: list[np.ndarray], sides: list[Factor | int]) -> np.ndarray:
        grids = [self._grid(side) for side in sides]
        rows, columns = np.broadcast_arrays(*sizes)
        corners, shares = [], []
        for values, grid in ((rows, grids[0]), (columns, grids[1])):
            index = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, max(0, len(grid) - 2))
            upper = np.minimum(index + 1, len(grid) - 1)
            width = np.maximum(grid[upper] - grid[index], 1e-9)
            corners.append((index, upper))
            shares.append(np.clip((values - grid[index]) / width, 0.0, 1.0))
        table = np.array([[self._time(int(row), int(column)) for column in grids[1]] for row in grids[0]])
        total = np.zeros(rows.shape)
        for high_row, high_column in itertools.product((0, 1), repeat=2):
            share = (shares[0] if high_row else 1 - shares[0]) * (shares[1] if high_column else 1 - shares[1])
            total = total + share * table[corners[0][high_row], corners[1][high_column]]
        return total

    def _grid(self, side: Factor | int) -> np.ndarray:
        if isinstance(side, int):
            return np.array([side])
        structure, per_unit, fixed = side
        pools = self.pools[structure]
        units = self.units[structure] // pools
        counts = sorted({max(1, round(units * share / _POINTS)) for share in range(1, _POINTS + 1)} | {1})
        return np.array([count * pools * per_unit + fixed for count in counts])

    @torch.no_grad()
    def _time(self, rows: int, columns: int) -> float:
        """Time one product (milliseconds), once for each shape."""
        if (rows, columns) not in self.timed:
            weight = torch.randn(rows, columns, device=self.device, dtype=self.dtype)
            states = torch.randn(self.tokens, columns, device=self.device, dtype=self.dtype)
            seconds = []
            for _ in range(_REPEATS + 1):
                self._wait()
                started = time.perf_counter()
                torch.nn.functional.linear(states, weight)
                self._wait()
                seconds.append(time.perf_counter() - started)
            self.timed[(rows, columns)] = 1e3 * median(seconds[1:])
        return self.timed[(rows, columns)]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def build_latency(groups: PruningGroups, axis_map: AxisMap, device: torch.device, dtype: torch.dtype) -> LatencyTable:
    """List a model's matrix products; they are timed when first priced."""
    moving = moving_sizes(groups)
    tied = not any(info.role == "output" for info in axis_map.parameters.values())
    counts: dict[tuple[bool, Factor | int, Factor | int], int] = {}
    for info in axis_map.parameters.values():
        if info.role in ("norm", "bias") or (info.role == "embedding" and not tied):
            continue
        place = in_stack(groups, info)
        if place == "other":  # the first layer stands for all
            continue
        key = (place == "first", *_sides(info, moving.get(info.name, {})))
        counts[key] = counts.get(key, 0) + _repeats(info)
    products: list[tuple[Factor | int, Factor | int, Factor | int]] = []
    for (in_layer, *sides), count in counts.items():
        products.append(((LAYER_UNITS, count, 0) if in_layer else count, sides[0], sides[1]))
    units = {name: structure.num_units for name, structure in groups.structures.items()}
    pools = {name: structure.pools for name, structure in groups.structures.items()}
    return LatencyTable(products, units, pools, device, dtype)


def _sides(info: ParameterInfo, moving: dict[int, Factor]) -> tuple[Factor | int, Factor | int]:
    """Return the last two dimensions of a weight."""
    last = len(info.shape) - 1
    row, column = (moving.get(dim, info.shape[dim]) for dim in (last - 1, last))
    return row, column


def _repeats(info: ParameterInfo) -> int:
    """Return how many products a fused expert weight stands for."""
    return info.shape[0] if len(info.shape) == 3 else 1
