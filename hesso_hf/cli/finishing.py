"""How `hesso-hf prune` ends where a disk is full: the smaller model is saved, or what is lost is said."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import HessoError, StorageError

ASKED = "the trained model is still in memory: make room, then press Enter to try again (Ctrl-C to give up)"
LOST = "the trained model is lost with this process"


def told(error: Exception, instead: str = LOST) -> str:
    """Return an error's message, and in place of what is in memory what is so at the command line."""
    held = error.in_memory if isinstance(error, HessoError) else ""
    return str(error).replace(held, instead) if held else str(error)


def train(trainer: Any, resume: str | bool | None) -> StorageError | None:
    """Train; return why a checkpoint couldn't be written, where there is a smaller model to save all the same.

    Raises:
        StorageError: before pruning is over, and under FSDP and DeepSpeed, where the other processes wait elsewhere.
    """
    from transformers import ProgressCallback

    from ..distributed.collectives import world_size

    try:
        trainer.train(resume_from_checkpoint=resume)
    except StorageError as error:
        steps = trainer.hesso_optimizer
        alone = world_size() > 1 and not (trainer.hesso_engine.keeps_whole and error.in_memory)
        if alone or steps is None or not steps.process.finished:
            raise
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):  # whose bar would stay, and stand before what is printed
                callback.on_train_end(trainer.args, trainer.state, trainer.control)
        return error
    return None


def save(trainer: Any, output: Path, unwritten: StorageError | None) -> None:
    """Save the smaller model, also where training ended with a checkpoint that couldn't be written.

    Raises:
        StorageError: where steps are missing; the model of the last one is saved beside `output` then.
    """
    if unwritten is None:
        _save_until_there_is_room(trainer, output)
        return
    made, steps = trainer.state.global_step, trainer.state.max_steps
    done = made >= steps
    _say(trainer, str(unwritten.__cause__) if done else told(unwritten, "the smaller model is saved as it is now"))
    target = output if done else output.with_name(f"{output.name}-of-step-{made}")
    if trainer.is_world_process_zero():
        _remove_half_written(trainer, target)
    if done:
        _take_best(trainer)
    _save_until_there_is_room(trainer, target)
    if not done:
        raise StorageError(f"training ended after step {made} of {steps}; the smaller model of it is saved in {target}")
    _say(trainer, f"training was over: the smaller model is saved in {target}")


def _say(trainer: Any, message: str) -> None:
    """Print a message beside what the run prints, once."""
    if trainer.is_world_process_zero():
        print(f"hesso-hf: {message}", file=sys.stderr)


def _save_until_there_is_room(trainer: Any, output: Path) -> None:
    """Save the smaller model; where no place takes it, ask at a terminal for room, and try again."""
    from ..distributed.collectives import world_size

    while True:
        try:
            trainer.save_model(str(output), _internal_call=True)
            return
        except HessoError as error:
            if not error.in_memory or world_size() > 1 or not sys.stdin.isatty():
                raise
            print(f"hesso-hf: {told(error, ASKED)}", file=sys.stderr, flush=True)
            if not sys.stdin.readline():  # the terminal went away
                raise


def _remove_half_written(trainer: Any, target: Path) -> None:
    """Remove the checkpoint that couldn't be written, where the smaller model needs its room."""
    from ..export.checkpoint_state import last_checkpoint
    from ..export.storage import room

    output_dir = Path(str(trainer.args.output_dir))
    folder = output_dir / f"checkpoint-{trainer.state.global_step}"
    if room(target) <= 4 * trainer.hesso_plan.target.parameters_after and last_checkpoint(output_dir) != folder:
        shutil.rmtree(folder, ignore_errors=True)


def _take_best(trainer: Any) -> None:
    """Load the best checkpoint where that is asked for, as training does at its end."""
    state = trainer.state
    if (
        trainer.args.load_best_model_at_end
        and state.best_model_checkpoint
        and state.best_global_step != state.global_step
    ):
        trainer._load_best_model()
