"""Export from shards: the smaller model is cut, verified and written without a full copy of it on any process.

Every process cuts its own rows; one parameter at a time is put together and goes on to the process that writes the file
it belongs to. Logits are compared in fp32, in forward passes that put one layer together at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...compat import set_buffer
from ...distributed.collectives import all_or_none, from_all, use_each
from ...distributed.parts import local, named_parameters, part_of, plain_name, stock_class
from ...errors import HessoError, VerificationError
from ...export.decision import NOTHING_CUT, Decision
from ...export.parameters import ParameterSource, Routing, check_shape, check_stored
from ...export.stored import stored_files
from ...export.weight_files import WeightFiles, by_layer, saved_tensors, stored_shapes, write_configs
from ...structures.cut import Cuts, build_cut, copy_buffers, cut_part, cuts_by_tensor
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names
from ..streamed import streamed, without_weights


@dataclass(frozen=True)
class Writers:
    """Which processes write: all together into one folder, or those of each node into a folder of that node's.

    Attributes:
        rank: this process' among them.
        count: how many write into the same folder.
        main: whether this process makes, completes and publishes the folder.
    """

    rank: int
    count: int
    main: bool


class ShardedSource(ParameterSource):
    """A model under FSDP2; the smaller one is sharded as it is, in fp32.

    Args:
        model: the trained model, pruned units at zero.
        writers: which processes write files.
    """

    def __init__(self, model: PreTrainedModel, decision: Decision, writers: Writers) -> None:
        super().__init__(model, decision, model.device, writers.main)
        self._writers = writers

    def common_folder(self, folder: Path | None) -> Path:
        """Tell the processes that write into it which folder the main one of them has made."""
        found = from_all(folder)[dist.get_rank() - self._writers.rank]  # a node's have ranks one after the other
        if found is None:
            raise HessoError(
                f"`save_on_each_node`: process {dist.get_rank()} is number {self._writers.rank} on its node, and the "
                "one that is number 0 there has another rank than that difference; launch with ranks that count node "
                "by node"
            )
        return found

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return those of a forward pass that puts one layer together at a time."""
        full = without_weights(self.model, self.decision.groups, NOTHING_CUT)
        return streamed(full, named_parameters(self.model), _whole_fp32, input_ids, self.decision.routing)

    def logits_of_cut(
        self, small: PreTrainedModel, kept: KeptUnits, input_ids: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        """Return those of a forward pass that puts one layer together at a time."""
        alike = without_weights(self.model, self.decision.groups, kept)
        copy_buffers(alike, small, self.decision.groups, NOTHING_CUT)
        return streamed(alike, named_parameters(small), _whole_fp32, input_ids, routing)

    def cut(self, kept: KeptUnits) -> PreTrainedModel:
        """Cut each process' own rows, and give each its own rows of what is left; one parameter at a time."""
        groups = self.decision.groups
        small = all_or_none(lambda: sharded_copy(self.model, groups, kept), device_of(self.model))
        sources, cuts = named_parameters(self.model), cuts_by_tensor(groups, kept)
        parameters = named_parameters(small)
        origins = full_names(parameters, groups, kept)
        for name, parameter in parameters.items():
            cut_shards(name, sources[origins[name]], cuts.get(origins[name], ()), parameter)
        with torch.no_grad():
            copy_buffers(small, self.model, groups, kept)
        return small.eval()

    # -- writing --------------------------------------------------------------------------------------------------

    def save(self, small: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str) -> PreTrainedModel:
        """Put one layer after the other together, and write this process' files, a tensor when it has come.

        Of n processes each writes every n-th file.
        """
        shapes, files = stored_shapes(small, dtype), list[WeightFiles]()

        def take(batch: Mapping[str, torch.Tensor]) -> None:
            if not files:
                files.append(WeightFiles(folder, shapes, max_shard_size, self._writers.rank, self._writers.count))
            for name, tensor in batch.items():
                files[0].write(name, [tensor])

        use_each(_batches(small, dtype), take)
        files[0].finish()
        if self.main:
            write_configs(small, folder, dtype)
            files[0].write_index(small.num_parameters())
        return small

    def read_back(self, small: PreTrainedModel, written: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Compare what this process holds of each parameter with what lies on disk, and round it as that is."""
        stored, names = stored_files(folder), stored_shapes(small, dtype).keys()
        if stored.keys() != names:
            raise VerificationError(f"{min(stored.keys() ^ names)} is missing in {folder}, or shouldn't be there")
        with torch.no_grad():
            for name, parameter in named_parameters(small).items():
                values, part = local(parameter), part_of(name, parameter)
                rounded = values.to(dtype)
                if name in stored and part.sizes:  # where the class stores it otherwise, it is rounded and no more
                    with safe_open(stored[name], framework="pt") as file:
                        check_stored(name, file.get_slice(name)[part.window()], rounded, folder)
                values.copy_(rounded)
        return small


def _batches(small: PreTrainedModel, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors as the class stores them, a layer at a time."""
    for tensors in by_layer(saved_tensors(small)):
        made = {}
        for name, tensor in tensors.items():
            value = tensor.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            made[name] = whole.to(dtype=dtype if isinstance(tensor, nn.Parameter) else tensor.dtype, device="cpu")
        yield revert_weight_conversion(small, made)


def sharded_copy(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
    """Build a model of the same class with the kept units' sizes, in fp32, sharded as `model` is, its weights unset."""
    with init_empty_weights(include_buffers=False):
        small = build_cut(model, groups, kept)
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    of_lists: list[nn.Module] = [m for name, m in model.named_modules() if plain_name(name).split(".")[-1].isdigit()]
    wrapped = {stock_class(module) for module in of_lists if isinstance(module, FSDPModule)}
    for module in [module for module in small.modules() if type(module) in wrapped]:
        fully_shard(module, mesh=mesh)
    fully_shard(small, mesh=mesh)
    buffers = {name: buffer.to(mesh.device_type) for name, buffer in small.named_buffers()}
    small.to_empty(device=mesh.device_type)
    small.tie_weights()  # memory is given to each module by itself
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        set_buffer(small.get_submodule(owner), leaf, buffer)
    return small


@torch.no_grad()
def cut_shards(name: str, source: torch.Tensor, cuts: Cuts, target: torch.Tensor) -> None:
    """Write what is left of a tensor when units are cut into another one, of which each process has its own rows too.

    It is put together on every process for a moment. Where one process fails, for want of memory, all raise.
    """
    part, values = part_of(name, target), _together(name, source, cuts)
    check_shape(name, values.shape, part.shape)
    local(target).copy_(values[part.window()])


def _whole_fp32(parameter: torch.Tensor) -> torch.Tensor:
    return _together("", parameter, ())


def _together(name: str, source: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return what is left of a tensor, fp32, of which each process cuts its own rows (or columns); all call it."""
    device = _device_of(source)
    held = all_or_none(lambda: cut_part(local(source.detach()).float(), part_of(name, source), cuts).to(device), device)
    if isinstance(source, DTensor):
        for mesh_dim, placement in reversed(list(enumerate(source.placements))):
            if isinstance(placement, Shard):
                held = _gathered(held, source.device_mesh.get_group(mesh_dim), placement.dim, device)
    return held


def _gathered(held: torch.Tensor, group: dist.ProcessGroup, dim: int, device: torch.device) -> torch.Tensor:
    """Return the whole of a tensor of which each process of a group has some rows (or columns)."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=held.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([held.shape[dim]], device=held.device), group=group)
    sizes = [int(length) for length in lengths]

    def allocated() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        def of_length(length: int) -> torch.Tensor:
            return held.new_zeros([length if n == dim else size for n, size in enumerate(held.shape)])

        return of_length(max(sizes)), [of_length(max(sizes)) for _ in sizes], of_length(sum(sizes))

    padded, found, whole = all_or_none(allocated, device)
    padded.narrow(dim, 0, held.shape[dim]).copy_(held)
    dist.all_gather(found, padded, group=group)
    for piece, size, place in zip(found, sizes, whole.split(sizes, dim), strict=True):
        place.copy_(piece.narrow(dim, 0, size))
    return whole


def device_of(model: nn.Module) -> torch.device:
    """Return the device of collectives on what a model's processes share."""
    return next(_device_of(parameter) for parameter in model.parameters())


def _device_of(tensor: torch.Tensor) -> torch.device:
    if not isinstance(tensor, DTensor) or tensor.device_mesh.device_type == tensor.device.type:
        return tensor.device
    return torch.device(tensor.device_mesh.device_type, torch.accelerator.current_device_index())  # it is offloaded
