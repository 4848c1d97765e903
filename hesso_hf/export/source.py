"""What is exported: a trained model, or the one that a checkpoint holds, with the decision that lies beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata, load
from torch.distributed.checkpoint.metadata import StorageMeta
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, logging

from ..config.files import REPORT_NAME, STATE_NAME
from ..errors import CheckpointMismatchError, HessoError, first_line
from ..hf_models.build import load_config, model_class_of, unknown_class_of
from ..structures.cut import cut_model, zero_units_
from ..structures.groups import KeptUnits
from ..structures.lora import ADAPTER_CONFIG, Adapters, base_of, lora_layers, parameters_of
from ..structures.turned_base import heal_base_, read_turn, turn_base_
from ..structures.uneven_layers import uneven_sizes
from ..vocabulary.tokens import KeptTokens
from .checkpoint import NotStreamedError, open_checkpoint
from .checkpoint_state import SHARDS_NAME, holds_masters, read_state
from .decision import Compaction, groups_for
from .in_training import compaction_of
from .stored import StoredWeights

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExportSource:
    """What there is before anything is decided.

    Attributes:
        model: as it was trained, with its adapters in place.
        dtype: that it was trained in; of ZeRO's fp32 masters that of the copy it computed with.
        kept: the decision, where there is one.
        tokenizer: that is saved along.
        training: what the run says of itself, plain JSON types; empty for a bare export.
        stored: what reads the model's parameters, where they are left in a checkpoint's files.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    kept: KeptUnits | None
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None
    training: Mapping[str, Any]
    stored: StoredWeights | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of the run's HessoConfig."""
        return self.training.get("hesso_config") or {}

    @property
    def vocabulary(self) -> KeptTokens | None:
        """The tokens that the run keeps, where some were removed."""
        found = self.training.get("vocabulary")
        return KeptTokens.from_dict(found) if found else None

    @property
    def compaction(self) -> Compaction | None:
        """That the run has cut the pruned units out of the model, where it has."""
        found = self.training.get("compaction")
        return Compaction.from_dict(found) if found else None

    def lora_export(self, asked: str | None) -> str | None:
        """Return how adapters are exported, None where the model has none.

        Raises:
            HessoError: where it is asked for something else than there is.
        """
        if asked not in (None, "merged", "adapter"):
            raise HessoError(f"`lora_export` ({asked!r}) must be 'merged' or 'adapter'")
        if lora_layers(self.model):
            return asked or self.config.get("lora_export", "merged")
        if asked is not None:
            name = type(self.model).__name__
            raise HessoError(f"`lora_export` ({asked!r}): {name} has no LoRA adapter; leave it out")
        return None


def read_source(
    source: str | os.PathLike[str] | nn.Module,
    kept: KeptUnits | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    training: Mapping[str, Any] | None,
    trust_pickles: bool,
    vocabulary: bool = False,
) -> ExportSource:
    """Take a model as it is, or load a checkpoint; what is given counts more than what lies beside the weights.

    Args:
        vocabulary: whether tokens are removed.

    Raises:
        HessoError: where it is no checkpoint, pruning hasn't finished in it, or it can't be read.
    """
    if isinstance(source, nn.Module):
        return _in_memory(base_of(source), kept, tokenizer, training or {})
    folder = Path(source)
    if not folder.is_dir():
        raise HessoError(f"`source` ({str(folder)!r}) is no folder; give a checkpoint-* folder that training wrote")
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    if checkpoints and not any(folder.glob("*config.json")):
        raise HessoError(
            f"`source` ({str(folder)!r}) is the folder of a run; give one of its checkpoints: {checkpoints}"
        )
    if (folder / STATE_NAME).exists():
        state = read_state(folder)
        if not state["finished"]:
            raise HessoError(
                f"pruning had not finished in {folder}: step {state['step']} of {state['schedule_end']}; "
                "resume training and export a later checkpoint"
            )
        if kept is not None and state["training"].get("compaction"):
            raise HessoError(
                f"`kept_units`: the model in {folder} is the smaller one already, its pruned units were cut during "
                "training; leave `kept_units` out"
            )
        kept = kept or KeptUnits.from_dict(state["kept_units"])
        training = training or state["training"]
    elif kept is None and (folder / REPORT_NAME).exists():
        raise HessoError(
            f"`source` ({str(folder)!r}) is the smaller model already, as its {REPORT_NAME} says: load it with "
            "`from_pretrained`; to export it anew, give the checkpoint-* folder that it came of"
        )
    elif kept is None:
        logger.warning(f"{folder} has no {STATE_NAME}; the units whose weights are exactly zero are cut")
    training = training or {}
    if training.get("own_code"):
        raise _needs_code(folder, "the run's model is of a class that isn't Transformers'")
    if (folder / ADAPTER_CONFIG).exists():
        model, stored = _load_adapted(folder, kept, cut=bool(training.get("compaction"))), None
    else:
        model, stored = _load_full(folder, trust_pickles, vocabulary or bool(training.get("vocabulary")))
    model.config.name_or_path = training.get("base_model") or model.config.name_or_path
    tokenizer = _load_processor(folder) if tokenizer is None else tokenizer
    dtype = stored.dtypes().pop() if stored is not None else model.dtype
    if holds_masters(folder) and isinstance(model.config.dtype, torch.dtype):
        dtype = model.config.dtype
    return ExportSource(model, dtype, kept, tokenizer, training, stored)


def _load_processor(folder: Path) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """Load the processor that lies beside a checkpoint's weights, else its tokenizer, None where there is neither."""
    if any((folder / name).exists() for name in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)):
        try:
            return AutoProcessor.from_pretrained(folder)
        except Exception as error:  # code of its own, or a package that it takes and that isn't here
            logger.warning(
                f"the processor in {folder} can't be loaded ({first_line(error)}), so the smaller model is saved with "
                "no more than the tokenizer; copy processor_config.json and preprocessor_config.json beside it"
            )
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").exists() else None


def _in_memory(
    model: PreTrainedModel,
    kept: KeptUnits | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    training: Mapping[str, Any],
) -> ExportSource:
    """Take a model as it is, with what is known to have been cut out of it."""
    compaction = compaction_of(model) if kept is None else None
    known = {"compaction": compaction.to_dict()} if compaction is not None else {}
    return ExportSource(model, model.dtype, kept, tokenizer, {**known, **training})


def _load_full(folder: Path, trust_pickles: bool, vocabulary: bool) -> tuple[PreTrainedModel, StoredWeights | None]:
    """Open a checkpoint's weights or, where they must be, load them."""
    config = load_config(folder)
    if uneven_sizes(config):
        raise _needs_code(folder, "the layers differed in width before this run")
    models = {name: code for name, code in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in name}
    if any((folder / f"{code.partition('.')[0]}.py").exists() for code in models.values()):
        raise _needs_code(folder, f"it brings the code of its model ({', '.join(models.values())})")
    model_class = _stock_class_of(config, folder)
    if holds_masters(folder):
        return load_masters(model_class, config, folder, trust_pickles), None
    if (folder / SHARDS_NAME).is_dir():
        return load_shards(model_class, config, folder), None
    try:
        if vocabulary:
            raise NotStreamedError("tokens are removed")
        return open_checkpoint(model_class, config, folder)
    except NotStreamedError as reason:
        logger.info(f"the model in {folder} is loaded whole: {reason}")
    try:
        return model_class.from_pretrained(folder), None
    except OSError as error:
        raise HessoError(
            f"`source` ({str(folder)!r}) holds no weights ({first_line(error)}); give a checkpoint-* folder that "
            "training wrote"
        ) from error


def _stock_class_of(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Return the class of a checkpoint's model; another one of Transformers' would compute something else."""
    if name := unknown_class_of(config):
        raise _needs_code(folder, f"its model is a {name}, which Transformers doesn't have")
    return model_class_of(config)


def _needs_code(folder: Path, reason: str) -> HessoError:
    return HessoError(
        f"`source` ({str(folder)!r}): {reason}, and a checkpoint's code isn't run here; go on with the run "
        "(`resume_from_checkpoint`), whose end saves the smaller model, or load the model and pass that: "
        "`export_pruned(model, ...)`"
    )


def _load_adapted(folder: Path, kept: KeptUnits | None, cut: bool) -> PreTrainedModel:
    """Load a checkpoint's adapter into the base model that this names.

    Args:
        cut: whether the units were cut out of the base before the checkpoint.

    Raises:
        HessoError: where the base model can't be told.
    """
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base or kept is None:
        missing = "no base model" if kept is not None else "an adapter without a pruning state"
        raise HessoError(f"`source` ({str(folder)!r}) names {missing}; pass the PeftModel itself")
    plain = _stock_class_of(load_config(base), folder).from_pretrained(base)
    turn_base_(plain, read_turn(folder))
    if cut:
        structures = groups_for(plain, kept)
        zero_units_(parameters_of(plain), structures, kept)
        plain = cut_model(plain, structures, kept, plain.dtype)
    heal_base_(dict(plain.named_parameters()), folder)
    model: PreTrainedModel = base_of(PeftModel.from_pretrained(plain, folder))
    if not cut:
        structures = groups_for(model, kept)
        zero_units_(parameters_of(model), Adapters.of(model).extend(structures), kept)
    return model


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
