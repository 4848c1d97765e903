"""What this process holds of a model's parameters: pieces of each, with their gradients and optimizer state.

A whole parameter is one piece, and so is the shard of a DTensor; under ZeRO a process holds a range of the flattened
parameter, which is several rectangles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...distributed.collectives import is_main_process
from ...distributed.parts import Part, full_shape, is_sharded, local, part_of, splits, whole_of
from .snapshot import Snapshot, snapshotted


class Held:
    """What this process holds of one parameter that is whole or a DTensor.

    Args:
        name: of the parameter.
        parameter: the parameter or its shard.
        counted: whether this process counts it in sums over all processes, where it isn't distributed.

    Attributes:
        parts: where the pieces lie in the whole parameter.
        gradient_scale: what gradients were multiplied by.
    """

    parameter: Any
    gradient_scale = 1.0

    def __init__(self, name: str, parameter: nn.Parameter, counted: bool = True) -> None:
        self.parameter = parameter
        self.parts: list[Part] = [part_of(name, parameter)]
        self.counted = counted and self.parts[0].counted

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return full_shape(self.parameter)

    def weights(self) -> list[torch.Tensor]:
        """Return the weights of each piece; `weights_changed` follows what is done to them in place."""
        return [local(self.parameter.data)]

    def gradients(self) -> list[torch.Tensor] | None:
        """Return the gradient of each piece, to be changed in place before `gradients_changed`; None without one."""
        return None if self.parameter.grad is None else [local(self.parameter.grad)]

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        """Yield the pieces of each plain floating value in the optimizer's state that has one entry an element."""
        for value in state.get(self.parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == self.parameter.shape and is_plain(local(value)):
                yield [local(value)]

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return the copy of each piece's weights in a snapshot."""
        return [snapshot.weights_of(self.parameter)]

    def splits(self, dim: int) -> bool:
        """Whether processes hold different indices of a dimension: the same answer on all of them."""
        return splits(self.parameter, dim)

    def whole(self) -> torch.Tensor:
        """Return all of the weights, of which processes may hold parts: all call it, for one parameter after another.

        They are those that are trained, on the device that computes, and no copy where this process holds them all.
        """
        return whole_of(self.parameter.data)

    def pieces_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Return what of a tensor of the parameter's shape belongs to each piece, where the weights lie."""
        return [
            (whole if part.is_whole else whole[part.window()].clone()).to(weights.device)
            for part, weights in zip(self.parts, self.weights(), strict=True)
        ]

    def weights_changed(self) -> None:
        """Let the weights that the model computes with follow."""

    def gradients_changed(self) -> None:
        """Let the engine know of changed gradients."""


def is_plain(value: torch.Tensor) -> bool:
    """Whether optimizer state can be masked: numbers themselves, not what stands for them in 8 or 4 bits."""
    return type(value) is torch.Tensor and value.is_floating_point()


class Holdings:
    """How processes share a model's parameters: as they stand, whole or as DTensors.

    Attributes:
        sharded: whether processes hold different parts, so that sums have to be added up.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sharded = is_sharded(parameters)
        self._here = not self.sharded or is_main_process()  # of what isn't distributed, one process' copy counts

    def held(self, name: str, parameter: nn.Parameter) -> Held:
        """Return what this process holds of a parameter."""
        return Held(name, parameter, isinstance(parameter, DTensor) or self._here)

    def snapshot(self, optimizer: Optimizer, scaled: Iterable[torch.Tensor], on_cpu: bool) -> Snapshot:
        """Copy what an optimizer trains and what else is scaled."""
        return Snapshot(snapshotted(optimizer, scaled), optimizer, on_cpu)

    def publish(self) -> None:
        """Let all processes compute with weights that were changed outside of a training step."""

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Make passes through the model beside those of training; what was gathered for them is let go."""
        yield


MakeHoldings = Callable[[Iterable[nn.Parameter]], Holdings]
