"""Export from shards: the smaller model is cut, verified and written without a full copy of it on any process.

Every process cuts its own rows; one parameter at a time is put together and goes on to the process that writes the file
it belongs to. Verification runs on fp32 copies that are sharded as the trained model is.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from ...distributed.parts import local, named_parameters, part_of, plain_name, stock_class
from ...errors import HessoError, VerificationError
from ...export.decision import NOTHING_CUT, Decision
from ...export.parameters import ParameterSource, check_shape, check_stored
from ...export.report import PruningReport
from ...export.write import DTYPES, Output, write_pruned, write_uncut
from ...hf_models.tiny_model import logits_of
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names

INDEX_NAME = "model.safetensors.index.json"


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


def export_sharded(
    model: PreTrainedModel,
    output_dir: Path,
    *,
    kept_units: KeptUnits,
    groups: PruningGroups,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    dtype: str | None,
    writers: Writers,
    training: Mapping[str, Any],
    max_shard_size: str = "5GB",
) -> PruningReport:
    """Write the smaller model of a sharded one; all processes call it. Raises as `write_pruned` does."""
    output = Output(output_dir, DTYPES[dtype] if dtype else model.dtype, tokenizer, max_shard_size)
    return write_pruned(ShardedSource(model, Decision(groups, kept_units), writers), output, training)


def write_dense(
    model: PreTrainedModel,
    output_dir: Path,
    groups: PruningGroups,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    writers: Writers,
) -> None:
    """Write a sharded model as it is, with nothing cut, to a folder that `from_pretrained` loads."""
    source = ShardedSource(model, Decision(groups, NOTHING_CUT), writers)
    write_uncut(source, Output(output_dir, model.dtype, tokenizer))


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
        told: list[Path | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, folder)
        found = told[dist.get_rank() - self._writers.rank]  # a node's processes have ranks one after the other
        if found is None:
            raise HessoError(
                f"`save_on_each_node`: process {dist.get_rank()} is number {self._writers.rank} on its node, and the "
                "one that is number 0 there has another rank than that difference; launch with ranks that count node "
                "by node"
            )
        return found

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return those of an fp32 copy that is sharded as the model is, and let it go."""
        full = self.cut(NOTHING_CUT)
        with self.decision.routing(full):
            logits = logits_of(full, input_ids)
        del full
        gc.collect()  # FSDP2's modules refer to each other in circles
        return logits

    def cut(self, kept: KeptUnits) -> PreTrainedModel:
        """Cut each process' own rows, and give each its own rows of what is left; one parameter at a time."""
        groups = self.decision.groups
        small = sharded_copy(self.model, groups, kept)
        sources, cuts = named_parameters(self.model), cuts_by_tensor(groups, kept)
        parameters = named_parameters(small)
        origins = full_names(parameters, groups, kept)
        with torch.no_grad():
            for name, parameter in parameters.items():
                source = sources[origins[name]]
                held = cut_part(local(source.detach()).float(), part_of(name, source), cuts.get(origins[name], ()))
                part = part_of(name, parameter)
                values = _together(held, source)
                check_shape(name, values.shape, part.shape)
                local(parameter).copy_(values[part.window()])
            copy_buffers(small, self.model, groups, kept)
        return small.eval()

    # -- writing --------------------------------------------------------------------------------------------------

    def save(self, small: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str) -> PreTrainedModel:
        """Put one layer after the other together, and keep and write what belongs to this process' files.

        A process that can't write goes on to put layers together: the others can't without it.
        """
        shapes = _stored_shapes(small, dtype)
        pattern = "model{suffix}.safetensors"
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size, filename_pattern=pattern)
        own, failed = _OwnFiles(folder, split.filename_to_tensors, self._writers), None
        for batch in _batches(small, dtype):
            try:
                if failed is None:
                    own.add(batch)
            except Exception as error:  # a disk may be full
                failed = error
        if failed is not None:
            raise failed
        assert own.complete
        if self.main:
            _write_configs(small, folder, dtype)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        return small

    def read_back(self, small: PreTrainedModel, written: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Compare what this process holds of each parameter with what lies on disk, and round it as that is."""
        stored, names = _stored_files(folder), _stored_shapes(small, dtype).keys()
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


def _write_configs(small: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(small.config)
    config.dtype = dtype
    config.architectures = [stock_class(small).__name__]
    config.save_pretrained(folder)
    if small.can_generate() and small.generation_config is not None:
        small.generation_config.save_pretrained(folder)


def _batches(small: PreTrainedModel, dtype: torch.dtype, meta: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors under the names and in the forms that the class stores, a layer at a time.

    Args:
        meta: whether their shapes suffice.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _stored_tensors(small).items():
        found = re.match(r".*?\.\d+(?=\.)", name)
        layers.setdefault(found.group() if found else name, {})[name] = tensor
    for tensors in layers.values():
        whole = {}
        for name, tensor in tensors.items():
            kept = tensor.dtype if not isinstance(tensor, torch.nn.Parameter) else dtype
            if meta:
                whole[name] = torch.empty(tensor.shape, dtype=kept, device="meta")
            else:
                value = tensor.detach()
                value = value.full_tensor() if isinstance(value, DTensor) else value
                whole[name] = value.to(dtype=kept, device="cpu")
        yield revert_weight_conversion(small, whole)


def _stored_shapes(small: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what will be stored, on the meta device."""
    return {name: value.to("meta") for batch in _batches(small, dtype, meta=True) for name, value in batch.items()}


class _OwnFiles:
    """The files that one process writes, each when its last tensor has come: of n processes each has every n-th."""

    def __init__(self, folder: Path, files: Mapping[str, list[str]], writers: Writers) -> None:
        self._folder = folder
        own = [file for index, file in enumerate(files) if index % writers.count == writers.rank]
        self._missing = {file: set(files[file]) for file in own}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in own}
        self._file_of = {name: file for file in own for name in files[file]}

    @property
    def complete(self) -> bool:
        """Whether all files are written."""
        return not self._missing

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what belongs to the files, and write those that are complete."""
        for name, tensor in tensors.items():
            if name in self._file_of:
                self._waiting[self._file_of[name]][name] = tensor.contiguous()
                self._missing[self._file_of[name]].discard(name)
        for file in [file for file, names in self._missing.items() if not names]:
            save_file(self._waiting.pop(file), self._folder / file, metadata={"format": "pt"})
            del self._missing[file]


def sharded_copy(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
    """Build a model of the same class with the kept units' sizes, in fp32, sharded as `model` is, its weights unset."""
    with init_empty_weights(include_buffers=False):
        small = build_cut(model, groups, kept)
    device = torch.device(_mesh_of(model).device_type)
    wrapped = {stock_class(m) for name, m in model.named_modules() if _is_wrapped(m) and _in_a_list(name)}
    for module in [module for module in small.modules() if type(module) in wrapped]:
        fully_shard(module, mesh=_mesh_of(model))
    fully_shard(small, mesh=_mesh_of(model))
    buffers = {name: buffer.to(device) for name, buffer in small.named_buffers()}
    small.to_empty(device=device)
    small.tie_weights()  # memory is given to each module by itself
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        small.get_submodule(owner)._buffers[leaf] = buffer
    return small


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _in_a_list(name: str) -> bool:
    return plain_name(name).rpartition(".")[2].isdigit()


def _mesh_of(model: PreTrainedModel) -> Any:
    return next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))


def _together(held: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter of which each process cut its own rows (or columns)."""
    if not isinstance(source, DTensor):
        return held
    split = [
        (mesh_dim, placement.dim)
        for mesh_dim, placement in enumerate(source.placements)
        if isinstance(placement, Shard)
    ]
    for mesh_dim, dim in reversed(split):
        group = source.device_mesh.get_group(mesh_dim)
        lengths = [torch.zeros(1, dtype=torch.int64, device=held.device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(lengths, torch.tensor([held.shape[dim]], device=held.device), group=group)
        longest = max(int(length) for length in lengths)
        padded = held.new_zeros([longest if n == dim else size for n, size in enumerate(held.shape)])
        padded.narrow(dim, 0, held.shape[dim]).copy_(held)
        found = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(found, padded, group=group)
        held = torch.cat([piece.narrow(dim, 0, int(n)) for piece, n in zip(found, lengths, strict=True)], dim)
    return held


def _stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters, tied ones once, and the persistent buffers, in the model's order."""
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    kept = [name for name in state if name in parameters or name not in every]
    return {name: parameters.get(name, state[name]) for name in kept}


def _stored_files(folder: Path) -> Mapping[str, Path]:
    found: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            found |= dict.fromkeys(stored.keys(), path)
    return found
