"""The phases of a run, each with what it does around the base optimizer's step.

    WarmUp         the model trains; before the first scoring, gradients are counted
    CricCycle      units go the way to zero on trial, and all are scored on it (`cric_mode="path"`)
    PruningPeriod  its first step marks the lowest units, all its steps shrink them, after the last they are at zero
    GivenUp        a period's step at which the loss has collapsed: back to its start, to mark fewer (`on_collapse`)
    Recovery       pruned units stay at zero
    Idle           nothing is to be removed

`cric_mode="probe"` takes no step, so it is no phase: `probe` looks between warm-up and the first period.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer

from ..distributed.collectives import mean_over_ranks
from ..errors import HessoError
from .collapse import LEVEL_STEPS, RECENT_STEPS
from .ranking import agreed
from .run import Run
from .saliency import UnitSums
from .schedule import PeriodStep, Schedule


class Phase:
    """One step of a run. By default the gradients near a scoring are counted, and weights are left alone."""

    def __init__(self, run: Run) -> None:
        self.run, self.state = run, run.state

    @property
    def is_scored(self) -> bool:
        """Whether the gradient of this step is looked at."""
        return self.run.scores_soon()

    def accumulate_(self, pending: UnitSums) -> None:
        """Take the sums of the gradient that stands in `.grad`, if it is scored."""
        if self.is_scored:
            self.run.bound.accumulate_(pending)
            pending.batches = 1

    def before(self, pending: UnitSums, base: Optimizer) -> None:
        """Count the gradient's sums, before the base optimizer's step."""
        self.state.sums.add_(pending)

    def after(self) -> None:
        """Change weights after the base optimizer's step."""


class Idle(Phase):
    """Nothing is to be removed."""


class WarmUp(Phase):
    """The model trains as ever."""


class CricCycle(Phase):
    """A step of CRIC's cycles."""

    def __init__(self, run: Run, position: PeriodStep) -> None:
        super().__init__(run)
        assert self.state.trial is not None
        self.position, self.trial = position, self.state.trial

    @property
    def is_scored(self) -> bool:
        """Every sample is."""
        return True

    def accumulate_(self, pending: UnitSums) -> None:
        """Take the sums for displacements by the whole way to zero."""
        self.trial.accumulate_(pending, self.position.t)

    def before(self, pending: UnitSums, base: Optimizer) -> None:
        """Score all units at this point of the way; at the very first, choose what goes that way."""
        if self.position.index == self.position.t == 0:
            self.run.check_agreement()
            self.state.sums.add_(pending)
            self.trial.begin(self.run.scores(), base)
            self.state.sums.zero_()
        self.trial.record(self.position.t, self.run.bound.over_ranks(pending))

    def after(self) -> None:
        """Go a step further, or return; the periods begin as soon as CRIC has decided."""
        self.trial.go_along(self.position)
        if self.trial.ended:
            self.state.schedule = self.state.schedule.after_cycles(self.trial.cric.cycles)
            self.state.order = self.trial.scores()


class PruningPeriod(Phase):
    """A step of a pruning period."""

    def __init__(self, run: Run, position: PeriodStep) -> None:
        super().__init__(run)
        self.position = position

    def before(self, pending: UnitSums, base: Optimizer) -> None:
        """Count the gradient; at the period's first step mark the lowest units."""
        super().before(pending, base)
        if self.position.t == 0:
            self.mark(base)

    def mark(self, base: Optimizer) -> None:
        """Mark the units that go in this period.

        Raises:
            HessoError: where CRIC should have decided and hasn't.
        """
        state, run, index = self.state, self.run, self.position.index
        if state.trial is not None and not state.trial.ended:
            remedy = "call `optimizer.probe(losses)` before it" if state.trial.probes else "give the schedule `cycles`"
            raise HessoError(
                f"`cric_mode` ({run.config.cric_mode!r}): pruning begins with step {state.step}, and CRIC hasn't "
                f"looked yet; {remedy}"
            )
        run.check_agreement(index)
        order = run.scores() if state.order is None else state.order
        pruned = state.pruned()
        marked = agreed(run.ranking.lowest(order, state.schedule.periods[index].share, pruned))
        for name, units in marked.items():
            state.redundant[name].copy_(units & ~pruned[name])
        if run.pausing:
            state.order = order
            state.period_start = run.bound.snapshot(base, run.snapshots_on_cpu)
        state.sums.zero_()

    def after(self) -> None:
        """Shrink the redundant units; after the period's last step they are pruned."""
        self._shrink()
        # a tied output matrix feels the centring: it comes in steps, over the first period
        self.run.centre(1.0 if self.position.index else 1.0 / (self.position.length - self.position.t))

    def _shrink(self) -> None:
        position, bound = self.position, self.run.bound
        scale = (position.length - position.t - 1) / position.length
        factors = {}
        for name, redundant in self.state.redundant.items():
            # pruned units are kept at zero by the same multiply
            factors[name] = torch.where(redundant, position.factor, (self.state.scales[name] > 0).float())
            self.state.scales[name].masked_fill_(redundant, scale)
        bound.route(self.state.scales)
        if not position.last:
            bound.multiply_(factors)
            return
        self.run.end_period()
        self.run.mask()


class GivenUp(PruningPeriod):
    """The step after which a period starts anew as two that mark fewer units each."""

    def after(self) -> None:
        """Return to the start of the period."""
        state, later, order = self.state, self.state.schedule.after_pause(self.state.step), self.state.order
        assert later is not None
        assert state.period_start is not None
        state.period_start.restore()
        for name, redundant in state.redundant.items():
            state.scales[name].masked_fill_(redundant, 1.0)
        self.run.bound.route(state.scales)
        state.schedule = later
        self.run.end_period()
        state.order = order  # the same order, fewer of its units
        state.sums.zero_()


class Recovery(Phase):
    """After the last period."""

    def after(self) -> None:
        """Keep the pruned units at zero."""
        self.run.mask()
        self.run.centre()


def phase_of(run: Run) -> Phase:
    """Return the phase of the coming step."""
    schedule, step = run.state.schedule, run.state.step
    if not run.ranking.removes_any:
        return Idle(run)
    sampling = schedule.sampling_step(step) if run.state.trial is not None else None
    if sampling is not None:
        return CricCycle(run, sampling)
    position = schedule.period_step(step)
    if position is not None:
        return PruningPeriod(run, position)
    return Recovery(run) if step >= schedule.end else WarmUp(run)


def phase_by_loss(run: Run, loss: float | torch.Tensor | None) -> Phase:
    """Return the phase of the coming step by its loss, compared with its level before pruning.

    A collapse is warned of, and the period given up if that is wanted and fewer units can be marked.
    """
    phase, schedule, step = phase_of(run), run.state.schedule, run.state.step
    if loss is None:
        return phase
    position, watch = schedule.period_step(step), run.state.watch
    just_ended = schedule.end <= step < schedule.end + RECENT_STEPS
    notes_level, watches = _is_before_pruning(schedule, step, position), position is not None or just_ended
    if not notes_level and not watches:
        return phase
    # where a collapse gives up, all processes must see the same
    if notes_level:
        watch.note_level(_seen(run, loss))
    if watches and (position is None or position.index or position.t):  # something has shrunk
        watch.note(_seen(run, loss))
        if watch.is_new_collapse():
            gives_up = run.pausing and run.shrinking and _can_mark_fewer(run)
            then = "the period starts anew and marks fewer" if gives_up else "fewer can't be marked any more"
            watch.warn(step, run.bound, run.state.redundant, then if run.pausing else "training goes on")
            if gives_up and position is not None:
                phase = GivenUp(run, position)
    if position is not None and position.t == 0:
        watch.begin_period()
    return phase


def _seen(run: Run, loss: float | torch.Tensor) -> float:
    return mean_over_ranks(loss, run.bound.device) if run.pausing else float(loss)


def _is_before_pruning(schedule: Schedule, step: int, position: PeriodStep | None) -> bool:
    """Whether the loss of a step is one of those whose mean is the level before pruning."""
    if schedule.phase(step) == "warmup":
        return step >= schedule.warmup_steps - LEVEL_STEPS
    return position is not None and position.index == position.t == 0


def _can_mark_fewer(run: Run) -> bool:
    """Tell whether there are steps left to start the period anew, and fewer units that could be marked."""
    state = run.state
    later = state.schedule.after_pause(state.step)
    if later is None:
        return False
    assert state.order is not None
    position = later.period_step(state.step + 1)
    assert position is not None
    pruned = state.pruned()
    marked = run.ranking.lowest(state.order, later.periods[position.index].share, pruned)
    fewer = sum(int((units & ~pruned[name]).sum()) for name, units in marked.items())
    return 0 < fewer < sum(int(units.sum()) for units in state.redundant.values())


def probe(run: Run, losses: Sequence[Callable[[], torch.Tensor]], loss_scale: float) -> None:
    """Let CRIC look along the way to zero by gradients of the given losses, the same batches at every point."""
    trial = run.state.trial
    assert trial is not None
    run.check_agreement()
    with run.bound.frozen.revealed():
        trial.probe(losses, loss_scale)
    run.state.order = trial.scores()
