"""When what happens: warm-up, sampling (CRIC), P pruning periods, and the rest of the run (section 3.2 of
arXiv 2409.09085)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

from transformers.utils import logging

from ..config import HessoConfig
from ..errors import HessoError, counted

logger = logging.get_logger(__name__)

Phase = Literal["warmup", "sampling", "pruning", "recovery"]
PHASES: tuple[str, ...] = get_args(Phase)
PERIODS = 3  # where nothing is said, and the run has the steps for them
# What CRIC takes where nothing is said. Samples cost steps of the run; but with few cycles, units that went the way to
# zero can't be compared with those that didn't, and with few samples the comparison is noise.
MOST_SAMPLES, LEAST_SAMPLES, CYCLES, LEAST_CYCLES, SAMPLING_SHARE = 8, 3, 4, 2, 0.05


@dataclass(frozen=True)
class Period:
    """A pruning period: its first step, its length, and the share of all units to be removed marked by its end."""

    start: int
    length: int
    share: Fraction

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.start + self.length


@dataclass(frozen=True)
class PeriodStep:
    """One step of a pruning period or a CRIC cycle: step `t` of `length` in number `index`, all counted from 0."""

    index: int
    t: int
    length: int

    @property
    def factor(self) -> float:
        """What the units on their way to zero are multiplied by after this step: (T - t - 1) / (T - t)."""
        return (self.length - self.t - 1) / (self.length - self.t)

    @property
    def last(self) -> bool:
        """Whether the period or cycle ends with this step."""
        return self.t == self.length - 1


@dataclass(frozen=True)
class Schedule:
    """Resolved counts of optimizer steps.

    Attributes:
        pruning_steps, pruning_periods: as planned, without what pauses add.
        cycle_steps: sampling steps S of one CRIC cycle; 0 without cycles that train.
        cycles: CRIC cycles: the most there may be until CRIC ends, then as many as there were.
        pauses: steps after which a period was given up and started anew as two (`on_collapse="pause"`).
        rungs: how many models are saved on the way (`export_at`), each when an equal part of the periods is over.
        rung_steps: ordinary steps before each of these saves.
    """

    warmup_steps: int
    pruning_steps: int
    pruning_periods: int
    total_steps: int
    cycle_steps: int = 0
    cycles: int = 0
    pauses: tuple[int, ...] = ()
    rungs: int = 0
    rung_steps: int = 0

    @property
    def sampling_end(self) -> int:
        """First step after warm-up and sampling: where the periods begin."""
        return self.warmup_steps + self.cycle_steps * self.cycles

    @property
    def end(self) -> int:
        """Number of steps after which all units to be pruned are at zero."""
        return self.periods[-1].end

    @cached_property
    def periods(self) -> tuple[Period, ...]:
        """All periods, those that were given up included."""
        length, count = self.pruning_steps // self.pruning_periods, self.pruning_periods
        periods = [
            Period(self.sampling_end + length * index, length, Fraction(index + 1, count)) for index in range(count - 1)
        ]
        begun = length * (count - 1)
        periods.append(Period(self.sampling_end + begun, self.pruning_steps - begun, Fraction(1)))
        parts = self.rungs + 1  # of which a period's share has as many behind it when it begins:
        behind = [math.ceil(period.share * parts) - 1 for period in periods]
        periods = [
            replace(period, start=period.start + self.rung_steps * rungs)
            for period, rungs in zip(periods, behind, strict=True)
        ]
        for step in self.pauses:
            periods = _split(periods, step)
        return tuple(periods)

    def phase(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        if step < self.sampling_end:
            return "sampling"
        return "pruning" if self.period_step(step) is not None else "recovery"

    @cached_property
    def rung_saves(self) -> tuple[int, ...]:
        """Steps done when each model on the way is saved."""
        ends: dict[Fraction, int] = {}
        for period in self.periods:
            ends.setdefault(period.share, period.end)  # a period that is given up has the share of what is behind it
        return tuple(ends[Fraction(index + 1, self.rungs + 1)] + self.rung_steps for index in range(self.rungs))

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """The phases that the run has, by name: the steps done before each, and those done at its end."""
        return self.phases_to(None)

    def phases_to(self, rung: int | None) -> dict[str, tuple[int, int]]:
        """Return the phases of a model that is saved on the way, by its number; None for the last one."""
        ended, saved = self.end, self.total_steps
        if rung is not None:
            saved = self.rung_saves[rung]
            ended = saved - self.rung_steps
        ends = (self.warmup_steps, self.sampling_end, ended, saved)
        spans = zip(PHASES, zip((0, *ends), ends, strict=False), strict=True)
        return {name: (start, end) for name, (start, end) in spans if end > start}

    def sampling_step(self, step: int) -> PeriodStep | None:
        """Return where in CRIC's cycles a step lies, or None outside them."""
        if self.phase(step) != "sampling":
            return None
        cycle, t = divmod(step - self.warmup_steps, self.cycle_steps)
        return PeriodStep(cycle, t, self.cycle_steps)

    def period_step(self, step: int) -> PeriodStep | None:
        """Return where in a period a step lies, or None outside the periods."""
        for index, period in enumerate(self.periods):
            if period.start <= step < period.end:
                return PeriodStep(index, step - period.start, period.length)
        return None

    def scoring_steps(self) -> list[int]:
        """Return the steps at which units are scored by the gradients of the steps before: each period's first.

        With CRIC it is its first step alone, whose samples decide everything after.
        """
        return [self.warmup_steps] if self.cycles else [period.start for period in self.periods]

    def scoring_window(self, step: int, batches: int) -> bool:
        """Tell whether the gradient of a step counts in the next scoring: the last `batches` since the one before."""
        previous = -1
        for start in self.scoring_steps():
            if step <= start:
                return step > max(previous, start - batches)
            previous = start
        return False

    def after_cycles(self, cycles: int) -> Schedule:
        """Return the schedule where CRIC ended after so many cycles: the periods begin at once."""
        return replace(self, cycles=cycles)

    def after_pause(self, step: int) -> Schedule | None:
        """Return the schedule where a period is given up with `step` and starts anew as two of the same length.

        None where that would take more than half of what remains after the periods as they were planned.
        """
        planned = replace(self, pauses=()).end
        paused = replace(self, pauses=(*self.pauses, step))
        return paused if paused.end <= planned + (self.total_steps - planned) // 2 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, of models on the way only where there are some."""
        values = asdict(self) | {"pauses": list(self.pauses)}
        return {name: value for name, value in values.items() if self.rungs or not name.startswith("rung")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Read what `to_dict` wrote."""
        return cls(**{**values, "pauses": tuple(values.get("pauses", ()))})


def _split(periods: list[Period], step: int) -> list[Period]:
    """Give up the period that `step` lies in: after it come two of its length, and the later ones are put off."""
    index = next(i for i, period in enumerate(periods) if period.start <= step < period.end)
    before, broken = (periods[index - 1].share if index else Fraction(0)), periods[index]
    halves = [
        Period(broken.start, step + 1 - broken.start, before),
        Period(step + 1, broken.length, (before + broken.share) / 2),
        Period(step + 1 + broken.length, broken.length, broken.share),
    ]
    delay = halves[-1].end - broken.end
    return periods[:index] + halves + [replace(later, start=later.start + delay) for later in periods[index + 1 :]]


def resolve_schedule(config: HessoConfig, total_steps: int) -> Schedule:
    """Turn counts and shares into counts for a run of `total_steps`.

    Raises:
        HessoError: where warm-up, sampling and pruning don't fit the run, or there are fewer pruning steps than
            periods.
    """
    warmup = _count(config.warmup_steps, total_steps, least=0)
    rungs, rung_steps = len(config.rungs), _count(config.ladder_recovery, total_steps, least=0)
    pruning = _count(config.pruning_steps, total_steps, least=1)
    if config.warmup_steps < 1 and config.pruning_steps < 1 and config.warmup_steps + config.pruning_steps <= 1:
        pruning = max(1, min(pruning, total_steps - warmup))  # both rounded up can be a step too many
    if warmup + pruning > total_steps:
        raise HessoError(
            f"`warmup_steps` ({warmup}) + `pruning_steps` ({pruning}) = {warmup + pruning} exceed the run's "
            f"{counted(total_steps, 'step')}; lower them or train longer"
        )
    left = total_steps - warmup - pruning - rungs * rung_steps
    if left < 0:
        raise HessoError(
            f"`ladder_recovery` ({counted(rung_steps, 'step')}) for each of `export_at` ({list(config.rungs)}) takes "
            f"more than the {counted(left + rungs * rung_steps, 'step')} that warm-up and pruning leave of the run's "
            f"{total_steps}; lower it, or train longer"
        )
    if pruning <= rungs:
        raise HessoError(
            f"`pruning_steps` ({pruning} of the run's {total_steps}) must be at least {rungs + 1}: one for each of "
            f"`export_at` ({list(config.rungs)}) and one for the last model; raise it, or train longer"
        )
    most = pruning - pruning % (rungs + 1)  # every model that is saved on the way takes as many periods
    periods = config.pruning_periods or min(PERIODS + -PERIODS % (rungs + 1), most)
    if pruning < periods:
        raise HessoError(
            f"`pruning_steps` ({pruning}) must be at least `pruning_periods` ({periods}); "
            "raise pruning_steps or lower pruning_periods"
        )
    _warn_of_few_steps(config, total_steps, left, pruning, periods)
    steps, cycles = 0, 0
    if config.cric_way == "path":
        steps, cycles = _sampling(config, left // 2, total_steps)
    return Schedule(warmup, pruning, periods, total_steps, steps, cycles, (), rungs, rung_steps)


def _warn_of_few_steps(config: HessoConfig, total_steps: int, recovery: int, pruning: int, periods: int) -> None:
    """Say so where the run has too few steps for the usual periods, or none to recover in."""
    given = config.pruning_steps
    recovering = "1 step recovers" if recovery == 1 else f"{recovery or 'no'} steps recover"
    if config.pruning_periods is None and periods < PERIODS:
        remedy = f"set `pruning_steps` to {PERIODS} or more"
        if given < 1:
            enough = math.ceil((PERIODS - 0.5) / given)
            enough += _count(given, enough, least=1) < PERIODS  # a half is rounded to the even side
            remedy = f"train for {counted(enough, 'step')} or more, or {remedy}"
        logger.warning(
            f"the run is short: `pruning_steps` ({given:g}) is {pruning} of its {counted(total_steps, 'step')}, so "
            f"units go in {counted(periods, 'period')} instead of {PERIODS}, and {recovering}; {remedy}"
        )
    elif not recovery:
        logger.warning(
            f"pruning ends with the run's last step ({total_steps}): nothing is trained without the pruned units; "
            "lower `pruning_steps` or `warmup_steps`, or train longer"
        )


def _sampling(config: HessoConfig, room: int, total_steps: int) -> tuple[int, int]:
    """Return the steps of a cycle and the most cycles: at most half of what warm-up and pruning leave of the run."""
    steps, cycles = config.cric_sampling_steps, config.cric_max_cycles
    if steps is None and cycles is None:
        modest = min(room, max(LEAST_SAMPLES * (CYCLES - 1), int(SAMPLING_SHARE * total_steps)))
        steps = max(2, min(MOST_SAMPLES, modest // (CYCLES - 1)))
        cycles = max(LEAST_CYCLES, min(CYCLES, modest // steps))
    elif steps is None:
        assert cycles is not None
        steps = max(2, min(MOST_SAMPLES, room // cycles))
    elif cycles is None:
        cycles = max(LEAST_CYCLES, min(CYCLES, room // steps))
    assert steps is not None
    assert cycles is not None
    if cycles == 1:
        logger.warning(
            "`cric_max_cycles` (1): after one cycle, units that were on trial can't be compared with the others; "
            f"take {LEAST_CYCLES} at least"
        )
    if steps * cycles > room:
        least = ["" if given else ", the least" for given in (config.cric_sampling_steps, config.cric_max_cycles)]
        raise HessoError(
            f"`cric` (True): `cric_sampling_steps` ({steps}{least[0]}) times `cric_max_cycles` ({cycles}{least[1]}) = "
            f"{steps * cycles} exceed the {counted(room, 'step')} that sampling may take, half of what warm-up and "
            f"pruning leave of the run's {total_steps}; lower them, train longer, or lower warmup_steps or "
            "pruning_steps"
        )
    return steps, cycles


def _count(value: float, total_steps: int, least: int) -> int:
    return int(value) if value >= 1 else max(least, round(value * total_steps))
