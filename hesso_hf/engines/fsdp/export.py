"""Export from shards: the smaller model is cut, verified and written without a full copy of it on any process.

Every process cuts its own rows; one parameter at a time is put together and goes on to the process that writes the file
it belongs to. Verification runs on fp32 copies that are sharded as the trained model is.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
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

from ...distributed.collectives import from_main, on_all
from ...distributed.parts import local, named_parameters, part_of, plain_name, reshard, stock_class
from ...errors import HessoError, VerificationError
from ...export.export import DTYPES, make_report
from ...export.plots import PLOT_NAME
from ...export.publish import staged_folder
from ...export.report import PruningReport
from ...export.verify import FOLD_TOLERANCE, Verification, kept_mask, verification_tokens
from ...hf_models.tiny_model import logits_of, relative_error
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names
from ...structures.router_gates import routed_by
from ...structures.uneven_layers import layer_list, write_modelling_file

INDEX_NAME = "model.safetensors.index.json"
NOTHING = KeptUnits({}, {})


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
    """Write the smaller model of a sharded one, as `export_pruned` does of a whole one; all processes call it.

    Raises:
        HessoError: on all processes, where one fails; `output_dir` is untouched then.
        VerificationError: where the smaller model's logits differ.
    """
    exported = on_all(lambda: ShardedExport(model, groups, kept_units))
    stored = DTYPES[dtype] if dtype else model.dtype
    reports: list[PruningReport] = []

    def finish(folder: Path, verification: Verification) -> None:
        if hasattr(exported.small.config, "layer_sizes"):
            write_modelling_file(folder, stock_class(model).__name__, layer_list(groups))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        reports.append(make_report(model, exported.small, groups, kept_units, verification, training, None))
        if not reports[0].write(folder):
            (output_dir / PLOT_NAME).unlink(missing_ok=True)  # of a model that was here before

    exported.write(output_dir, stored, max_shard_size, writers, finish)
    return from_main(reports[0] if reports else None)


def write_dense(
    model: PreTrainedModel,
    output_dir: Path,
    groups: PruningGroups,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    writers: Writers,
) -> None:
    """Write a sharded model as it is, with nothing cut, to a folder that `from_pretrained` loads."""

    def finish(folder: Path, _: Verification) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    exported = on_all(lambda: ShardedExport(model, groups, NOTHING))
    exported.write(output_dir, model.dtype, "5GB", writers, finish)


class ShardedExport:
    """The smaller model of a sharded one, sharded alike, in fp32.

    Args:
        model: the trained model under FSDP2, pruned units at zero.
        groups: its structures.
        kept: the decision.

    Raises:
        VerificationError: on all processes, where the fold doesn't reproduce the trained model's logits.
    """

    def __init__(self, model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
        self._model, self._groups, self._kept = model, groups, kept
        self._experts = groups.structures[EXPERT_UNITS] if EXPERT_UNITS in kept.kept else None
        self._mask = kept_mask(kept, EXPERT_UNITS) if EXPERT_UNITS in kept.kept else None
        self.input_ids = verification_tokens(model)
        full = self._filled(NOTHING)
        with routed_by(full, self._experts, self._mask):
            self.logits = logits_of(full, self.input_ids)
        del full
        gc.collect()  # FSDP2's modules refer to each other in circles
        self.small = self._filled(kept)
        self.fold_error = self._error()
        if not self.fold_error <= FOLD_TOLERANCE:
            raise VerificationError(
                f"the smaller model's logits differ from the trained model's by {self.fold_error:.1e} (relative, fp32; "
                f"allowed {FOLD_TOLERANCE:.0e}). Nothing was published"
            )

    def _error(self) -> float:
        with routed_by(self.small, None if EXPERT_UNITS in self._kept.kept else self._experts, self._mask):
            error = relative_error(logits_of(self.small, self.input_ids), self.logits)
        reshard(self.small)
        return error

    def _filled(self, kept: KeptUnits) -> PreTrainedModel:
        small = sharded_copy(self._model, self._groups, kept)
        sources, cuts = named_parameters(self._model), cuts_by_tensor(self._groups, kept)
        parameters = named_parameters(small)
        origins = full_names(parameters, self._groups, kept)
        with torch.no_grad():
            for name, parameter in parameters.items():
                source = sources[origins[name]]
                held = cut_part(local(source.detach()).float(), part_of(name, source), cuts.get(origins[name], ()))
                part = part_of(name, parameter)
                values = _together(held, source)
                if tuple(values.shape) != part.shape:
                    raise VerificationError(f"{name} is {tuple(values.shape)} after cutting, not {part.shape}")
                local(parameter).copy_(values[_window(part.starts, part.sizes)])
            copy_buffers(small, self._model, self._groups, kept)
        return small.eval()

    # -- writing --------------------------------------------------------------------------------------------------

    def write(
        self,
        target: Path,
        dtype: torch.dtype,
        max_shard_size: str,
        writers: Writers,
        finish: Callable[[Path, Verification], None],
    ) -> None:
        """Write the model's files, compare what lies on disk with what was to be written, and publish.

        Args:
            finish: called on the main process of each folder, to add the tokenizer, the report and so on.

        Raises:
            HessoError: on all processes, where any could not write its part; `target` is untouched then.
        """
        with ExitStack() as stack:
            folder = _shared_folder(target, writers, stack)
            names = on_all(lambda: self._write_files(folder, dtype, max_shard_size, writers))
            on_all(lambda: self._read_back(folder, dtype, names))
            rounding = on_all(self._error)
            name = str(dtype).removeprefix("torch.")
            verification = Verification(self.fold_error, rounding, name, self.input_ids.numel())
            on_all(lambda: finish(folder, verification) if writers.main else None)
            on_all(stack.close)  # publishes

    def _write_files(self, folder: Path, dtype: torch.dtype, max_shard_size: str, writers: Writers) -> set[str]:
        """Put one layer after the other together, keep what belongs to this process' files, and return all names.

        A process that can't write goes on to put layers together: the others can't without it.
        """
        shapes = {name: value.to("meta") for batch in self._batches(dtype, meta=True) for name, value in batch.items()}
        pattern = "model{suffix}.safetensors"
        split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size, filename_pattern=pattern)
        own, failed = _OwnFiles(folder, split.filename_to_tensors, writers), None
        for batch in self._batches(dtype):
            try:
                if failed is None:
                    own.add(batch)
            except Exception as error:  # a disk may be full
                failed = error
        if failed is not None:
            raise failed
        assert own.complete
        if writers.main:
            self._write_configs(folder, dtype)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
        return set(shapes)

    def _write_configs(self, folder: Path, dtype: torch.dtype) -> None:
        config = copy.deepcopy(self.small.config)
        config.dtype = dtype
        config.architectures = [stock_class(self.small).__name__]
        config.save_pretrained(folder)
        if self.small.can_generate() and self.small.generation_config is not None:
            self.small.generation_config.save_pretrained(folder)

    def _batches(self, dtype: torch.dtype, meta: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors under the names and in the forms that the class stores, a layer at a time.

        Args:
            meta: whether their shapes suffice.
        """
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in _stored_tensors(self.small).items():
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
            yield revert_weight_conversion(self.small, whole)

    # -- reading back ---------------------------------------------------------------------------------------------

    def _read_back(self, folder: Path, dtype: torch.dtype, names: set[str]) -> None:
        """Compare what this process holds of each parameter with what lies on disk, and round it as that is."""
        stored = _stored_files(folder)
        if stored.keys() != names:
            raise VerificationError(f"{min(stored.keys() ^ names)} is missing in {folder}, or shouldn't be there")
        with torch.no_grad():
            for name, parameter in named_parameters(self.small).items():
                values, part = local(parameter), part_of(name, parameter)
                rounded = values.to(dtype)
                if name in stored:  # where the class stores it otherwise, rounding is all that is looked at
                    with safe_open(stored[name], framework="pt") as file:
                        found = file.get_slice(name)[_window(part.starts, part.sizes)] if part.sizes else None
                    if found is not None and not torch.equal(found, rounded.cpu()):
                        raise VerificationError(f"{name} reads back from {folder} differently than it was written")
                values.copy_(rounded)


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


def _window(starts: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


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


def _shared_folder(target: Path, writers: Writers, stack: ExitStack) -> Path:
    """Let the main process of each folder make it, and tell the others that write into it."""

    def make() -> str | None:
        return str(stack.enter_context(staged_folder(target))) if writers.main else None

    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, on_all(make))
    folder = told[dist.get_rank() - writers.rank]  # a node's processes have ranks one after the other
    if folder is None:
        raise HessoError(
            f"`save_on_each_node`: process {dist.get_rank()} is number {writers.rank} on its node, and the one that is "
            "number 0 there has another rank than that difference; launch with ranks that count node by node"
        )
    return Path(folder)
