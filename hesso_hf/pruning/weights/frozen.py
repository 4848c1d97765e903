"""Frozen weights that pruning scales: their gradients while they are scored, and their values in checkpoints.

With adapters the model's own weights aren't trained, so nobody else computes their gradients or saves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...distributed.collectives import world_size
from ...errors import CheckpointMismatchError
from ...structures.cut import bits_of
from ..saliency import ParameterAxes, PerUnit


class FrozenWeights:
    """Frozen parameters by name, with the axes that units lie on.

    Args:
        parameters: none for models without adapters, which train or at least save all of their weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], axes: Mapping[str, ParameterAxes]) -> None:
        self._parameters, self._axes = dict(parameters), axes
        self._are_revealed = False

    def __contains__(self, name: str) -> bool:
        """Whether a parameter is one of them, though its gradient may be wanted just now."""
        return name in self._parameters

    def reveal(self, wanted: bool) -> None:
        """Let backward passes compute gradients of the weights, or not."""
        if wanted != self._are_revealed:
            for parameter in self._parameters.values():
                parameter.requires_grad_(wanted)
            self._are_revealed = wanted
        if not wanted:
            self.drop_gradients()

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """Let backward passes compute gradients meanwhile."""
        before = self._are_revealed
        self.reveal(True)
        try:
            yield
        finally:
            self.reveal(before)

    def drop_gradients(self) -> None:
        """Forget the gradients, so that neither clipping nor an optimizer sees them."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def average_gradients_(self) -> None:
        """Average the gradients over processes: DDP does so for trained parameters only."""
        if world_size() == 1 or not self._are_revealed:
            return
        for parameter in self._parameters.values():
            if parameter.grad is None:  # a batch may pass by what another process' batch uses
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, shrinking: PerUnit) -> dict[str, Any]:
        """Return what the weights' first values and the pruned units don't tell: slices of units on their way to zero.

        Args:
            shrinking: the units on their way, bool (L, U) per structure.
        """
        state = {}
        for name, parameter in self._parameters.items():
            values = parameter.data[self._chosen(name, shrinking)].clone()
            state[name] = {"values": values, "checksum": _checksum(parameter.data)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], scales: PerUnit, shrinking: PerUnit) -> None:
        """Bring the first values to where they were when `state` was made.

        Raises:
            CheckpointMismatchError: where the result differs: it was another model, or this one is pruned already.
        """
        if state.keys() != self._parameters.keys():
            odd = sorted(state.keys() ^ self._parameters.keys())[0]
            raise CheckpointMismatchError(f"{odd} is frozen in only one of the checkpoint and this model")
        for name, parameter in self._parameters.items():
            for structure, layer, axis in self._axes[name]:
                axis.mask_(parameter.data, scales[structure][layer] == 0)
            saved = state[name]
            chosen = self._chosen(name, shrinking)
            if int(chosen.sum()) == len(saved["values"]):
                parameter.data[chosen] = saved["values"].to(parameter.device, parameter.dtype)
            if _checksum(parameter.data) != saved["checksum"]:
                raise CheckpointMismatchError(
                    f"{name}, which is frozen, differs from what the checkpoint was trained on: load the same base "
                    "model anew, with the same dtype and adapter initialisation, before resuming"
                )

    def _chosen(self, name: str, shrinking: PerUnit) -> torch.Tensor:
        """Mark the elements of a parameter that are saved: all where the mean of a stream is taken out of it."""
        parameter, axes = self._parameters[name], self._axes[name]
        chosen = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        for structure, layer, axis in axes:
            if axis.centred:
                return torch.ones_like(chosen)
            chosen |= axis.spread(shrinking[structure][layer], parameter.dim(), fixed_value=False)
        return chosen


def _checksum(values: torch.Tensor) -> int:
    """Return a sum over the bits of all elements, whatever their order and the sign of a zero."""
    values = values + 0.0
    return int(bits_of(values.contiguous()).sum(dtype=torch.int64))
