"""Groups: for each unit of a structure, the slices of all tensors that belong to it (zero-invariant groups).

Legend: L layers, U units a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from .errors import UnsupportedStructureError
from .layout import Layout, candidate_layouts
from .probe import AxisMap
from .sizes import HEADS, head_dim_of, num_units, unit_increments


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter along which the units of a structure lie.

    Attributes:
        shift: what the model adds to the stored value: 1 for norm weights stored as w and used as 1 + w.
        power: the stored value takes c**power, c = sqrt(kept / all units), when units are removed (exact fold).
    """

    parameter: str
    dim: int
    layout: Layout
    shift: float = 0.0
    power: int = 0

    def spread(self, values: torch.Tensor, ndim: int, fixed_value: float = 1.0) -> torch.Tensor:
        """Turn one value per unit, shape (U,), into a factor that broadcasts over the parameter."""
        shape = [1] * ndim
        shape[self.dim] = -1
        return self.layout.expand(values, fixed_value).view(shape)


@dataclass(frozen=True)
class StructureGroups:
    """All groups of one structure: `axes[layer]` are the axes that the U units of that layer share.

    Attributes:
        stack: where the units are whole layers, the module list that these are the members of.
    """

    structure: str
    increments: dict[str, int]
    num_units: int
    layers: tuple[str, ...]
    axes: tuple[tuple[Axis, ...], ...]
    stack: str = ""

    def all_axes(self) -> Iterable[tuple[int, Axis]]:
        """Yield (layer index, axis)."""
        for index, axes in enumerate(self.axes):
            for axis in axes:
                yield index, axis

    def config_sizes(self, kept: int) -> dict[str, int]:
        """Return the config sizes of a model that keeps `kept` units in every layer."""
        return {name: increment * kept for name, increment in self.increments.items()}

    def elements_per_unit(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of elements that one unit of the first layer owns."""
        total = 0
        for axis in self.axes[0]:
            across = math.prod(shapes[axis.parameter]) // shapes[axis.parameter][axis.dim]
            total += across * (axis.layout.per_unit * self.num_units + axis.layout.owned)
        return total // self.num_units


@dataclass(frozen=True)
class PruningGroups:
    """The proved structures of a model and, for the others, why not."""

    structures: dict[str, StructureGroups]
    refused: dict[str, str] = field(default_factory=dict)

    def by_parameter(self) -> dict[str, list[tuple[str, int, Axis]]]:
        """Return, per parameter, (structure, layer index, axis) of each of its axes."""
        found: dict[str, list[tuple[str, int, Axis]]] = {}
        for name, structure in self.structures.items():
            for layer, axis in structure.all_axes():
                found.setdefault(axis.parameter, []).append((name, layer, axis))
        return found

    def select(self, names: Iterable[str], explicit: bool) -> PruningGroups:
        """Return only the named structures.

        Raises:
            UnsupportedStructureError: where one that was asked for explicitly is refused, or none is left.
        """
        names = list(names)
        missing = [name for name in names if name not in self.structures]
        if missing and explicit:
            reasons = "; ".join(f"{name}: {self.refused.get(name, 'unknown')}" for name in missing)
            proved = list(self.structures)
            raise UnsupportedStructureError(f"`structures` asks for what can't be pruned: {reasons}. Proved: {proved}")
        chosen = {name: groups for name, groups in self.structures.items() if name in names}
        if not chosen:
            raise UnsupportedStructureError(f"no structure of this model can be pruned: {self.refused}")
        return PruningGroups(chosen, self.refused)


@dataclass(frozen=True)
class Scheme:
    """What the proof settles for one structure, by parameter pattern: valid for every size of the architecture."""

    layouts: dict[tuple[str, int], str]
    shifts: dict[str, float] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptUnits:
    """The decision: per structure one sorted tuple of kept unit indices per layer."""

    num_units: dict[str, int]
    kept: dict[str, tuple[tuple[int, ...], ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            name: {"num_units": self.num_units[name], "kept": [list(layer) for layer in layers]}
            for name, layers in self.kept.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KeptUnits:
        """Read what `to_dict` wrote."""
        return cls(
            {name: int(value["num_units"]) for name, value in values.items()},
            {name: tuple(tuple(map(int, layer)) for layer in value["kept"]) for name, value in values.items()},
        )


def candidate_axes(
    structure: str, axis_map: AxisMap, config: PretrainedConfig
) -> dict[tuple[str, int], dict[str, Layout]]:
    """List, for each (parameter, dim) of a structure, the layouts that its shape allows.

    Raises:
        UnsupportedStructureError: where no dimension depends on the structure's sizes or one isn't a multiple of units.
    """
    increments = unit_increments(structure, config)
    for size in increments:
        if size in axis_map.failed:
            raise UnsupportedStructureError(f"`{size}` can't be changed in the model code: {axis_map.failed[size]}")
    moving = axis_map.moving(tuple(increments))
    if not moving:
        raise UnsupportedStructureError(
            f"no parameter's shape depends on `{next(iter(increments))}` alone: head_dim follows hidden_size / "
            f"{HEADS} in this class"
        )
    units = num_units(structure, config)
    granule = (head_dim_of(config) or 1) if structure == "attention_heads" else 1
    return {axis: _layouts(structure, axis, axis_map, increments, units, granule) for axis in moving}


def _layouts(
    structure: str, axis: tuple[str, int], axis_map: AxisMap, increments: dict[str, int], units: int, granule: int
) -> dict[str, Layout]:
    parameter, dim = axis
    size = axis_map.parameters[parameter].shape[dim]
    found = axis_map.slopes[axis]
    others = {name for name in found if name not in increments} - {"num_key_value_heads"}
    if others:
        raise UnsupportedStructureError(
            f"{parameter} dimension {dim} depends on {sorted(others)} too: head_dim follows hidden_size / {HEADS}"
        )
    slopes = tuple(found[name] * increment for name, increment in increments.items() if found.get(name))
    fixed = size - sum(slopes) * units
    if fixed < 0 or (structure == "embedding_channels" and slopes != (1,)):
        raise UnsupportedStructureError(
            f"{parameter} dimension {dim} ({size}) takes {sum(slopes)} indices for each of {units} units"
        )
    return candidate_layouts(slopes, granule, fixed)


def build_groups(structure: str, axis_map: AxisMap, config: PretrainedConfig, scheme: Scheme) -> StructureGroups:
    """Apply a proved scheme to a model of any size of the same architecture.

    Raises:
        UnsupportedStructureError: where the model has a parameter that the proof never saw.
    """
    by_layer: dict[str, list[Axis]] = {}
    for (parameter, dim), layouts in candidate_axes(structure, axis_map, config).items():
        info = axis_map.parameters[parameter]
        kind = scheme.layouts.get((info.pattern, dim))
        if kind is None or kind not in layouts:
            raise UnsupportedStructureError(f"{parameter} dimension {dim} isn't covered by the proof")
        axis = Axis(
            parameter, dim, layouts[kind], scheme.shifts.get(info.pattern, 0.0), scheme.powers.get(info.pattern, 0)
        )
        by_layer.setdefault("" if structure == "embedding_channels" else info.layer, []).append(axis)
    return StructureGroups(
        structure,
        unit_increments(structure, config),
        num_units(structure, config),
        tuple(by_layer),
        tuple(tuple(axes) for axes in by_layer.values()),
    )


@torch.no_grad()
def shrink_(tensor: torch.Tensor, axis: Axis, factors: torch.Tensor) -> None:
    """Multiply each unit's slice by its factor, in place; a factor of 1 leaves it as it is, bit for bit.

    Args:
        tensor: the parameter's data.
        factors: one factor per unit, shape (U,).
    """
    spread = axis.spread(factors.to(tensor.dtype), tensor.dim())
    tensor.mul_(spread)
    if axis.shift:  # (w + shift) * f - shift, without rounding where f is 1
        tensor.add_((spread - 1) * axis.shift)


@torch.no_grad()
def mask_(tensor: torch.Tensor, axis: Axis, pruned: torch.Tensor, fill: float | None = None) -> None:
    """Set pruned units' slices to what stands for zero, in place, even where they hold NaN.

    Args:
        pruned: shape (U,), bool.
        fill: the value; by default -shift, so that the effective weight is zero.
    """
    spread = axis.spread(pruned, tensor.dim(), fixed_value=False)
    tensor.masked_fill_(spread, -axis.shift if fill is None else fill)
