"""What a trainer's folders hold: the checkpoint to go on from, a dense model in a smaller one's place, and where else a
model goes that can't be written where it should."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import HessoConfig
from ..config.files import CARD_NAME, REPORT_NAME, STATE_NAME
from ..distributed.collectives import from_all, from_main, on_all
from ..engines.checkpoint import begin_checkpoint
from ..engines.engine import Engine
from ..errors import HessoError, StorageError, VerificationError, first_line
from ..export.checkpoint_state import last_checkpoint, last_common_checkpoint, read_state, write_state
from ..export.export import cut_pruned
from ..export.parameters import fp32_place
from ..export.report import SHOWING, PruningReport
from ..export.storage import check_writable, room, writing
from ..hf_models.loading import without_bars
from ..pruning.process import PruningProcess
from ..structures.lora import dense_model, lora_layers
from ..structures.turned_base import write_healed, write_turn
from ..structures.uneven_layers import MODULE_NAME
from .dense import marked_dense
from .run import PruningRun

logger = logging.get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # Linux's file system in main memory: the last place for a model
HELD = "the trained model is still in memory: make room, then `save_model` again"
HELD_ON_THE_WAY = "the trained model is still in memory, and `save_model` saves the smaller one as it is now"


def resolve_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """Return the folder to resume from; for True the last whole one, as a killed run may leave half a one.

    Raises:
        HessoError: where True was asked for and there is none.
    """
    if resume is not True:
        return str(resume) if resume else None
    last = last_common_checkpoint(Path(output_dir))
    if last is None:
        raise HessoError(  # the first words are the ones of `Trainer`
            f"No valid checkpoint found in output directory ({output_dir}): `resume_from_checkpoint` (True) finds no "
            "whole one; leave it out to start anew"
        )
    return str(last)


def how_far(process: PruningProcess | None) -> str:
    """Say how far pruning is."""
    return "has not begun" if process is None else f"is at step {process.step} of {process.schedule.end}"


def checkpoint_bytes(model: PreTrainedModel) -> int:
    """Estimate a checkpoint: the weights, with adapters those that are trained, and two moments of what is trained."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    written = trained if lora_layers(model) else parameters
    return sum(p.numel() * p.element_size() for p in [*written, *trained, *trained])


@contextlib.contextmanager
def writing_checkpoint(folder: Path, run: PruningRun, together: AbstractContextManager[None]) -> Iterator[None]:
    """Have a checkpoint say that it is dense; say where it can't be written, and what there is to go on from.

    Args:
        together: what tells the other processes of a failure.

    Raises:
        StorageError: naming the folder, the need, the room and the last whole checkpoint; after pruning also that the
            smaller model can be saved.
    """
    model, process = run.model, run.process
    try:
        with (
            without_bars(),  # Transformers', which would break the line of progress
            together, writing("the checkpoint", folder, checkpoint_bytes(model)), marked_dense(model, process),
        ):  # fmt: skip
            yield
    except StorageError as error:
        last = last_checkpoint(folder.parent)
        going_on = f"`resume_from_checkpoint={str(last)!r}`" if last else "there is no earlier checkpoint to go on from"
        raised = StorageError(f"{error}. Make room, then: {going_on}")
        if process.finished:
            raised = StorageError(f"{raised}. Pruning is over; {HELD_ON_THE_WAY}{_exportable(last)}")
            raised.in_memory = HELD_ON_THE_WAY
        raise raised from error


def write_beside(folder: Path, run: PruningRun, config: HessoConfig) -> None:
    """Begin a checkpoint with what pruning has decided, and what its weights don't say of the base."""
    decision, record = run.process.decision(), run.record()  # without an optimizer there is none
    begin_checkpoint(folder)
    write_state(folder, decision, config, record, adapter=bool(lora_layers(run.model)))
    if run.basis is not None and run.basis.tensors:
        write_turn(folder, run.basis.tensors)
    if healed := run.process.healed_base():
        write_healed(folder, healed)


def save_dense(engine: Engine, run: PruningRun, target: Path, plain: Callable[[], None]) -> None:
    """Save the model as it is, with a warning, in place of a smaller one that may lie there.

    Args:
        plain: the trainer's own `save_model`.
    """
    process = engine.steps.process if engine.steps else None
    logger.warning(f"pruning {how_far(process)}: the dense model is saved in {target}, not a smaller one")
    if engine.args.should_save:
        _remove_export(target)
    with _before_trial(process), marked_dense(run.model, process):
        engine.save_dense(run, target, plain)


def save_smaller(engine: Engine, run: PruningRun, target: Path, plain: Callable[[str], None]) -> PruningReport | None:
    """Save the smaller model; where there is none that is what was trained, save that beside it: no run is lost.

    Args:
        plain: the trainer's own `save_model`.

    Raises:
        StorageError: on all processes, naming the folder that holds the smaller model instead.
        VerificationError: on all processes, naming the folder with what was trained.
        HessoError: the same, where memory ran out or anything else failed.
    """
    run.quality.end()
    try:
        report = engine.export(run, target)
    except Exception as error:  # all processes have one, of whatever type
        if isinstance(error, torch.OutOfMemoryError):
            error.__traceback__ = None  # whose frames hold copies of the model,
            gc.collect()  # and circles of references those
        if any(from_all(isinstance(error, StorageError))):
            raise _unsaved(StorageError, error, _save_elsewhere(engine, run, target)) from error
        differs = any(from_all(isinstance(error, VerificationError)))
        out_of_memory = any(from_all(isinstance(error, torch.OutOfMemoryError)))
        unforeseen = any(from_all(not isinstance(error, HessoError)))
        if not differs and not unforeseen:
            raise
        failed = f"the smaller model can't be made ({type(error).__name__}: {first_line(error)})"
        if out_of_memory:
            failed = f"memory ran out while the smaller model was made ({first_line(error)})"
        why, found = (str(error), VerificationError) if differs else (failed, HessoError)
        raise _unsaved(found, why, _save_beside(engine, run, target, plain)) from error
    run.ladder.compare(target)
    return report


def pruned_model(engine: Engine, run: PruningRun) -> PreTrainedModel:
    """Return the smaller model in memory; every process that asks has one of its own.

    Raises:
        HessoError: while pruning isn't over, and where no process has the model whole.
    """
    process = engine.steps.process if engine.steps else None
    if process is None or not process.finished:
        raise HessoError(
            f"`pruned_model`: pruning {how_far(process)}, so the model is dense: train until it has finished"
        )
    if not engine.keeps_whole:
        raise HessoError(
            "`pruned_model`: under FSDP and DeepSpeed no process has the model whole; `save_model(folder)` on all of "
            "them, and load the folder"
        )
    return cut_pruned(
        run.whole, kept_units=process.kept_units(), groups=run.plan.groups, dtype=engine.config.export_dtype,
        training=run.record(),
    )  # fmt: skip


def _unsaved(found: type[HessoError], why: object, where: str) -> HessoError:
    """Return an error that says why a model isn't in the folder asked for, and where it is."""
    error = found(f"{why}. {where}")
    error.in_memory = HELD if HELD in where else ""
    return error


def _save_elsewhere(engine: Engine, run: PruningRun, target: Path) -> str:
    """Save the smaller model in the first other place that takes it; return what to say of that."""
    output_dir, size = Path(engine.args.output_dir or ""), 4 * run.plan.target.parameters_after
    for place in from_main(_other_places(target, output_dir, size)):
        try:
            engine.export(run, place)
        except Exception as error:
            if not any(from_all(isinstance(error, StorageError))):
                raise
        else:
            passing = ", which is in main memory: move it to a disk before the machine or the container stops"
            return (
                f"Nothing is lost: the smaller model is saved in {str(place)!r} instead"
                f"{passing * (place.parent == SHARED_MEMORY)}"
            )
    return f"No other place takes it; {_in_memory(engine)}"


def _in_memory(engine: Engine) -> str:
    """Say what there is of a model that no folder takes."""
    return f"{HELD}{_exportable(last_checkpoint(Path(engine.args.output_dir or '')))}"


def _exportable(checkpoint: Path | None) -> str:
    """Say that a checkpoint's smaller model can be had, "" where there is none."""
    if checkpoint is None or not (checkpoint / STATE_NAME).exists() or not read_state(checkpoint)["finished"]:
        return ""
    return f". `hesso-hf export {checkpoint} FOLDER` writes the smaller model of that checkpoint"


def _other_places(target: Path, output_dir: Path, size: int) -> list[Path]:
    """List where a model that can't be written to `target` may go: where there is room, and nothing of that name."""
    name, places = f"{target.name}-rescued-{os.getpid()}", []
    folders = [target.absolute().parent, output_dir.absolute(), Path.cwd(), Path(tempfile.gettempdir())]
    if SHARED_MEMORY.is_dir() and psutil.virtual_memory().available > 2 * size:  # where the process has its own too
        folders.append(SHARED_MEMORY)
    for folder in folders:
        with contextlib.suppress(StorageError):
            check_writable("output_dir", folder)
            if room(folder) > size and folder / name not in places:
                places.append(folder / name)
    return places


def _save_beside(engine: Engine, run: PruningRun, target: Path, plain: Callable[[str], None]) -> str:
    """Save the trained model with the decision beside it; return what to say of that."""
    beside = target.absolute().with_name(f"{target.absolute().name}-dense")
    try:
        on_all(lambda: _save_trained(engine, run, beside, plain), "save what was trained")
    except Exception as error:
        return f"What was trained can't be saved in {beside} either ({first_line(error)}): {_in_memory(engine)}"
    return (
        f"What was trained, its pruned units at zero, is saved in {beside}: `from_pretrained` loads it, and "
        f"`export_pruned({str(beside)!r}, {str(target)!r})` tries again without the trainer"
    )


def _save_trained(engine: Engine, run: PruningRun, folder: Path, plain: Callable[[str], None]) -> None:
    """Save it, adapters merged: the base on disk isn't what they fit."""
    writes = engine.args.should_save
    with marked_dense(run.model, run.process):
        if not lora_layers(run.model):
            engine.save_dense(run, folder, lambda: plain(str(folder)))
        elif writes:
            dense_model(run.model, device=fp32_place(run.model)).save_pretrained(folder)
    if writes:
        write_state(folder, run.process.decision(), engine.config, run.record())


def _remove_export(folder: Path) -> None:
    """Remove the modelling file, the report and what shows it of a smaller model that a dense one replaces."""
    if (folder / REPORT_NAME).exists():
        for name in (REPORT_NAME, CARD_NAME, *SHOWING, f"{MODULE_NAME}.py"):
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _before_trial(process: PruningProcess | None) -> Iterator[None]:
    """Where CRIC has the weights on their way to zero, put those that they will return to in their place."""
    snapshot = process.on_trial if process else None
    if snapshot is None:
        yield
        return
    logger.warning("CRIC has the weights on trial: those from before it are saved")
    snapshot.swap_weights()
    try:
        yield
    finally:
        snapshot.swap_weights()


def end_training(process: PruningProcess) -> None:
    """Leave a trial that training ended in, and say where pruning hasn't finished."""
    if process.on_trial is not None:
        logger.warning("training ended in the middle of a CRIC cycle: the weights from before it are put back")
        process.leave_trial()
    if not process.finished:
        logger.warning(
            f"training ended at step {process.step} of pruning, which needs {process.schedule.end} (skipped steps "
            "don't count): the model is still dense"
        )
