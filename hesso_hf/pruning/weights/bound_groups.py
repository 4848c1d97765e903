"""Groups bound to a model's parameters: what per-unit values do to weights, gradients and optimizer state.

Applying one value a unit is one broadcast operation per axis, without index lists or copies of weights.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...distributed.collectives import broadcast_, from_main
from ...distributed.parts import Part, add_over_ranks, full_shape, local
from ...errors import CheckpointMismatchError, UnsupportedStructureError
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import Axis, AxisName, PruningGroups
from ...structures.lora import NO_ADAPTERS, Adapters
from ...structures.router_gates import RouterGates
from ..saliency import Displaced, ParameterAxes, PerUnit, UnitSums, accumulate_, chunk_rows, chunk_size, float_sums
from .frozen import FrozenWeights
from .holdings import Holdings, MakeHoldings
from .snapshot import Snapshot


class BoundGroups:
    """The axes of all groups with the parameters that they lie on.

    Args:
        parameters: the model's parameters by name; frozen ones and adapters' factors included.
        groups: the structures that are pruned.
        gates: on the model's routers, where experts are pruned.
        adapters: of the model.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: PruningGroups,
        gates: RouterGates | None = None,
        adapters: Adapters = NO_ADAPTERS,
    ) -> None:
        self.groups, self._gates, self._adapters = groups, gates, adapters
        self.axes = adapters.extend(groups).by_parameter()
        self._scored = groups.by_parameter()  # an adapter counts as part of the weight that it adds to
        for name in adapters.factors(self._scored):
            self.axes.setdefault(name, [])
        self.bind(parameters)
        self._chunk = chunk_size(sum(math.prod(full_shape(parameter)) for parameter in parameters.values()))

    def bind(self, parameters: Mapping[str, nn.Parameter], make_holdings: MakeHoldings = Holdings) -> None:
        """Take (new) parameter objects by name: sharding replaces them, or where they are held, after the start."""
        missing = [name for name in self.axes if name not in parameters]
        if missing:
            raise CheckpointMismatchError(f"the model has no parameter {missing[0]!r} that the groups were built on")
        self.parameters = {name: parameters[name] for name in self.axes}
        self._holdings = make_holdings(self.parameters.values())
        self.held = {name: self._holdings.held(name, parameter) for name, parameter in self.parameters.items()}
        if self.sharded and self._adapters:
            raise UnsupportedStructureError(
                "LoRA together with parameters that are sharded over processes (FSDP, ZeRO) isn't supported; use DDP"
            )
        frozen = {name: p for name, p in self.parameters.items() if self._adapters and not p.requires_grad}
        self.frozen = FrozenWeights(frozen, self.axes)

    @property
    def sharded(self) -> bool:
        """Whether processes hold different parts of the parameters."""
        return self._holdings.sharded

    def snapshot(self, base: Optimizer, on_cpu: bool) -> Snapshot:
        """Copy what the optimizer trains, and what else is scaled (frozen weights too)."""
        return self._holdings.snapshot(base, self.parameters.values(), on_cpu)

    def publish(self) -> None:
        """Let all processes compute with weights that were changed outside of a training step."""
        self._holdings.publish()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (L, U) of each structure."""
        return {name: (len(group.layers), group.num_units) for name, group in self.groups.structures.items()}

    def elements_per_unit(self) -> dict[str, int]:
        """Return the number of elements of one unit of each structure."""
        shapes = {name: held.shape for name, held in self.held.items()}
        return {name: group.elements_per_unit(shapes) for name, group in self.groups.structures.items()}

    def effective(
        self, name: str, values: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: local(parameter.data)
    ) -> torch.Tensor:
        """Return a weight with what its adapter adds, from the values of parameters that no process shares."""
        return self._adapters.effective(name, lambda key: values(self.parameters[key]))

    def copied(self, name: str, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return the copies in a snapshot of each piece of a weight, with what its adapter adds."""
        return [self.effective(name, snapshot.weights_of)] if self._adapters else self.held[name].copied(snapshot)

    def _scored_weights(self, name: str) -> list[torch.Tensor]:
        return [self.effective(name)] if self._adapters else self.held[name].weights()

    def accumulate_(self, sums: UnitSums, displacements: Displaced | None = None) -> None:
        """Add the gradient of the coming step to the units' sums, of this process' parts.

        Args:
            displacements: makes what stands for x, from a parameter's name, its axes, the part and the part's position
                among those that this process holds; by default the weights.
        """
        for name, axes in self._scored.items():
            held = self.held[name]
            if not held.counted:
                continue
            gradients = held.gradients()
            for n, (part, weights) in enumerate(zip(held.parts, self._scored_weights(name), strict=True)):
                weights = weights.to(self.device)  # an offloaded piece is scored where the sums lie
                gradient = None if gradients is None else gradients[n].to(self.device)
                if gradient is not None and held.gradient_scale != 1.0:
                    gradient = gradient.float() / held.gradient_scale
                displaced = displacements(name, axes, part, n) if displacements else None
                accumulate_(sums, weights, gradient, axes, self._chunk, displaced, part)

    def over_ranks(self, sums: UnitSums) -> UnitSums:
        """Return the sums of all processes' parts; the same where each holds all of the model."""
        return sums.over_ranks() if self.sharded else sums

    def multiply_(self, factors: PerUnit) -> None:
        """Multiply each unit's effective weights by its factor."""
        for axis, values, part, weights in self._each_piece(factors):
            axis.shrink_(weights, values, part)

    def add_(self, added: Mapping[str, torch.Tensor], share: float) -> None:
        """Add a share of matrices to parameters that this process holds whole."""
        for name, values in added.items():
            self.parameters[name].data.add_(values, alpha=share)

    def from_main(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return rank 0's tensors of parameters' shapes on every rank."""
        names = from_main(sorted(values))
        shared = {name: values.get(name, torch.empty_like(self.parameters[name])) for name in names}
        broadcast_(list(shared.values()))
        return shared

    def route(self, scales: PerUnit) -> None:
        """Let the routers choose experts by their scales."""
        if self._gates is not None:
            self._gates.set_scales(scales[EXPERT_UNITS])

    def mask_weights_(self, pruned: PerUnit) -> None:
        """Set pruned units' effective weights to exactly zero."""
        for axis, units, part, weights in self._each_piece(pruned):
            axis.mask_(weights, units, part=part)

    def centre_(self, scales: PerUnit, share: float = 1.0) -> None:
        """Take `share` of the mean out of what writes to a stream that norms subtract the mean of.

        Where processes hold some of the channels each, the sums over them take one all-reduce.
        """
        split = [axis for axis, _ in self._each(scales, centred=True) if self.held[axis.parameter].splits(axis.dim)]
        totals: dict[AxisName, torch.Tensor] = {}
        if split:
            sums = add_over_ranks([self._channel_sum(axis) for axis in split])
            totals = {(axis.parameter, axis.dim): total for axis, total in zip(split, sums, strict=True)}
        for axis, units, part, weights in self._each_piece(scales, centred=True):
            total = totals.get((axis.parameter, axis.dim))
            axis.centre_(weights, units, share, part, None if total is None else total[part.window(but=axis.dim)])

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
        for axis, units in self._each(pruned):
            held = self.held[axis.parameter]
            gradients = held.gradients()
            if gradients is None:
                continue
            for part, gradient in zip(held.parts, gradients, strict=True):
                axis.mask_(gradient, units, 0.0, part)
            held.gradients_changed()

    def mask_state_(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]], pruned: PerUnit, vectors_only: bool = False
    ) -> None:
        """Zero pruned units' entries in plain optimizer state of the parameter's own shape and a floating dtype."""
        for axis, units in self._each(pruned):
            held = self.held[axis.parameter]
            if vectors_only and len(held.shape) > 1:
                continue
            for pieces in held.states(state):
                for part, values in zip(held.parts, pieces, strict=True):
                    axis.mask_(values, units, 0.0, part)

    def norm_of(self, marked: PerUnit) -> float:
        """Return the L2 norm of the marked units' effective weights, each element counted once."""
        total = 0.0
        for name, axes in self._scored.items():
            held = self.held[name]
            for part, weights in zip(held.parts, self._scored_weights(name), strict=True) if held.counted else ():
                total += self._marked_square_sum(weights, axes, marked, part)
        if self.sharded:
            total = float(add_over_ranks([torch.tensor([total], dtype=float_sums(self.device), device=self.device)])[0])
        return total**0.5

    def _marked_square_sum(self, values: torch.Tensor, axes: ParameterAxes, marked: PerUnit, part: Part) -> float:
        masks = [
            (axis.dim, axis.spread(marked[structure][layer], values.dim(), False, part).to(values.device))
            for structure, layer, axis in axes
        ]
        total, rows = 0.0, chunk_rows(values, self._chunk)
        for start in range(0, values.shape[0], rows):
            block = values[start : start + rows].float()
            chosen = torch.zeros_like(block, dtype=torch.bool)
            for dim, mask in masks:
                chosen |= mask[start : start + rows] if dim == 0 else mask
            total += float((block + axes[0][2].shift).masked_select(chosen).square().sum())
        return total

    def _each_piece(
        self, units: PerUnit, centred: bool = False
    ) -> Iterator[tuple[Axis, torch.Tensor, Part, torch.Tensor]]:
        """Yield (axis, one value per unit, part, weights to be changed in place) of each piece that lies here."""
        for axis, values in self._each(units, centred):
            held = self.held[axis.parameter]
            for part, weights in zip(held.parts, held.weights(), strict=True):
                yield axis, values, part, weights
            held.weights_changed()

    def _each(self, units: PerUnit, centred: bool = False) -> Iterator[tuple[Axis, torch.Tensor]]:
        """Yield (axis, one value per unit) of the given structures, or only of what is kept at mean zero."""
        for axes in self.axes.values():
            for structure, layer, axis in axes:
                if structure in units and (axis.centred or not centred):
                    yield axis, units[structure][layer]
