"""Groups bound to a model's parameters: their sums over weights and gradients, snapshots, routing.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim import Optimizer

from ...distributed.collectives import broadcast_, from_main
from ...distributed.parts import Part, add_over_ranks, full_shape, local
from ...errors import CheckpointMismatchError, UnsupportedStructureError
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import PruningGroups
from ...structures.layout import Spread
from ...structures.lora import NO_ADAPTERS, Adapters
from ...structures.router_gates import RouterGates
from ..saliency import Displaced, ParameterAxes, PerUnit, UnitSums, accumulate_, chunk_rows, chunk_size, float_sums
from .frozen import FrozenWeights
from .held_axes import HeldAxes
from .holdings import Holdings, MakeHoldings
from .snapshot import Snapshot


class BoundGroups(HeldAxes):
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
        self._elements = sum(math.prod(full_shape(parameter)) for parameter in parameters.values())

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

    def let_go(self, parameters: Mapping[str, nn.Parameter], make_holdings: MakeHoldings = Holdings) -> None:
        """Hold no axis any more, so that nothing is done to the parameters that are left: other units lie on them."""
        self.axes, self._scored, self.held, self._gates = {}, {}, {}, None
        self.parameters = dict(parameters)
        self._holdings = make_holdings(self.parameters.values())
        frozen = {name: p for name, p in self.parameters.items() if self._adapters and not p.requires_grad}
        # no unit lies on them; a checkpoint still tells by them whether the base is the same
        self.frozen = FrozenWeights(frozen, {name: [] for name in frozen})

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

    def passes(self) -> AbstractContextManager[None]:
        """Make passes through the model beside those of training; what was gathered for them is let go."""
        return self._holdings.passes()

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

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole weight with what its adapter adds; where processes hold parts of it all call it."""
        return self.held[name].whole() if self.sharded else self.effective(name)

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
        chunk = chunk_size(self._elements, self.device)
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
                accumulate_(sums, weights, gradient, axes, chunk, displaced, part)

    def over_ranks(self, sums: UnitSums) -> UnitSums:
        """Return the sums of all processes' parts; the same where each holds all of the model."""
        return sums.over_ranks() if self.sharded else sums

    def add_(self, added: Mapping[str, list[torch.Tensor]], left: int = 1, of: int = 1) -> None:
        """Add to parameters what falls to the first of the last `left` of `of` steps, of what belongs to each piece.

        Below fp32 small shares would be lost to rounding: what was added to such a weight is taken off `added`, so that
        the last step adds what the others couldn't.
        """
        for name, pieces in added.items():
            for weights, piece in zip(self.held[name].weights(), pieces, strict=True):
                if weights.dtype.itemsize >= 4:
                    weights.add_(piece.to(weights.device), alpha=1 / of)
                    continue
                before = weights.clone()
                weights.add_(piece.to(weights.device), alpha=1 / left)
                piece.sub_((weights - before).to(piece.device))
            self.held[name].weights_changed()

    def not_yet_added(self, added: Mapping[str, list[torch.Tensor]], share: float) -> None:
        """Take off what belongs to weights below fp32 all but a share."""
        for name, pieces in added.items():
            for weights, piece in zip(self.held[name].weights(), pieces, strict=True):
                if weights.dtype.itemsize < 4:
                    piece.mul_(share)

    def from_main(self, values: Mapping[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Return rank 0's tensors of parameters' shapes on every rank, all of which hold them whole."""
        dtypes = from_main({name: values[name][0].dtype for name in sorted(values)})
        shared = {
            name: values.get(name, [torch.empty_like(self.parameters[name], dtype=dtype)])
            for name, dtype in dtypes.items()
        }
        broadcast_([piece for pieces in shared.values() for piece in pieces])
        return shared

    def route(self, scales: PerUnit, ask: bool = True) -> None:
        """Let the routers choose experts by their scales.

        Args:
            ask: which layers keep all experts whole (`RouterGates.set_scales`).
        """
        if self._gates is not None:
            self._gates.set_scales(scales[EXPERT_UNITS], ask)

    def norm_of(self, marked: PerUnit) -> float:
        """Return the L2 norm of the marked units' effective weights, each element counted once."""
        spread = Spread(marked, False)
        total = torch.zeros(1, dtype=float_sums(self.device), device=self.device)
        for name, axes in self._scored.items():
            held = self.held[name]
            for part, weights in zip(held.parts, self._scored_weights(name), strict=True) if held.counted else ():
                for block in self._marked_blocks(weights, axes, spread, part):
                    total += block.square().sum().to(self.device)
        if self.sharded:
            (total,) = add_over_ranks([total])
        return float(total) ** 0.5

    def _marked_blocks(
        self, values: torch.Tensor, axes: ParameterAxes, spread: Spread, part: Part
    ) -> Iterator[torch.Tensor]:
        """Yield some rows after the other of a piece, in fp32, with zero for what isn't marked."""
        masks = [
            (axis.dim, axis.lay(spread.along(structure, layer, axis.layout, values), values.dim(), part))
            for structure, layer, axis in axes
        ]
        rows = chunk_rows(values, chunk_size(self._elements, self.device))
        for start in range(0, values.shape[0], rows):
            block = values[start : start + rows].float()
            chosen = torch.zeros_like(block, dtype=torch.bool)
            for dim, mask in masks:
                chosen |= mask[start : start + rows] if dim == 0 else mask
            yield (block + axes[0][2].shift).masked_fill_(~chosen, 0.0)
