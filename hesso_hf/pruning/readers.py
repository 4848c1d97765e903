"""Readers: the linear layers that read units, into whose other columns what units say can be refitted.

Shapes: C columns, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed.parts import plain_name
from ..structures.groups import Axis
from .saliency import PerUnit
from .weights.bound_groups import BoundGroups


@dataclass(frozen=True)
class Reader:
    """A matrix that reads units: by its input's dimension `dim` it weighs what they say."""

    name: str
    module: nn.Module
    dim: int
    axes: tuple[tuple[str, int, Axis], ...]

    def columns(self, units: PerUnit) -> torch.Tensor:
        """Return the columns of units that are chosen, bool (C,)."""
        chosen = [axis.layout.expand(units[structure][layer], False) for structure, layer, axis in self.axes]
        return torch.stack(chosen).any(0)

    def weight(self, bound: BoundGroups) -> torch.Tensor:
        """Return its whole weight, adapters included, as (O, C); where processes hold parts of it all call it."""
        weight = bound.whole(self.name)
        return weight if self.dim == 1 else weight.T


def readers_of(model: nn.Module, bound: BoundGroups) -> list[Reader]:
    """Return the linear layers whose input is made of units: down projections and attention outputs."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = []
    for name, axes in bound.axes.items():
        module = modules.get(name.removesuffix(".weight"))
        dim = _input_dim(module)
        read = tuple(entry for entry in axes if entry[2].dim == dim and entry[0] != "embedding_channels")
        if module is not None and dim is not None and read and not any(axis.power for _, _, axis in read):
            found.append(Reader(name, module, dim, read))
    return found


def columns_of(module: nn.Module) -> int:
    """Return how many columns a linear layer's weight has, 0 of other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.nx if isinstance(module, Conv1D) else 0


def _input_dim(module: nn.Module | None) -> int | None:
    """Return which dimension of a linear layer's weight its input has, None for other modules."""
    module = getattr(module, "base_layer", module)  # under an adapter
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None
