"""Writing: stage, save, read back, report, publish. Every smaller model comes this way, wherever its parameters lie."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config.files import CONVERSION_NAME
from ..config.names import DTYPE_NAMES
from ..distributed.parts import stock_class
from ..structures.lora import ADAPTER_CONFIG
from ..structures.uneven_layers import uneven_sizes, write_modelling_file
from ..vocabulary.trim_tokenizer import check_saved_tokenizer
from .adapter import ADAPTER_FOLDER
from .parameters import ParameterSource
from .publish import staged_folder
from .report import SHOWING, PruningReport
from .storage import writing
from .verify import Verification, Verifier

logger = logging.get_logger(__name__)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class Output:
    """What is to be written.

    Attributes:
        folder: where it is published; files of other kinds in it are left alone.
        dtype: of the stored weights.
        tokenizer: saved along.
        max_shard_size: of a file of weights ("5GB").
    """

    folder: Path
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None
    max_shard_size: str = "5GB"


def write_pruned(source: ParameterSource, output: Output, training: Mapping[str, Any]) -> PruningReport:
    """Write the smaller model of a trained one with its report and card; all processes of the source call it.

    Args:
        training: what the run says of itself, plain JSON types.

    Raises:
        HessoError: on all processes, where one fails; the folder is untouched then.
        StorageError: on the one that can't write, naming the folder, the need and the room.
        VerificationError: where the smaller model's logits, or what lies on disk, differ, or its dtype overflows.
    """
    report = source.shared(_publish(source, output, training))
    if source.main:
        error = report.verification.fold_error
        logger.info(f"{report.pruning_ratio:.1%} smaller model saved in {output.folder}, relative error {error:.1e}")
    return report


def write_uncut(source: ParameterSource, output: Output) -> None:
    """Write a model of which nothing is cut, as `write_pruned` does, without a report: its tensors are compared."""
    _publish(source, output, None)


def _publish(source: ParameterSource, output: Output, training: Mapping[str, Any] | None) -> PruningReport | None:
    """Do each step of an export; return the report, where one is to be written, on the main process."""
    times = [time.perf_counter()]  # by turns verifying begins, and writing
    verifier = source.together(lambda: Verifier(source)) if training is not None else None
    if verifier is not None:
        small, fold_error = verifier.checked_cut()
    else:  # there may be no room for the logits of an uncut model
        small, fold_error = source.together(lambda: source.cut(source.decision.kept)), 0.0
    times.append(time.perf_counter())
    with writing("the smaller model", output.folder, _size(small, output.dtype)), ExitStack() as stack:
        made = source.together(lambda: stack.enter_context(staged_folder(output.folder)) if source.main else None)
        folder = source.together(lambda: source.common_folder(made))
        written = source.together(lambda: source.save(small, folder, output.dtype, output.max_shard_size))
        source.together(lambda: _add_files(source, output, folder, written) if source.main else None)
        times.append(time.perf_counter())
        stored = source.together(lambda: source.read_back(small, written, folder, output.dtype))

        def reported() -> PruningReport | None:
            if training is None or not source.main:
                return None
            report = PruningReport.of(source.model, written, source.decision, verification, training)
            report.write(folder)
            return report

        if verifier is not None:
            dtype, tokens = str(output.dtype).removeprefix("torch."), verifier.input_ids.numel()
            verification = Verification(fold_error, verifier.error_as_stored(stored, dtype), dtype, tokens)
        times.append(time.perf_counter())
        report = source.together(reported)
        new = {name for name in (*SHOWING, ADAPTER_FOLDER) if source.main and (folder / name).exists()}
        source.together(stack.close)  # publishes
    if source.main:
        _remove_leftovers(output.folder, new)
    begun, cut, saved, compared, published = *times, time.perf_counter()
    seconds = {"writing": saved - cut + published - compared, "verification": cut - begun + compared - saved}
    return replace(report, seconds=seconds) if report is not None else None


def _size(small: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the smaller model's weights, 0 on a process that has none of it."""
    return sum(parameter.numel() for parameter in small.parameters()) * dtype.itemsize if small is not None else 0


def _add_files(source: ParameterSource, output: Output, folder: Path, written: Any) -> None:
    """Write what lies beside the weights and is needed to load them."""
    if uneven_sizes(written.config):
        write_modelling_file(folder, stock_class(source.model), source.decision.groups)
    if output.tokenizer is not None:
        output.tokenizer.save_pretrained(folder)
    if source.decision.vocabulary is not None and isinstance(output.tokenizer, PreTrainedTokenizerBase):
        check_saved_tokenizer(folder, output.tokenizer)


def _remove_leftovers(folder: Path, new: set[str]) -> None:
    """Remove what belongs to a model that was here before and would be taken for the new one's."""
    for name in {*SHOWING} - new:
        (folder / name).unlink(missing_ok=True)
    config = folder / ADAPTER_FOLDER / ADAPTER_CONFIG
    if ADAPTER_FOLDER not in new and config.exists():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base == str(folder):
            shutil.rmtree(config.parent)
    for record in sorted(folder.glob(f"*/{CONVERSION_NAME}")):
        for name in (*json.loads(record.read_text(encoding="utf-8"))["files"], CONVERSION_NAME):
            if not Path(name).is_absolute() and ".." not in Path(name).parts:  # whoever wrote the record
                (record.parent / name).unlink(missing_ok=True)
        others = sorted(path.name for path in record.parent.iterdir())
        logger.warning(
            f"{record.parent}: what was converted is removed, since it was made of the model that was here before"
            f"{f'; {others} may be of that one too' if others else ''}; convert the new one with "
            f"`hesso-hf export {folder} --for ...`"
        )
        if not others and not record.parent.is_symlink():
            record.parent.rmdir()
