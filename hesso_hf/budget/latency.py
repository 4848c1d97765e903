"""Latency budget: the time of a forward pass, from a table of matrix products timed on the device, and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from ..structures.groups import PruningGroups
from ..structures.layers import LAYER_UNITS, in_stack
from ..structures.shape_probe import AxisMap
from .cost import Counts, Factor, length_of, moving_sizes

_POINTS = 4  # sizes timed along each axis
_REPEATS = 5
_FIXED = ""  # the structure of a length that doesn't shrink


@dataclass
class LatencyTable:
    """Forward milliseconds for `tokens` tokens: all matrix products, bilinear between timed shapes, and what is beside.

    Attributes:
        products: (number of equal products, output side, input side).
        units: units per layer of each structure in the full model.
        pools: into how many runs these are split that keep equally many.
    """

    products: list[tuple[Factor, Factor, Factor]]
    units: dict[str, int]
    pools: dict[str, int]
    device: torch.device
    dtype: torch.dtype
    tokens: int
    timed: dict[tuple[int, int], float] = field(default_factory=dict)
    beside: float = 0.0  # milliseconds of all that is no matrix product, or less where products take less in a model

    def __call__(self, kept: Counts) -> np.ndarray:
        """Price kept units (milliseconds); structures that aren't named stay whole."""
        return np.maximum(self.beside + self._products(kept), 0.0)

    def fit(self, kept: Counts, share: float) -> None:
        """Set what is beside the products so that these units cost this share of the full model."""
        full, left = float(self._products({})), float(self._products(kept))
        if left < full and share < 1:
            self.beside = (share * full - left) / (1 - share)

    def _products(self, kept: Counts) -> np.ndarray:
        total: np.ndarray = np.zeros(())
        for count, rows, columns in self.products:
            total = total + length_of(count, kept, self.units) * self._interpolate(rows, columns, kept)
        return total

    def _interpolate(self, rows: Factor, columns: Factor, kept: Counts) -> np.ndarray:
        """Return the time of one product between the four timed ones around its shape."""
        row_grid, column_grid = self._grid(rows), self._grid(columns)
        table = np.array([[self._time(int(row), int(column)) for column in column_grid] for row in row_grid])
        table = np.pad(table, ((0, 1), (0, 1)), mode="edge")  # the last points have neighbours too
        row, down = _place(length_of(rows, kept, self.units), row_grid)
        column, right = _place(length_of(columns, kept, self.units), column_grid)
        upper = (1 - right) * table[row, column] + right * table[row, column + 1]
        lower = (1 - right) * table[row + 1, column] + right * table[row + 1, column + 1]
        return (1 - down) * upper + down * lower

    def _grid(self, side: Factor) -> np.ndarray:
        """Return the lengths of a side that are timed."""
        structure, per_unit, fixed = side
        if structure == _FIXED:
            return np.array([fixed])
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
                wait_for(self.device)
                started = time.perf_counter()
                torch.nn.functional.linear(states, weight)
                wait_for(self.device)
                seconds.append(time.perf_counter() - started)
            self.timed[(rows, columns)] = 1e3 * median(seconds[1:])
        return self.timed[(rows, columns)]


def wait_for(device: torch.device) -> None:
    """Wait until a device has done its work, where it works on its own."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # which may not be the current one
    elif hasattr(module, "synchronize"):
        module.synchronize()


def _place(lengths: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the last grid point before each length, and the share of the way to the next one."""
    places = np.interp(lengths, grid, np.arange(len(grid)))
    before = places.astype(int)
    return before, places - before


def build_latency(
    groups: PruningGroups, axis_map: AxisMap, device: torch.device, dtype: torch.dtype, tokens: int
) -> LatencyTable:
    """List a model's matrix products; they are timed when first priced, of as many tokens."""
    moving = moving_sizes(groups)
    counts: defaultdict[tuple[bool, Factor, Factor], int] = defaultdict(int)
    for info in axis_map.parameters.values():
        if info.role in ("norm", "bias") or (info.role == "embedding" and not info.tied):
            continue
        place = in_stack(groups, info)
        if place == "other":  # the first layer stands for all
            continue
        lengths = [moving.get(info.name, {}).get(dim, (_FIXED, 0, size)) for dim, size in enumerate(info.shape)]
        rows, columns = lengths[-2:]
        counts[place == "first", rows, columns] += info.shape[0] if len(info.shape) == 3 else 1  # fused experts
    products = [
        ((LAYER_UNITS, count, 0) if in_layer else (_FIXED, 0, count), rows, columns)
        for (in_layer, rows, columns), count in counts.items()
    ]
    units = {name: structure.num_units for name, structure in groups.structures.items()}
    pools = {name: structure.pools for name, structure in groups.structures.items()}
    return LatencyTable(products, units, pools, device, dtype, tokens)
