"""When what happens: warm-up, P pruning periods, and the rest of the run (section 3.2 of arXiv 2409.09085)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .config import HessoConfig
from .errors import HessoError

Phase = Literal["warmup", "pruning", "recovery"]


@dataclass(frozen=True)
class PeriodStep:
    """One step of a pruning period: step `t` of `length` in period `index`, all counted from 0."""

    index: int
    t: int
    length: int

    @property
    def factor(self) -> float:
        """What redundant groups are multiplied by after this step: (T_p - t - 1) / (T_p - t)."""
        return (self.length - self.t - 1) / (self.length - self.t)


@dataclass(frozen=True)
class Schedule:
    """Resolved counts of optimizer steps."""

    warmup_steps: int
    pruning_steps: int
    pruning_periods: int
    total_steps: int

    @property
    def end(self) -> int:
        """Number of steps after which all units to be pruned are at zero."""
        return self.warmup_steps + self.pruning_steps

    def phase(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0."""
        if step < self.warmup_steps:
            return "warmup"
        return "pruning" if step < self.end else "recovery"

    def period_starts(self) -> list[int]:
        """Return the first step of each period: the steps at which units are scored."""
        length = self.pruning_steps // self.pruning_periods
        return [self.warmup_steps + length * index for index in range(self.pruning_periods)]

    def period_step(self, step: int) -> PeriodStep | None:
        """Return where in a period a step lies, or None outside the periods."""
        if self.phase(step) != "pruning":
            return None
        length = self.pruning_steps // self.pruning_periods
        index = min((step - self.warmup_steps) // length, self.pruning_periods - 1)
        start = self.warmup_steps + length * index
        last = index == self.pruning_periods - 1
        return PeriodStep(index, step - start, self.end - start if last else length)

    def scoring_window(self, step: int, batches: int) -> bool:
        """Tell whether the gradient of a step counts in the next scoring: the last `batches` since the one before."""
        previous = -1
        for start in self.period_starts():
            if step <= start:
                return step > max(previous, start - batches)
            previous = start
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Read what `to_dict` wrote."""
        return cls(**values)


def resolve_schedule(config: HessoConfig, total_steps: int) -> Schedule:
    """Turn counts and shares into counts for a run of `total_steps`.

    Raises:
        HessoError: where warm-up and pruning don't fit the run, or there are fewer pruning steps than periods.
    """
    warmup = _count(config.warmup_steps, total_steps, least=0)
    pruning = _count(config.pruning_steps, total_steps, least=1)
    if config.warmup_steps < 1 and config.pruning_steps < 1 and config.warmup_steps + config.pruning_steps <= 1:
        pruning = max(1, min(pruning, total_steps - warmup))  # both rounded up can be a step too many
    periods = config.pruning_periods or min(3, pruning)
    if warmup + pruning > total_steps:
        raise HessoError(
            f"`warmup_steps` ({warmup}) + `pruning_steps` ({pruning}) = {warmup + pruning} exceed the run's "
            f"{total_steps} steps; lower them or train longer"
        )
    if pruning < periods:
        raise HessoError(
            f"`pruning_steps` ({pruning}) must be at least `pruning_periods` ({periods}); "
            "raise pruning_steps or lower pruning_periods"
        )
    return Schedule(warmup, pruning, periods, total_steps)


def _count(value: float, total_steps: int, least: int) -> int:
    return int(value) if value >= 1 else max(least, round(value * total_steps))
