"""What a run takes: tokens and memory before it, time and memory as its first steps show, and what is left of it."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from ..distributed.collectives import world_size
from ..errors import counted
from ..export.storage import shown
from .measure import makes_its_loader

STEPS = 3  # that tell what the run takes; the first isn't timed: memory is asked for and kernels are chosen in it


class Pace:
    """The clock of a run's optimizer steps, with data, evaluations and saving in them, without pruning's own work.

    That is done in few steps, often the first ones, and would make all of them look slow.
    """

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self.steps = 0

    def step_ended(self, device: torch.device, pruning: float) -> None:
        """Look at the clock; while few steps are timed, when the device has done its work.

        Args:
            pruning: seconds that pruning has taken, all steps together.
        """
        if self.steps < STEPS and device.type == "cuda":
            torch.cuda.synchronize(device)
        self._last = time.perf_counter() - pruning
        self._first = self._first if self.steps else self._last
        self.steps += 1

    @property
    def seconds(self) -> float | None:
        """What a step but the first takes, None where none is over."""
        return max(0.0, self._last - self._first) / (self.steps - 1) if self.steps > 1 else None


def before(trainer: Any) -> list[str]:
    """Say what can be told of a run's vocabulary, tokens and memory before its first step, and when its time can be."""
    run, lines = trainer.hesso_run, _tokens(trainer)
    if kept := run.kept_tokens:
        lines.insert(
            0, f"vocabulary: {kept.vocab_size:,} -> {len(kept.kept):,} tokens, removed on top of this when saved"
        )
    if trainer.hesso_engine.keeps_whole:  # else each process has a part
        parameters = list(run.whole.parameters())
        trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in parameters) + 3 * trained
        lines.append(f"memory: about {shown(size)} for weights, gradients and Adam's two moments, plus activations")
    if run.count_steps() - trainer.state.global_step >= STEPS:
        lines.append(f"time: known after {STEPS} steps")
    return lines


def _tokens(trainer: Any) -> list[str]:
    """Say it where that takes a few rows of the data set, and nothing that training reads."""
    run, args = trainer.hesso_run, trainer.args
    if run.measurer.why_none() or makes_its_loader(trainer):
        return []
    try:
        micro_batch = run.measurer.tokens_per_micro_batch()
    except Exception as error:  # a collator may not take single rows, and there is no type for all it may raise
        return [f"tokens: unknown ({type(error).__name__}: {error})"]
    if micro_batch <= args.train_batch_size:  # no text
        return []
    tokens, steps = micro_batch * args.gradient_accumulation_steps * world_size(), run.process.schedule.total_steps
    replayed = ", and replay" if run.teaching.replay is not None else ""
    return [f"tokens: about {tokens:,} a step, {tokens * steps:,} in {counted(steps, 'step')}{replayed}"]


def by_first_steps(trainer: Any, pace: Pace) -> list[str]:
    """Say what the first steps tell of the time and memory of the whole run."""
    device, steps = trainer.args.device, trainer.hesso_run.process.schedule.total_steps
    step = pace.seconds or 0.0
    whole = duration(step * steps)
    told = f"time: {step:.3g} s a step, {whole} in all, and pruning's own work, evaluations and saving on top"
    if device.type == "cuda":
        return [told, f"memory: {shown(torch.cuda.max_memory_allocated(device))} at most on the GPU"]
    return [told, f"memory: {shown(psutil.Process().memory_info().rss)} of main memory"]


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
