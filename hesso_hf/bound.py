"""Groups bound to a model's parameters: what per-unit values do to weights, gradients and optimizer state.

Applying one value a unit is one broadcast operation per axis, without index lists or copies of weights.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .adapters import NO_ADAPTERS, Adapters
from .agreement import is_main_process
from .errors import CheckpointMismatchError, UnsupportedStructureError
from .experts import EXPERT_UNITS
from .frozen import FrozenWeights
from .groups import Axis, PruningGroups, centre_, mask_, shrink_
from .routing import RouterGates
from .saliency import Displacements, UnitSums, accumulate_, chunk_rows, chunk_size, float_sums
from .shards import Part, add_over_ranks, is_sharded, local, part_of

PerUnit = Mapping[str, torch.Tensor]  # structure -> (L, U)
Displaced = Callable[[str, list[tuple[str, int, Axis]], Part], Displacements]


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
        self._chunk = chunk_size(sum(parameter.numel() for parameter in parameters.values()))

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take (new) parameter objects by name: sharding replaces them after the optimizer is made."""
        missing = [name for name in self.axes if name not in parameters]
        if missing:
            raise CheckpointMismatchError(f"the model has no parameter {missing[0]!r} that the groups were built on")
        self.parameters = {name: parameters[name] for name in self.axes}
        self.sharded = is_sharded(self.parameters.values())
        self.parts = {name: part_of(name, parameter) for name, parameter in self.parameters.items()}
        self._counted = {name: part.counted for name, part in self.parts.items()}
        if self.sharded and not is_main_process():  # of what isn't distributed at all, one process' copy counts
            self._counted |= {
                name: isinstance(p, DTensor) and self._counted[name] for name, p in self.parameters.items()
            }
        if self.sharded and self._adapters:
            raise UnsupportedStructureError(
                "LoRA together with parameters that are sharded over the processes (FSDP) isn't supported; use DDP"
            )
        frozen = {name: p for name, p in self.parameters.items() if self._adapters and not p.requires_grad}
        self.frozen = FrozenWeights(frozen, self.axes)

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

    def effective(
        self, name: str, values: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: local(parameter.data)
    ) -> torch.Tensor:
        """Return a weight with what its adapter adds, from the values of parameters."""
        return self._adapters.effective(name, lambda key: values(self.parameters[key]))

    def accumulate_(self, sums: UnitSums, displacements: Displaced | None = None) -> None:
        """Add the gradient that stands in `.grad` to the units' sums, of this process' parts.

        Args:
            displacements: makes what stands for x, from a parameter's name, axes and part; by default the weights.
        """
        for name, axes in self._scored.items():
            if not self._counted[name]:
                continue
            parameter, part = self.parameters[name], self.parts[name]
            gradient = None if parameter.grad is None else local(parameter.grad)
            displaced = displacements(name, axes, part) if displacements else None
            accumulate_(sums, self.effective(name), gradient, axes, self._chunk, displaced, part)

    def over_ranks(self, sums: UnitSums) -> UnitSums:
        """Return the sums of all processes' parts; the same where each holds all of the model."""
        return sums.over_ranks() if self.sharded else sums

    def multiply_(self, factors: PerUnit) -> None:
        """Multiply each unit's effective weights by its factor."""
        for name, axes in self.axes.items():
            for structure, layer, axis in axes:
                if structure in factors:
                    shrink_(local(self.parameters[name].data), axis, factors[structure][layer], self.parts[name])

    def route(self, scales: PerUnit) -> None:
        """Let the routers choose experts by their scales."""
        if self._gates is not None:
            self._gates.set_scales(scales[EXPERT_UNITS])

    def mask_weights_(self, pruned: PerUnit) -> None:
        """Set pruned units' effective weights to exactly zero."""
        for name, axis, units in self._each(pruned):
            mask_(local(self.parameters[name].data), axis, units, part=self.parts[name])

    def centre_(self, scales: PerUnit, share: float = 1.0) -> None:
        """Take `share` of the mean out of what writes to a stream that norms subtract the mean of.

        Where processes hold some of the channels each, the sums over them take one all-reduce.
        """
        found = [(name, axis, units) for name, axis, units in self._each(scales) if axis.centred]
        split = [n for n, (name, axis, _) in enumerate(found) if self._splits(name, axis.dim)]
        totals: dict[int, torch.Tensor] = {}
        if split:
            sums = [self._channel_sum(name, axis) for name, axis, _ in (found[n] for n in split)]
            totals = dict(zip(split, add_over_ranks(sums), strict=True))
        for n, (name, axis, units) in enumerate(found):
            part = self.parts[name]
            centre_(local(self.parameters[name].data), axis, units, share, part, totals.get(n))

    def _splits(self, name: str, dim: int) -> bool:
        """Whether processes hold different indices of a dimension: the same answer on all of them."""
        parameter = self.parameters[name]
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        return any(isinstance(placement, Shard) and placement.dim == dim for placement in placements)

    def _channel_sum(self, name: str, axis: Axis) -> torch.Tensor:
        total = local(self.parameters[name].data).float().sum(axis.dim, keepdim=True)
        return total if self._counted[name] else torch.zeros_like(total)

    def mask_gradients_(self, pruned: PerUnit) -> None:
        """Set pruned units' gradients to zero."""
        for name, axis, units in self._each(pruned):
            gradient = self.parameters[name].grad
            if gradient is not None:
                mask_(local(gradient), axis, units, 0.0, self.parts[name])

    def mask_state_(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]], pruned: PerUnit, vectors_only: bool = False
    ) -> None:
        """Zero pruned units' entries in optimizer state of the parameter's own shape and a floating dtype."""
        for name, axis, units in self._each(pruned):
            parameter = self.parameters[name]
            if vectors_only and parameter.dim() > 1:
                continue
            for value in state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    mask_(local(value), axis, units, 0.0, self.parts[name])

    def norm_of(self, marked: PerUnit) -> float:
        """Return the L2 norm of the marked units' effective weights, each element counted once."""
        total = 0.0
        for name, axes in self._scored.items():
            if self._counted[name]:
                total += self._marked_square_sum(name, axes, marked)
        if self.sharded:
            total = float(add_over_ranks([torch.tensor([total], dtype=float_sums(self.device), device=self.device)])[0])
        return total**0.5

    def _marked_square_sum(self, name: str, axes: list[tuple[str, int, Axis]], marked: PerUnit) -> float:
        values, part = self.effective(name), self.parts[name]
        masks = [
            (axis.dim, axis.spread(marked[structure][layer], values.dim(), fixed_value=False, part=part))
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

    def _each(self, units: PerUnit) -> Iterator[tuple[str, Axis, torch.Tensor]]:
        """Yield (parameter's name, axis, one value per unit) of the given structures."""
        for name, axes in self.axes.items():
            for structure, layer, axis in axes:
                if structure in units:
                    yield name, axis, units[structure][layer]
