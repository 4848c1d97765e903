"""The phases of a run, each with what it does around the base optimizer's step.

    Phase          the model trains (warm-up, or nothing is to be removed); gradients near a scoring are counted
    CricCycle      units go the way to zero on trial, and all are scored on it (`cric_mode="path"`)
    PruningPeriod  its first step marks the lowest units, all its steps shrink them, after the last they are at zero
    GivenUp        a period's step at which the loss has collapsed: back to its start, to mark fewer (`on_collapse`)
    Recovery       after the last period, and before a model on the way is saved: pruned units stay at zero; once they
                   are cut out of the model it is a `Phase` again

Only `cric_mode="path"` takes steps. `probe` looks between warm-up and the first period, `healed` where a period marks.
Legend: L layers, U units per layer.
"""

from __future__ import annotations

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
    """One step of a run: the gradients near a scoring are counted, and weights are left alone."""

    def __init__(self, run: Run) -> None:
        self.run, self.state = run, run.state

    @property
    def is_scored(self) -> bool:
        """Whether the gradient of this step is looked at: here, whether it counts in the next scoring."""
        state, trial = self.state, self.state.trial
        settled = trial is not None and (trial.probes or trial.ended)
        if settled or not self.run.ranking.removes_any:
            return False
        return state.schedule.scoring_window(state.step, self.run.config.saliency_batches)

    def accumulate_(self, pending: UnitSums) -> None:
        """Take the sums of the gradient that stands in `.grad`, if it is scored."""
        if self.is_scored:
            pending.batches = 1
            self.run.bound.accumulate_(pending)

    def before(self, pending: UnitSums, base: Optimizer) -> None:
        """Count the gradient's sums, before the base optimizer's step."""
        self.state.sums.add_(pending)

    def after(self) -> None:
        """Change weights after the base optimizer's step."""


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
            self.trial.begin(self.run.judging.scores(), base)
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
        share, pruned = state.schedule.periods[index].share, state.pruned()
        if state.order is None:
            order, fisher = run.judging.judge(share)
        else:
            order, fisher = state.order, run.judging.fisher(judges=False)
        marked = agreed(run.ranking.lowest(order, share, pruned))
        for name, units in marked.items():
            state.redundant[name].copy_(units > pruned[name])  # and not pruned, in one kernel
        judged = state.judged or order
        state.judged = {name: torch.where(pruned[name], judged[name], score) for name, score in order.items()}
        if run.pausing:
            state.order = order
            state.period_start = run.bound.snapshot(base, run.snapshots_on_cpu)
        state.sums.zero_()
        run.judging.heal(fisher)

    def after(self) -> None:
        """Shrink the redundant units; after the period's last step they are pruned."""
        position, left = self.position, self.position.length - self.position.t  # steps, this one included
        scale = (left - 1) / position.length
        factors = {}
        for name, redundant in self.state.redundant.items():
            # pruned units are kept at zero by the same multiply
            factors[name] = (self.state.scales[name] > 0).float().masked_fill_(redundant, position.factor)
            self.state.scales[name].masked_fill_(redundant, scale)
        self.run.bound.route(self.state.scales, ask=position.t == 0)
        self.run.bound.add_(self.state.healing, left, position.length)
        if position.last:
            self.run.end_period()
            self.run.mask()
        else:
            self.run.bound.multiply_(factors)
        # a tied output matrix feels the centring: it comes in steps, over the first period
        self.run.centre(1.0 if position.index else 1.0 / left)


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
        """Keep the pruned units at zero, as far as the base optimizer doesn't: their gradients were masked."""
        self.run.mask(shifted_only=self.run.keeps_zeros)
        self.run.centre()


def phase_of(run: Run) -> Phase:
    """Return the phase of the coming step."""
    schedule, step = run.state.schedule, run.state.step
    if not run.ranking.removes_any or run.state.compaction is not None:
        return Phase(run)
    sampling = schedule.sampling_step(step) if run.state.trial is not None else None
    if sampling is not None:
        return CricCycle(run, sampling)
    position = schedule.period_step(step)
    if position is not None:
        return PruningPeriod(run, position)
    return Recovery(run) if step >= schedule.sampling_end else Phase(run)


def phase_by_loss(run: Run, loss: float | torch.Tensor | None) -> Phase:
    """Return the phase of the coming step by its loss, compared with its level before pruning.

    A collapse is warned of, and the period given up if that is wanted and fewer units can be marked.
    """
    phase, schedule, step = phase_of(run), run.state.schedule, run.state.step
    if loss is None:
        return phase
    position, watch = schedule.period_step(step), run.state.watch
    if _is_before_pruning(schedule, step, position):
        watch.note_level(_seen(run, loss))
    just_ended = any(p.share and p.end <= step < p.end + RECENT_STEPS for p in schedule.periods)
    if just_ended if position is None else position.index or position.t:  # something has shrunk
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
    """Return the loss that counts: where a collapse gives up, all processes must see the same."""
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
