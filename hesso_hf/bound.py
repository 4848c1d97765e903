"""Groups bound to a model's parameters: what per-unit values do to weights, gradients and optimizer state.

Applying one value a unit is one broadcast operation per axis, without index lists or copies of weights.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import CheckpointMismatchError
from .experts import EXPERT_UNITS
from .groups import Axis, PruningGroups, centre_, mask_, shrink_
from .routing import RouterGates
from .saliency import Displacements, UnitSums, accumulate_, chunk_rows, chunk_size

PerUnit = Mapping[str, torch.Tensor]  # structure -> (L, U)


class BoundGroups:
    """The axes of all groups with the parameters that they lie on.

    Args:
        parameters: the model's parameters by name; frozen ones included.
        groups: the structures that are pruned.
        gates: on the model's routers, where experts are pruned.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], groups: PruningGroups, gates: RouterGates | None = None
    ) -> None:
        self.groups, self._gates = groups, gates
        self.axes = groups.by_parameter()
        self.bind(parameters)
        self._chunk = chunk_size(sum(parameter.numel() for parameter in parameters.values()))

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take (new) parameter objects by name: sharding replaces them after the optimizer is made."""
        missing = [name for name in self.axes if name not in parameters]
        if missing:
            raise CheckpointMismatchError(f"the model has no parameter {missing[0]!r} that the groups were built on")
        self.parameters = {name: parameters[name] for name in self.axes}

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (L, U) of each structure."""
        return {name: (len(group.layers), group.num_units) for name, group in self.groups.structures.items()}

    def elements_per_unit(self) -> dict[str, int]:
        """Return the number of elements of one unit of each structure."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        return {name: group.elements_per_unit(shapes) for name, group in self.groups.structures.items()}

    def accumulate_(
        self, sums: UnitSums, displacements: Callable[[str, list[tuple[str, int, Axis]]], Displacements] | None = None
    ) -> None:
        """Add the gradient that stands in `.grad` to the units' sums.

        Args:
            displacements: makes what stands for x, from a parameter's name and axes; by default the weights.
        """
        for name, axes in self.axes.items():
            parameter = self.parameters[name]
            displaced = displacements(name, axes) if displacements else None
            accumulate_(sums, parameter.data, parameter.grad, axes, self._chunk, displaced)

    def multiply_(self, factors: PerUnit) -> None:
        """Multiply each unit's effective weights by its factor."""
        for name, axes in self.axes.items():
            for structure, layer, axis in axes:
                if structure in factors:
                    shrink_(self.parameters[name].data, axis, factors[structure][layer])

    def route(self, scales: PerUnit) -> None:
        """Let the routers choose experts by their scales."""
        if self._gates is not None:
            self._gates.set_scales(scales[EXPERT_UNITS])

    def mask_weights_(self, pruned: PerUnit) -> None:
        """Set pruned units' effective weights to exactly zero."""
        self._each(pruned, lambda parameter, axis, units: mask_(parameter.data, axis, units))

    def centre_(self, scales: PerUnit, share: float = 1.0) -> None:
        """Take `share` of the mean out of what writes to a stream that norms subtract the mean of."""
        for name, axes in self.axes.items():
            for structure, layer, axis in axes:
                if axis.centred and structure in scales:
                    centre_(self.parameters[name].data, axis, scales[structure][layer], share)

    def mask_gradients_(self, pruned: PerUnit) -> None:
        """Set pruned units' gradients to zero."""
        self._each(pruned, lambda p, axis, units: None if p.grad is None else mask_(p.grad, axis, units, 0.0))

    def mask_state_(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]], pruned: PerUnit, vectors_only: bool = False
    ) -> None:
        """Zero pruned units' entries in optimizer state of the parameter's own shape and a floating dtype."""

        def mask(parameter: nn.Parameter, axis: Axis, units: torch.Tensor) -> None:
            for value in state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    mask_(value, axis, units, 0.0)

        self._each(pruned, mask, vectors_only)

    def norm_of(self, marked: PerUnit) -> float:
        """Return the L2 norm of the marked units' effective weights, each element counted once."""
        total = 0.0
        for name, axes in self.axes.items():
            total += self._marked_square_sum(self.parameters[name].data, axes, marked)
        return total**0.5

    def _marked_square_sum(self, parameter: torch.Tensor, axes: list[tuple[str, int, Axis]], marked: PerUnit) -> float:
        masks = [
            (axis.dim, axis.spread(marked[structure][layer], parameter.dim(), fixed_value=False))
            for structure, layer, axis in axes
        ]
        total, rows = 0.0, chunk_rows(parameter, self._chunk)
        for start in range(0, parameter.shape[0], rows):
            part = parameter[start : start + rows].float()
            chosen = torch.zeros_like(part, dtype=torch.bool)
            for dim, mask in masks:
                chosen |= mask[start : start + rows] if dim == 0 else mask
            total += float((part + axes[0][2].shift).masked_select(chosen).square().sum())
        return total

    def _each(
        self, units: PerUnit, apply: Callable[[nn.Parameter, Axis, torch.Tensor], Any], vectors_only: bool = False
    ) -> None:
        for name, axes in self.axes.items():
            if vectors_only and self.parameters[name].dim() > 1:
                continue
            for structure, layer, axis in axes:
                if structure in units:
                    apply(self.parameters[name], axis, units[structure][layer])
