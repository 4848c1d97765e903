"""What values per unit do to weights, gradients and optimizer state, wherever units lie on what this process holds.

Each layout is spread over its axes once for all layers (`Spread`); what is left is one operation an axis of a
tensor, or one call for an axis of all tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...compat import multiply_all_
from ...distributed.parts import Part, add_over_ranks
from ...structures.groups import Axis, AxisName, portions_of
from ...structures.layout import Spread
from ..saliency import ParameterAxes, PerUnit
from .holdings import Held

# (turn among the axes of a tensor, what the model adds, whether they are vectors) -> tensors with their factors
_Turns = dict[tuple[int, float, bool], list[tuple[torch.Tensor, torch.Tensor]]]


class HeldAxes:
    """Axes with what this process holds of the parameters that they lie on.

    Attributes:
        axes: of each parameter, by its name.
        held: the parameters, by name.
    """

    axes: dict[str, ParameterAxes]
    held: dict[str, Held]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        raise NotImplementedError

    def multiply_(self, factors: PerUnit) -> None:
        """Multiply each unit's effective weights by its factor; 1 leaves them as they are, bit for bit."""
        spread, turns = Spread(factors, 1.0), _Turns()
        for held, axes in self._touched(factors):
            for part, weights in zip(held.parts, held.weights(), strict=True):
                for turn, (structure, layer, axis) in enumerate(axes):
                    factor = axis.lay(spread.along(structure, layer, axis.layout, weights), weights.dim(), part)
                    turns.setdefault((turn, axis.shift, weights.dim() < 2), []).append((weights, factor))
        for (_, shift, _), pairs in sorted(turns.items(), key=lambda turn: turn[0]):
            multiply_all_([weights for weights, _ in pairs], [factor for _, factor in pairs], shift)
        for held, _ in self._touched(factors):
            held.weights_changed()

    def mask_weights_(self, pruned: PerUnit, shifted_only: bool = False) -> None:
        """Set pruned units' effective weights to exactly zero.

        Args:
            shifted_only: only where the model adds a constant to what is stored (`Axis.shift`).
        """
        spread = Spread(pruned, False)
        for held, axes in self._touched(pruned, shifted_only=shifted_only):
            for part, weights in zip(held.parts, held.weights(), strict=True):
                _mask_(weights, part, axes, spread)
            held.weights_changed()

    def centre_(self, scales: PerUnit, share: float = 1.0) -> None:
        """Take `share` of the mean out of what writes to a stream that norms subtract the mean of.

        Where processes hold some of the channels each, the sums over them take one all-reduce.
        """
        touched = list(self._touched(scales, centred_only=True))
        if not touched:
            return
        split = [axis for held, axes in touched for _, _, axis in axes if held.splits(axis.dim)]
        totals: dict[AxisName, torch.Tensor] = {}
        if split:
            sums = add_over_ranks([self._channel_sum(axis) for axis in split])
            totals = {(axis.parameter, axis.dim): total for axis, total in zip(split, sums, strict=True)}
        spread = Spread({name: portions_of(values, share) for name, values in scales.items()}, 0.0)
        for held, axes in touched:
            for part, weights in zip(held.parts, held.weights(), strict=True):
                for structure, layer, axis in axes:
                    total = totals.get((axis.parameter, axis.dim))
                    portions = spread.along(structure, layer, axis.layout, weights)
                    axis.centre_(weights, portions, part, None if total is None else total[part.window(but=axis.dim)])
            held.weights_changed()

    def _channel_sum(self, axis: Axis) -> torch.Tensor:
        """Return the sum over the channels that this process counts, as wide as the whole parameter."""
        held = self.held[axis.parameter]
        shape = [1 if dim == axis.dim else size for dim, size in enumerate(held.shape)]
        total = torch.zeros(shape, device=self.device)
        for part, weights in zip(held.parts, held.weights(), strict=True) if held.counted else ():
            total[part.window(but=axis.dim)] += weights.float().sum(axis.dim, keepdim=True).to(total.device)
        return total

    def mask_gradients_(self, pruned: PerUnit) -> None:
        """Set pruned units' gradients to zero."""
        spread = Spread(pruned, False)
        for held, axes in self._touched(pruned):
            gradients = held.gradients()
            if gradients is None:
                continue
            for part, gradient in zip(held.parts, gradients, strict=True):
                _mask_(gradient, part, axes, spread, 0.0)
            held.gradients_changed()

    def mask_state_(
        self,
        state: Mapping[torch.Tensor, Mapping[str, Any]],
        pruned: PerUnit,
        vectors_only: bool = False,
        shifted_only: bool = False,
    ) -> None:
        """Zero pruned units' entries in plain optimizer state of the parameter's own shape and a floating dtype."""
        spread = Spread(pruned, False)
        for held, axes in self._touched(pruned, shifted_only=shifted_only):
            if vectors_only and len(held.shape) > 1:
                continue
            for pieces in held.states(state):
                for part, values in zip(held.parts, pieces, strict=True):
                    _mask_(values, part, axes, spread, 0.0)

    def _touched(
        self, units: PerUnit, shifted_only: bool = False, centred_only: bool = False
    ) -> Iterator[tuple[Held, ParameterAxes]]:
        """Yield what is held of each parameter that units of the given structures lie on, with those axes."""
        for name, axes in self.axes.items():
            found = [
                (structure, layer, axis) for structure, layer, axis in axes
                if structure in units and (axis.shift or not shifted_only) and (axis.centred or not centred_only)
            ]  # fmt: skip
            if found:
                yield self.held[name], found


def _mask_(values: torch.Tensor, part: Part, axes: ParameterAxes, pruned: Spread, fill: float | None = None) -> None:
    """Set pruned units' slices of a piece to a value, by default to what stands for zero, even where they hold NaN."""
    for structure, layer, axis in axes:
        mask = axis.lay(pruned.along(structure, layer, axis.layout, values), values.dim(), part)
        values.masked_fill_(mask, -axis.shift if fill is None else fill)
