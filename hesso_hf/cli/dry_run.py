"""`hesso-hf prune --dry_run`: what a run would do and take, told by its first steps; no model is saved."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..distributed.collectives import world_size
from ..export.storage import shown
from ..trainer.replay import FOLDER
from .recipe import Recipe

STEPS = 3  # that are taken; the first isn't timed: memory is asked for and kernels are chosen in it


class Tried(Exception):
    """The first steps are taken."""


class TrySteps(TrainerCallback):
    """Times the first optimizer steps, data and all, and ends the run."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """What each step but the first took."""
        return [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device and look at the clock."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._ends.append(time.perf_counter())
        if len(self._ends) == STEPS:
            raise Tried


def quiet(recipe: Recipe) -> Recipe:
    """Return the recipe of a run in which nothing is saved, evaluated, logged or published."""
    training = copy.copy(recipe.training)
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.logging_strategy, training.report_to = IntervalStrategy.NO, []
    training.push_to_hub = training.eval_on_start = training.enable_jit_checkpoint = False
    training.disable_tqdm = True
    return replace(recipe, training=training)


def dry_run(trainer: Any, disk: list[tuple[str, Path, int]]) -> None:
    """Take the first steps and print what the whole run would take, on the main process.

    Args:
        disk: what it would write: what, where, bytes.
    """
    tried = TrySteps()
    trainer.add_callback(tried)
    with contextlib.suppress(Tried):
        trainer.train()
    if trainer.is_world_process_zero():
        print("\n".join(_found(trainer, tried.seconds, disk)))


def _found(trainer: Any, seconds: list[float], disk: list[tuple[str, Path, int]]) -> list[str]:
    run, args = trainer.hesso_run, trainer.args
    steps = run.process.schedule.total_steps
    tokens = run.measurer.tokens_per_micro_batch() * args.gradient_accumulation_steps * world_size()
    lines = [f"tokens: {tokens:,} a step, {tokens * steps:,} in {steps:,} steps"]
    if run.teaching.replay is not None:
        lines[0] += f", and replay; that is written, in {Path(args.output_dir) / FOLDER}, and the run takes it"
    if seconds:
        step = statistics.median(seconds)
        lines.append(
            f"time: {step:.3g} s a step, {_duration(step * steps)} in all, without evaluations and checkpoints (steps "
            "in which units are scored take longer, those after the cut less)"
        )
    else:
        lines.append("time: the run is too short to tell")
    where = "at most on the GPU" if args.device.type == "cuda" else "of main memory"
    lines.append(f"memory: {shown(_memory(args.device))} {where}")
    lines += [f"disk: about {shown(size)} for {what} in {folder}" for what, folder, size in disk]
    return [*lines, "dry run: no model was saved"]


def _memory(device: torch.device) -> int:
    """Return the most bytes that were in use on a GPU, or those that the process has in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
