"""The pruning decision beside a checkpoint's weights, so that it can be checked, resumed and exported alone."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata, load
from torch.distributed.checkpoint.metadata import StorageMeta
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import common, world_size
from ..errors import CheckpointMismatchError, HessoError

logger = logging.get_logger(__name__)

STATE_NAME = "hesso_state.json"
SHARDS_NAME = f"{FSDP_MODEL_NAME}_0"  # folder of the model's parts in a sharded run's checkpoint


def write_state(folder: Path, decision: Mapping[str, Any], config: HessoConfig, training: Mapping[str, Any]) -> None:
    """Write what `PruningProcess.decision` says, the config and the training record, atomically."""
    staged = folder / f"{STATE_NAME}.tmp"
    state = {**decision, "config": config.to_dict(), "training": training}
    staged.write_text(json.dumps(state), encoding="utf-8")
    os.replace(staged, folder / STATE_NAME)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointMismatchError: where there is no such folder, or it has no pruning state.
    """
    path = folder / STATE_NAME
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.glob("checkpoint-*"))
        raise CheckpointMismatchError(f"`resume_from_checkpoint` ({str(folder)!r}) doesn't exist; there are: {there}")
    if not path.exists():
        raise CheckpointMismatchError(
            f"`resume_from_checkpoint` ({str(folder)!r}) holds no pruning state: it was not written by HessoTrainer; "
            "load its weights as the model and start a new run"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_resumable(folder: Path) -> None:
    """Refuse a checkpoint whose optimizer and pruning state weren't saved.

    Raises:
        CheckpointMismatchError: where there is no pruning state, or no optimizer's.
    """
    read_state(folder)
    sharded = holds_masters(folder) or any(path.is_dir() for path in folder.glob("optimizer_*"))  # FSDP2's
    if not (folder / OPTIMIZER_NAME).exists() and not (folder / "optimizer.bin").exists() and not sharded:
        raise CheckpointMismatchError(
            f"`resume_from_checkpoint` ({str(folder)!r}) holds no {OPTIMIZER_NAME}: it was saved with save_only_model; "
            "export it, or start a new run from its weights"
        )


def load_converted_(model: PreTrainedModel, folder: Path) -> None:
    """Load weights that a class stores under other names than it holds them by, as it does those of fused experts.

    `Trainer` takes from a checkpoint only what has the same name, and leaves such weights as they are.
    """
    if stored_names(folder) <= model.state_dict().keys():
        return
    logger.info(f"{type(model).__name__} stores weights under other names: they are loaded through `from_pretrained`")
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the one pickle among torch's distributed files, and nothing in it but what torch puts there."""

    _allowed: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
        "collections": {"OrderedDict"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | type(torch.Size)):
            return found
        if name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointMismatchError(
            f"the checkpoint's `.metadata` wants {module}.{name}, which torch never writes there"
        )


class _Reader(FileSystemReader):
    """torch's reader, but for the pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_shards(model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Load the model of a checkpoint that a sharded run wrote, whole, on one process.

    Args:
        folder: of the checkpoint; torch's distributed files lie in a folder of it.
    """
    reader = _Reader(folder / SHARDS_NAME)
    stored = reader.read_metadata().state_dict_metadata
    dtypes = {found.properties.dtype for found in stored.values() if isinstance(found, TensorStorageMetadata)}
    with no_init_weights():
        model = model_class(config)
    model.tie_weights()
    model = model.to(dtypes.pop())  # type: ignore[arg-type, call-arg]  # its wrapper hides the signature
    load({"model": model.state_dict()}, storage_reader=reader, no_dist=True)
    return model


def holds_masters(folder: Path) -> bool:
    """Whether DeepSpeed wrote its fp32 masters into a checkpoint."""
    return any(path.is_dir() for path in folder.glob("global_step*"))


def load_masters(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path, trust_pickles: bool
) -> PreTrainedModel:
    """Load the model of a checkpoint that DeepSpeed's ZeRO wrote, whole and in fp32, on one process.

    DeepSpeed's own function reads its files. They are pickles, which can run code when they are opened. Without
    DeepSpeed the weights that lie beside them are loaded, which are as coarse as the run's `bf16` or `fp16`.

    Raises:
        HessoError: where neither can be had, pickles aren't trusted, or the masters aren't those of `model_class`.
    """
    if importlib.util.find_spec("deepspeed") is None:
        if not any(folder.glob("model*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise HessoError(
                f"`source` ({str(folder)!r}) holds the weights in DeepSpeed's files only, and deepspeed isn't "
                "installed: `pip install deepspeed`, or run `python zero_to_fp32.py . .` in that folder where it is"
            )
        logger.warning(f"deepspeed isn't installed: the weights beside its files in {folder} are read, not the masters")
        return model_class.from_pretrained(folder)
    if not trust_pickles:
        raise HessoError(
            f"`source` ({str(folder)!r}) holds DeepSpeed's files, which are pickles and can run code when they are "
            "opened. If they are your own, say so: `trust_pickles=True`, `hesso-hf export --trust-pickles`"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        stored = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    with no_init_weights():
        model = model_class(config).float()
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        found = tuple(stored[name].shape) if name in stored else None
        if found != tuple(tensor.shape):
            raise HessoError(f"{name} should be {tuple(tensor.shape)} and is {found} in DeepSpeed's files of {folder}")
        tensor.copy_(stored[name].contiguous())  # put together in its turn
    return model


def stored_names(folder: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint's safetensors files."""
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            names.update(stored.keys())
    return names


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose last file, the trainer's state, was written; name half-written ones."""
    return next(_whole_checkpoints(folder), None)


def last_common_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole for every process; all call it.

    Nodes with disks of their own may have been killed when some of them had written a checkpoint and others hadn't.
    """
    if world_size() == 1:
        return last_checkpoint(folder)
    steps = common({_step_of(path) for path in _whole_checkpoints(folder)})
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{max(steps)}" if steps else None


def _whole_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield them, the newest first."""
    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=_step_of, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{path} is half-written (no valid {TRAINER_STATE_NAME}) and is passed over")
            continue
        yield path


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# what checkpoints from before a key of HessoConfig did
BEFORE = {"stream_basis": "given", "stream_basis_tolerance": 0.05}


def check_config(saved: dict[str, Any], current: dict[str, Any], folder: str) -> None:
    for key, value in current.items():
        before = saved.get(key, BEFORE.get(key))
        if key not in ("export_dtype", "lora_export") and before != json.loads(json.dumps(value)):
            raise CheckpointMismatchError(
                f"{folder} was made with `{key}` = {before!r}, this run has {value!r}; "
                "resume with the same HessoConfig or start a new run"
            )
