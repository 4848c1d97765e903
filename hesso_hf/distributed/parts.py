"""Shards: which part of a parameter this process holds, and sums over all processes.

Under FSDP2 every process holds some rows of a parameter (a DTensor), under ZeRO a range of its elements; elsewhere it
holds all of it. What is done to a parameter is done to the parts at hand; only what mixes the indices that processes
hold apart (`whole_of`, `rewrite_`) puts one together for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import UnsupportedStructureError


@dataclass(frozen=True)
class Part:
    """The indices of a parameter, a stretch of each dimension, that this process holds.

    Attributes:
        starts: first index of each dimension.
        sizes: number of indices of each dimension; 0 where this process holds nothing.
        shape: of the whole parameter.
        counted: whether this process counts it in sums over all processes: of replicas one does.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    counted: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.sizes == self.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def first(self) -> int:
        """Position of its first element in the parameter when that is flattened."""
        return sum(start * math.prod(self.shape[dim + 1 :]) for dim, start in enumerate(self.starts))

    def window(self, but: int | None = None) -> tuple[slice, ...]:
        """Return the part's place in the whole parameter, as slices; along one dimension, `but`, all."""
        stretches = enumerate(zip(self.starts, self.sizes, strict=True))
        return tuple(slice(None) if dim == but else slice(low, low + size) for dim, (low, size) in stretches)

    def along(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Return those of one value per index, shape (length of the dimension,), that this part's indices have."""
        if self.sizes[dim] == self.shape[dim]:
            return values
        return values.narrow(0, self.starts[dim], self.sizes[dim])

    def spread_out(self, sums: torch.Tensor, dim: int) -> torch.Tensor:
        """Return one value per index of the whole dimension: the given ones where the part lies, zero else."""
        length, before = self.shape[dim], self.starts[dim]
        if len(sums) == length:
            return sums
        return torch.nn.functional.pad(sums, (before, length - before - len(sums)))


def flat_parts(shape: tuple[int, ...], start: int, stop: int) -> list[Part]:
    """Return the rectangles, in order, that a range of a parameter consists of when it is flattened row by row.

    At most 2 D - 1 of them, D dimensions; the elements of each are consecutive in the range.
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Part((start,) * len(shape), (stop - start,) * len(shape), shape)]
    row = math.prod(shape[1:])

    def within(index: int, low: int, high: int) -> list[Part]:
        inner = flat_parts(shape[1:], low - index * row, high - index * row)
        return [Part((index, *part.starts), (1, *part.sizes), shape) for part in inner]

    begin, end = -(-start // row), stop // row  # of the whole rows
    if begin > end:
        return within(end, start, stop)
    rows = [Part((begin, *(0,) * (len(shape) - 1)), (end - begin, *shape[1:]), shape)] if begin < end else []
    return [*within(begin - 1, start, begin * row), *rows, *within(end, end * row, stop)]


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; where ZeRO-3 holds it in pieces, its own one is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(shape: Iterable[int]) -> Part:
    """Return the part that is all of a parameter."""
    sizes = tuple(shape)
    return Part((0,) * len(sizes), sizes, sizes)


def part_of(name: str, parameter: torch.Tensor) -> Part:
    """Return which part of a parameter this process holds.

    Raises:
        UnsupportedStructureError: for a DTensor that is placed otherwise than in shards and replicas, naming it.
    """
    if not isinstance(parameter, DTensor):
        return whole(parameter.shape)
    starts, sizes = [0] * parameter.dim(), list(parameter.shape)
    counted, mesh = True, parameter.device_mesh
    split = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    for mesh_dim, placement in enumerate(parameter.placements):
        position, processes = mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)
        if isinstance(placement, Replicate):
            counted &= position == 0
        elif type(placement) is Shard and len(split) == 1:  # split as `torch.chunk` does
            dim = placement.dim % parameter.dim()
            length = -(-sizes[dim] // processes)
            begin = min(position * length, sizes[dim])
            starts[dim], sizes[dim] = starts[dim] + begin, min(length, sizes[dim] - begin)
        else:
            raise UnsupportedStructureError(
                f"{name} is placed as {placement} over the processes, which pruning doesn't support (tensor parallel "
                "together with FSDP2 places it so); use FSDP2, DDP or ZeRO alone"
            )
    return Part(tuple(starts), tuple(sizes), tuple(parameter.shape), counted)


def is_sharded(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether processes hold different parts of any of these."""
    return any(
        any(not isinstance(placement, Replicate) for placement in parameter.placements)
        for parameter in parameters
        if isinstance(parameter, DTensor)
    )


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that the model has for them before anything is wrapped around its modules.

    Under FSDP2 they are the shards, also where a forward pass has left them gathered.
    """
    reshard(model)
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def plain_name(name: str) -> str:
    """Return a name without those of what compilation and activation checkpointing wrap around modules."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def reshard(model: nn.Module) -> None:
    """Let go what FSDP2 has gathered for a forward pass, so that the next one sees what was changed in the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def stock_class(model: nn.Module) -> type:
    """Return the class of a model as it was before FSDP2, which puts one of its own over it."""
    found = type(model)
    if isinstance(model, FSDPModule):
        return next(base for base in found.__bases__ if base is not FSDPModule)
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def splits(tensor: torch.Tensor, dim: int) -> bool:
    """Whether processes hold different indices of a dimension: the same answer on all of them."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return any(isinstance(placement, Shard) and placement.dim == dim for placement in placements)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, put together on the device that computes where processes hold parts of it: all call it then."""
    if not isinstance(tensor, DTensor):
        return tensor
    held = like_parameter(local(tensor.detach()).to(tensor.device_mesh.device_type), tensor)
    assert isinstance(held, DTensor)
    return held.full_tensor()


@torch.no_grad()
def rewrite_(parameter: torch.Tensor, dim: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put in a parameter's place what `change` makes of it, which may mix indices of one dimension and no other.

    Where processes hold different indices of that dimension, they put the parameter together for it: all call it.
    """
    if not isinstance(parameter, DTensor):
        parameter.copy_(change(parameter))
        return
    held = local(parameter.detach())
    if splits(parameter, dim):
        held.copy_(change(whole_of(parameter))[part_of("", parameter).window()])
    else:
        held.copy_(change(held.to(parameter.device_mesh.device_type)))


def like_parameter(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which this process holds `values`, placed as the parameter is."""
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(
        values, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def add_over_ranks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one dtype added up over all processes, in one all-reduce of one vector."""
    vector = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(vector)
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
