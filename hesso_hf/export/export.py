"""Export: from a trained model, or a checkpoint of one, to a folder with the smaller stock model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..errors import HessoError
from ..structures.groups import KeptUnits, PruningGroups
from ..vocabulary.tokens import KeptTokens
from ..vocabulary.trim_tokenizer import trim_tokenizer
from .adapter import AdapterSource
from .checkpoint import CheckpointSource
from .decision import Decision, decide
from .in_training import blamed_on, unfinished
from .parameters import ParameterSource, WholeSource
from .report import PruningReport
from .source import ExportSource, read_source
from .storage import check_not_base
from .verify import Verifier
from .write import DTYPES, Output, write_pruned

logger = logging.get_logger(__name__)


def export_pruned(
    source: str | os.PathLike[str] | nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    kept_units: KeptUnits | None = None,
    groups: PruningGroups | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    training: Mapping[str, Any] | None = None,
    vocabulary: KeptTokens | None = None,
    lora_export: str | None = None,
    trust_pickles: bool = False,
    overwrite_base: bool = False,
) -> PruningReport:
    """Cut the pruned units out of a model, verify the result and publish it atomically.

    A checkpoint's safetensors files of a whole model are read, cut and written a stretch at a time. One that holds an
    adapter, DeepSpeed's or FSDP's files, or loses tokens, is loaded whole.

    Args:
        source: a model or PeftModel whose pruned units are at zero or were cut by `compact`, or a checkpoint folder.
        output_dir: files of other kinds in it (`checkpoint-*`, ...) are left alone.
        kept_units: the decision; by default what the checkpoint says, or the units that aren't exactly zero.
        groups: the model's groups, where they are at hand already.
        tokenizer: saved along; a checkpoint's own by default.
        dtype: stored dtype, float32, bfloat16 or float16; that of the weights by default.
        training: what the report says about the run.
        vocabulary: the tokens to keep (`keep_tokens`); by default what the checkpoint says, or all.
        lora_export: of a model with adapters, `merged` or `adapter`, as in `HessoConfig`, which is the default.
        trust_pickles: open a checkpoint's pickles, which can run code; only DeepSpeed's need it.
        overwrite_base: let `output_dir` be the folder that the base model was read from, as in `HessoConfig`.

    Raises:
        HessoError: where `output_dir` has the base model, pruning hasn't finished (in memory a warning, where there is
            a model without the units at zero), a unit to be cut isn't zero, layers differ unasked, or a checkpoint of
            DeepSpeed's can't be read.
        VerificationError: where the smaller model's logits differ, or overflow in `dtype`: `output_dir` is untouched.
    """
    if dtype is not None and dtype not in DTYPES:
        raise HessoError(f"`dtype` ({dtype!r}) must be one of {list(DTYPES)}")
    _check_no_checkpoint(Path(output_dir))
    found = read_source(source, kept_units, tokenizer, training, trust_pickles, vocabulary is not None)
    _check_not_base(Path(output_dir), source, found, overwrite_base)
    adapted = found.lora_export(lora_export)
    vocabulary = vocabulary or found.vocabulary
    early = unfinished(found.model) if found.kept is None else None
    with blamed_on(early):
        decision = decide(found.model, found.kept, groups, vocabulary, found.compaction, found.stored)
    if found.kept is None and decision.prunes_nothing and early is None:
        _nothing_pruned(source)
    wanted = dtype or found.config.get("export_dtype")
    saved = _trimmed(found.tokenizer, vocabulary) if vocabulary else found.tokenizer
    output = Output(Path(output_dir), DTYPES[wanted] if wanted else found.dtype, saved, max_shard_size)
    adapter = output.folder if adapted == "adapter" else None
    with blamed_on(early):
        report = write_pruned(_parameters_of(found, decision, adapter), output, found.training)
    if early is not None:
        logger.warning(early.warning(report.pruning_ratio))
    return report


def _check_no_checkpoint(folder: Path) -> None:
    """Refuse to write into a checkpoint."""
    for name in ("trainer_state.json", "optimizer.pt"):
        if (folder / name).exists() and folder.name.startswith("checkpoint-"):
            raise HessoError(f"`output_dir` ({str(folder)!r}) is a checkpoint of a run; choose another folder")


def _check_not_base(output: Path, source: str | os.PathLike[str] | nn.Module, found: ExportSource, asked: bool) -> None:
    """Refuse to write where the base model lies; a folder that knows of no other base may be cut in place."""
    name = found.model.config.name_or_path or ""
    if getattr(found.model.config, "_commit_hash", None):  # of the Hub, whatever folder there is of the same name
        return
    in_place = not isinstance(source, nn.Module) and Path(source) == Path(name)
    base = None if in_place or not name else Path(name)
    meant = asked or bool(found.config.get("overwrite_base"))
    check_not_base(output, base, meant, "overwrite_base=True` or `--overwrite-base")


def _nothing_pruned(source: str | os.PathLike[str] | nn.Module) -> None:
    """Refuse a checkpoint of which no unit goes, and warn of such a model in memory."""
    if not isinstance(source, nn.Module):
        raise HessoError(
            f"`source` ({str(source)!r}): nothing in it is pruned; give a checkpoint-* folder that training wrote"
        )
    logger.warning("no unit's weights are zero: the model is written as large as it is. Was pruning finished?")


def _parameters_of(found: ExportSource, decision: Decision, adapter: Path | None) -> ParameterSource:
    """Return where the trained parameters come from; with an adapter, the folder that it is written for."""
    if adapter is not None:
        return AdapterSource(found.model, decision, adapter)
    if found.stored is None:
        return WholeSource(found.model, decision)
    return CheckpointSource(found.model, found.stored, decision)


def cut_pruned(
    model: nn.Module,
    *,
    kept_units: KeptUnits,
    groups: PruningGroups,
    dtype: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the smaller model of one in memory, compared with it as an export is; adapters are merged.

    Args:
        kept_units, groups, dtype, training: as for `export_pruned`.

    Raises:
        VerificationError: where the smaller model's logits differ.
    """
    found = read_source(model, kept_units, None, training, trust_pickles=False)
    decision = decide(found.model, kept_units, groups, found.vocabulary, found.compaction)
    small, _ = Verifier(WholeSource(found.model, decision)).checked_cut()
    stored = DTYPES[dtype] if dtype else found.dtype
    for parameter in small.parameters():
        parameter.data = parameter.data.to(stored)
    return small


def _trimmed(tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, vocabulary: KeptTokens) -> Any:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise HessoError(
            f"`tokenizer` ({type(tokenizer).__name__}) must be given with `vocabulary`, and be no processor: the ids "
            "of a smaller vocabulary mean nothing to the full tokenizer"
        )
    return trim_tokenizer(tokenizer, vocabulary)
