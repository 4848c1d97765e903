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
from .teaching import Teaching

STEPS = 3  # that tell what the run takes; the first isn't timed: memory is asked for and kernels are chosen in it
# A period reads its examples forward and back, by which units are judged, and forward once to judge and once to heal;
# with CRIC it looks and judges twice. A step of training reads forward and back, which takes three times as long.
PASSES, CRIC_PASSES = 5 / 3, 3


class Pace:
    """The clock of a run's optimizer steps, with data, evaluations and saving in them, without pruning's own work.

    That is done in few steps, often the first ones, and would make all of them look slow.

    Attributes:
        steps: that were timed.
        pruning: seconds that pruning has taken in them and before.
    """

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self.steps, self.pruning = 0, 0.0

    def step_ended(self, device: torch.device, pruning: float) -> None:
        """Look at the clock; while few steps are timed, when the device has done its work.

        Args:
            pruning: seconds that pruning has taken, all steps together.
        """
        if self.steps < STEPS and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.pruning = pruning
        self._last = time.perf_counter() - pruning
        self._first = self._first if self.steps else self._last
        self.steps += 1

    @property
    def seconds(self) -> float | None:
        """What a step but the first takes, None where none is over."""
        return max(0.0, self._last - self._first) / (self.steps - 1) if self.steps > 1 else None


class Forecast:
    """What a run of a trainer will take, by what is known of it so far."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Know nothing of the run's steps yet."""
        self.pace, self._begun_at, self._tokens_per_step = Pace(), 0, 0.0
        self._before_periods = 0.0  # seconds of pruning's own work

    def before(self) -> list[str]:
        """Say what can be told of the vocabulary, tokens and memory before the first step, and when time can be."""
        run = self._trainer.hesso_run
        self._begun_at, lines = run.process.step, self._tokens()
        self._before_periods = self._trainer.hesso_optimizer.seconds
        if kept := run.kept_tokens:
            lines.insert(
                0, f"vocabulary: {kept.vocab_size:,} -> {len(kept.kept):,} tokens, removed on top of this when saved"
            )
        if self._trainer.hesso_engine.keeps_whole:  # else each process has a part
            lines.append(self._memory(list(run.whole.parameters())))
        if run.count_steps() - self._trainer.state.global_step >= STEPS:
            lines.append(f"time: known after {STEPS} steps")
        return lines

    def step_ended(self) -> None:
        """Look at the clock."""
        seconds = self._trainer.hesso_optimizer.seconds
        self.pace.step_ended(self._trainer.args.device, seconds)
        if not self._begun():
            self._before_periods = seconds

    def _memory(self, parameters: list[torch.nn.Parameter]) -> str:
        """Say what weights, gradients and the optimizer's state take, as far as its class tells."""
        trained = sum(p.nbytes for p in parameters if p.requires_grad)
        optimizer, mine = self._trainer.hesso_optimizer.base, {p.data_ptr() for p in parameters}
        copies, state = _state_of(optimizer)
        what = f"weights, gradients and {state}" if state else "weights and gradients"
        teaching = self._trainer.hesso_run.teaching
        taught_by = [part.teacher.model for part in (teaching.distillation, teaching.replay) if part is not None]
        beside = {p.data_ptr(): p.nbytes for model in taught_by for p in model.parameters()}
        teachers = sum(size for place, size in beside.items() if place not in mine)
        told = [
            f"{shown(sum(p.nbytes for p in parameters) + (1 + copies) * trained)} for {what}",
            *([f"{shown(teachers)} for the model that it is taught by"] if teachers else []),
            *([f"plus {type(optimizer).__name__}'s state and activations"] if state is None else ["plus activations"]),
        ]
        return f"memory: about {', '.join(told)}"

    def _teacher(self) -> list[str]:
        """Say from whom the data are learnt beside their labels, or why not."""
        teaching = self._trainer.hesso_run.teaching
        found = teaching.record()["distillation"]
        if found is None:
            return []
        if not found["alpha"]:
            if found["surprise"] is None:  # a warning said why
                return []
            excess = f"its loss is {found['surprise']:.2f} nats per token above what it expects"
            where = "none" if teaching.replay is None else "on replay alone"
            return [f"teacher: {where}; {found['teacher']} doesn't know the data, {excess}"]
        until = " while the student isn't ahead" if found["auto"] else ""
        return [f"teacher: {found['teacher']}, on the data too{until}"]

    def _tokens(self) -> list[str]:
        """Say how many there are where that takes a few rows of the data set, and nothing that training reads."""
        run, args = self._trainer.hesso_run, self._trainer.args
        if run.measurer.why_none() or makes_its_loader(self._trainer):
            return []
        try:
            micro_batch = run.measurer.tokens_per_micro_batch()
        except Exception as error:  # a collator may not take single rows, and there is no type for all it may raise
            return [f"tokens: unknown ({type(error).__name__}: {error})"]
        if micro_batch <= args.train_batch_size:  # no text
            return []
        read = micro_batch * args.gradient_accumulation_steps
        self._tokens_per_step = read * _as_if_alone(run.teaching)
        tokens, steps = read * world_size(), run.process.schedule.total_steps
        replayed = ", and replay" if run.teaching.replay is not None else ""
        return [f"tokens: about {tokens:,} a step, {tokens * steps:,} in {counted(steps, 'step')}{replayed}"]

    def by_first_steps(self) -> list[str]:
        """Say what the first steps tell of the teacher, and of the time and memory of the whole run."""
        device, process = self._trainer.args.device, self._trainer.hesso_run.process
        step, steps = self.pace.seconds or 0.0, process.schedule.total_steps
        own = self._seconds_of_periods(self._begun_at)
        judging = f", about {duration(own)} more to judge and heal" if own >= 0.5 else ""
        told = f"time: {step:.3g} s a step, {duration(step * steps)} in all{judging}, plus evaluations and saving"
        if device.type == "cuda":
            memory = f"{shown(torch.cuda.max_memory_allocated(device))} at most on the GPU"
        else:
            memory = f"{shown(psutil.Process().memory_info().rss)} of main memory"
        return [*self._teacher(), told, f"memory: {memory}"]

    def left(self, steps: int) -> str:
        """Return the time that the steps to come will take; "" where that can't be told yet."""
        if self.pace.seconds is None or steps <= 0:
            return ""
        own = self._seconds_of_periods(self._trainer.hesso_run.process.step)
        return f", ETA {duration(self.pace.seconds * steps + own)}"

    def _seconds_of_periods(self, first: int) -> float:
        """Return what pruning's own work takes in the periods that begin with a step or later.

        One takes what those of this run took; before any has begun, what its passes would as a part of training.
        """
        begun = self._begun()
        if begun:
            each = (self.pace.pruning - self._before_periods) / begun
        else:
            each = (self.pace.seconds or 0.0) * self._steps_of_a_period()
        return each * sum(start >= first for start in self._starts())

    def _starts(self) -> list[int]:
        return [period.start for period in self._trainer.hesso_run.process.schedule.periods if period.share]

    def _begun(self) -> int:
        """Return how many periods this run has begun so far."""
        return sum(self._begun_at <= start < self._trainer.hesso_run.process.step for start in self._starts())

    def _steps_of_a_period(self) -> float:
        """Return how many steps of training take as long as judging and healing once, by the tokens that are read."""
        run = self._trainer.hesso_run.process.run
        if run.judging.healer is None or not self._tokens_per_step:
            return 0.0
        passes = CRIC_PASSES if run.config.cric_way == "healed" else PASSES
        return passes * run.judging.healer.tokens / self._tokens_per_step


def _as_if_alone(teaching: Teaching) -> float:
    """Return what a step takes over what it takes without teacher and replay, whose tokens are all taught."""
    taught = 4 / 3  # a teacher reads forward alone
    share = teaching.replay.sizes.share if teaching.replay is not None else 0.0
    return (taught if teaching.distillation is not None else 1.0) + taught * share / (1 - share)


def _state_of(optimizer: torch.optim.Optimizer) -> tuple[int, str | None]:
    """Return how many numbers an optimizer keeps for each that is trained, and what they are; None if not known."""
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return 2, "Adam's two moments"
    if type(optimizer) is torch.optim.SGD:
        return (1, "SGD's momentum") if any(group["momentum"] for group in optimizer.param_groups) else (0, "")
    if type(optimizer) in (torch.optim.Adagrad, torch.optim.RMSprop):
        return 1, f"the squares that {type(optimizer).__name__} sums up"
    return 0, None


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
