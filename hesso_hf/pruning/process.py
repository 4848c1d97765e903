"""The pruning process: which units are kept, redundant or pruned, and when that changes.

One vector of scales per layer (1 kept, between 0 and 1 shrinking, 0 pruned) is the whole state of a structure; what it
does to the weights is `bound`'s.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..budget.solver import TargetSizes
from ..config import HessoConfig
from ..distributed.collectives import check_agreement, is_main_process, mean_over_ranks
from ..errors import CheckpointMismatchError, HessoError, check_same
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.lora import NO_ADAPTERS, Adapters
from ..structures.router_gates import RouterGates
from .collapse import LEVEL_STEPS, RECENT_STEPS, CollapseWatch
from .cric import CricTrial
from .ranking import PerUnit, Ranking, agreed
from .schedule import PeriodStep, Schedule
from .weights.bound_groups import BoundGroups
from .weights.snapshot import Snapshot

FORMAT = 2  # of the saved state


class PruningProcess:
    """HESSO's and CRIC's state and its effect on a model's parameters (algorithms 1 and 2 of arXiv 2409.09085).

    Args:
        parameters: the model's parameters by name; frozen ones included.
        groups: the structures that are pruned.
        target: units to keep a layer.
        schedule: resolved steps.
        config: criteria and ranking.
        gates: on the model's routers, where experts are pruned.
        adapters: of the model, whose other parameters are frozen.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: PruningGroups,
        target: TargetSizes,
        schedule: Schedule,
        config: HessoConfig,
        gates: RouterGates | None = None,
        adapters: Adapters = NO_ADAPTERS,
    ) -> None:
        self.groups, self.target, self.schedule, self.config = groups, target, schedule, config
        self.step = 0
        self.bound = BoundGroups(parameters, groups, gates, adapters)
        self._ranking = Ranking(groups, target, config, self.bound.elements_per_unit())
        shapes, device = self.bound.shapes(), self.bound.device
        self.scales = {name: torch.ones(size, device=device) for name, size in shapes.items()}
        self.redundant = {name: torch.zeros(size, dtype=torch.bool, device=device) for name, size in shapes.items()}
        self._sums = self._ranking.empty_sums(device)
        self._pending = self._ranking.empty_sums(device)
        self._masking = self._shrinking = self._giving_up = False
        self._order: PerUnit | None = None  # scores that marks go by: CRIC's, or those of the period, to pause it
        self._reorder = True  # whether the next mark scores anew
        self._period_start: Snapshot | None = None
        self._loss: float | torch.Tensor | None = None
        self._watch = CollapseWatch(config.collapse_threshold)
        self.trial = self._new_trial()

    def _new_trial(self) -> CricTrial | None:
        wanted = self.config.cric and self._ranking.removes_any
        return CricTrial(self.bound, self._ranking, self.schedule, self.config) if wanted else None

    # -- before and after the base optimizer's step ---------------------------------------------------------------

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell the loss of the step that comes, so that a collapse is noticed."""
        self._loss = loss

    def prepare_gradients(self) -> None:
        """Before a forward pass: let frozen weights have gradients if this step is scored by them, and only then."""
        scored = self._sampling_step is not None or self._scores_soon()
        self.bound.frozen.reveal(scored and self._ranking.needs_gradients)

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Mask the pruned units' gradients and, where a scoring is near, take the step's sums (not yet counted)."""
        self.bound.frozen.average_gradients_()
        if self._masking:
            self.bound.mask_gradients_(self._pruned())
        self._pending.zero_()
        sampling = self._sampling_step
        if sampling is not None and self.trial is not None:
            self.trial.accumulate_(self._pending, sampling.t)
        elif self._scores_soon():
            self.bound.accumulate_(self._pending)
            self._pending.batches = 1
        self.bound.frozen.drop_gradients()

    @torch.no_grad()
    def before_step(self, base: Optimizer) -> None:
        """Count the observed gradient; sample, or at the first step of a period mark the lowest units."""
        sampling, position = self._sampling_step, self.schedule.period_step(self.step)
        self._watch_loss(position)
        if sampling is not None:
            self._sample(sampling, base)
        else:
            self._sums.add_(self._pending)
            if position is not None and position.t == 0 and self._ranking.removes_any:
                self._mark(position, base)
        self._pending.zero_()

    @torch.no_grad()
    def after_step(self, base: Optimizer) -> None:
        """Shrink the units on their way to zero, keep pruned ones there, or return to a snapshot."""
        sampling, position = self._sampling_step, self.schedule.period_step(self.step)
        if sampling is not None:
            self._go_along(sampling)
        elif self._giving_up:
            self._give_up()
        elif position is not None and self._ranking.removes_any:
            self._shrink(position)
            # a tied output matrix feels the centring: it comes in steps, over the first period
            self._centre(1.0 if position.index else 1.0 / (position.length - position.t))
        elif self._masking:
            self.bound.mask_weights_(self._pruned())
            self._centre()
        self.step += 1
        self._mask_state(base)
        self.prepare_gradients()

    # -- CRIC -----------------------------------------------------------------------------------------------------

    @property
    def _sampling_step(self) -> PeriodStep | None:
        return self.schedule.sampling_step(self.step) if self.trial is not None else None

    @property
    def on_trial(self) -> Snapshot | None:
        """While CRIC has the weights on their way to zero, the snapshot that they will return to; else None."""
        return self.trial.snapshot if self.trial is not None else None

    def _sample(self, sampling: PeriodStep, base: Optimizer) -> None:
        """Score all units at this point of the way; at the very first, choose what goes that way."""
        assert self.trial is not None
        if sampling.index == sampling.t == 0:
            check_agreement(self._all_scales())
            self._sums.add_(self._pending)
            self.trial.begin(self.scores(), base)
            self._sums.zero_()
        self.trial.record(sampling.t, self.bound.over_ranks(self._pending))

    def _go_along(self, sampling: PeriodStep) -> None:
        assert self.trial is not None
        self.trial.go_along(sampling)
        if self.trial.ended:
            self.schedule = self.schedule.after_cycles(self.trial.cric.cycles)
            self._order, self._reorder = self.trial.scores(), False

    def leave_trial(self) -> None:
        """Put back the weights from before an unfinished cycle; training can't go on from there."""
        if self.on_trial is not None:
            self.on_trial.restore_weights()
            self.bound.route(self.scales)

    @property
    def wants_probe(self) -> bool:
        """Whether CRIC, in its mode without training steps, is to look before the coming step."""
        waiting = self.trial is not None and self.trial.probes and not self.trial.ended
        return waiting and self.step == self.schedule.warmup_steps

    def probe(self, losses: Sequence[Callable[[], torch.Tensor]], loss_scale: float = 1.0) -> None:
        """Let CRIC look along the way to zero by gradients of the given losses, the same batches at every point."""
        assert self.trial is not None
        check_agreement(self._all_scales())
        with self.bound.frozen.revealed():
            self.trial.probe(losses, loss_scale)
        self._order, self._reorder = self.trial.scores(), False

    # -- HESSO ----------------------------------------------------------------------------------------------------

    def _mark(self, position: PeriodStep, base: Optimizer) -> None:
        if self.trial is not None and not self.trial.ended:
            remedy = "call `optimizer.probe(losses)` before it" if self.trial.probes else "give the schedule `cycles`"
            raise HessoError(
                f"`cric_mode` ({self.config.cric_mode!r}): pruning begins with step {self.step}, and CRIC hasn't "
                f"looked yet; {remedy}"
            )
        check_agreement(self._all_scales(), position.index)
        order = self.scores() if self._order is None or self._reorder else self._order
        pruned = {name: scales == 0 for name, scales in self.scales.items()}
        marked = agreed(self._ranking.lowest(order, self.schedule.periods[position.index].share, pruned))
        for name, units in marked.items():
            self.redundant[name].copy_(units & ~pruned[name])
        if self.config.on_collapse == "pause":
            self._order = order
            self._period_start = self.bound.snapshot(base, self.config.cric_snapshot == "cpu")
        self._shrinking = True
        self._sums.zero_()

    def scores(self) -> PerUnit:
        """Return the saliency of every unit from the gradients counted so far: shape (L, U) per structure."""
        sums = self.bound.over_ranks(self._sums)
        return self._ranking.scores(sums, {name: scales > 0 for name, scales in self.scales.items()})

    def _shrink(self, position: PeriodStep) -> None:
        scale = (position.length - position.t - 1) / position.length
        factors = {}
        for name, redundant in self.redundant.items():
            # pruned units are kept at zero by the same multiply
            factors[name] = torch.where(redundant, position.factor, (self.scales[name] > 0).float())
            self.scales[name].masked_fill_(redundant, scale)
        self.bound.route(self.scales)
        if not position.last:
            self.bound.multiply_(factors)
            return
        self._masking = True
        self._end_period()
        self.bound.mask_weights_(self._pruned())

    def _end_period(self) -> None:
        for redundant in self.redundant.values():
            redundant.zero_()
        self._shrinking, self._period_start = False, None
        if self.trial is None:
            self._order, self._reorder = None, True

    # -- collapse -------------------------------------------------------------------------------------------------

    def _watch_loss(self, position: PeriodStep | None) -> None:
        """Compare the loss with its level before pruning; warn of a collapse, and give the period up if asked to."""
        loss, self._loss = self._loss, None
        if loss is None:
            return
        pausing = self.config.on_collapse == "pause"  # then all processes must see the same
        if self._before_pruning(position):
            self._watch.note_level(mean_over_ranks(loss, self.bound.device) if pausing else float(loss))
        just_ended = self.schedule.end <= self.step < self.schedule.end + RECENT_STEPS
        if position is None and not just_ended:
            return
        if position is None or position.index or position.t:  # something has shrunk
            self._watch.note(mean_over_ranks(loss, self.bound.device) if pausing else float(loss))
            self._warn_of_collapse(pausing)
        if position is not None and position.t == 0:
            self._watch.begin_period()

    def _warn_of_collapse(self, pausing: bool) -> None:
        if not self._watch.is_new_collapse():
            return
        self._giving_up = pausing and self._shrinking and self._can_mark_fewer()
        then = "training goes on"
        if pausing:
            then = "the period starts anew and marks fewer" if self._giving_up else "fewer can't be marked any more"
        self._watch.warn(self.step, self.bound, self.redundant, then)

    def _before_pruning(self, position: PeriodStep | None) -> bool:
        """Whether the coming step is one of those whose losses are the level before pruning."""
        if self.schedule.phase(self.step) == "warmup":
            return self.step >= self.schedule.warmup_steps - LEVEL_STEPS
        return position is not None and position.index == position.t == 0

    def _can_mark_fewer(self) -> bool:
        """Tell whether there are steps left to start the period anew, and fewer units that could be marked."""
        later = self.schedule.after_pause(self.step)
        if later is None:
            return False
        assert self._order is not None
        position = later.period_step(self.step + 1)
        assert position is not None
        pruned = {name: scales == 0 for name, scales in self.scales.items()}
        marked = self._ranking.lowest(self._order, later.periods[position.index].share, pruned)
        fewer = sum(int((units & ~pruned[name]).sum()) for name, units in marked.items())
        return 0 < fewer < sum(int(units.sum()) for units in self.redundant.values())

    def _give_up(self) -> None:
        """Return to the start of the period, which starts anew as two that mark fewer units each."""
        later = self.schedule.after_pause(self.step)
        assert later is not None
        assert self._period_start is not None
        self._period_start.restore()
        for name, redundant in self.redundant.items():
            self.scales[name].masked_fill_(redundant, 1.0)
        self.bound.route(self.scales)
        self.schedule, order = later, self._order
        self._end_period()
        self._order, self._reorder, self._giving_up = order, False, False  # the same order, fewer of its units
        self._sums.zero_()

    # -- weights and optimizer state ------------------------------------------------------------------------------

    def _mask_state(self, base: Optimizer) -> None:
        """Zero the pruned units' optimizer state.

        Matrices only when a period ends: with zero weights and masked gradients their entries stay zero. A norm's
        vector, stored as -1 for zero or kept above zero by the optimizer's epsilon, is masked after every step.
        """
        if self._masking:
            self.bound.mask_state_(base.state, self._pruned(), vectors_only=not self.period_ended)

    @torch.no_grad()
    def reapply(self) -> None:
        """Put weights that were loaded from elsewhere back under the pruned units' zeros."""
        self.bound.mask_weights_(self._pruned())
        self._centre()

    def _centre(self, share: float = 1.0) -> None:
        """Keep the mean of a stream at zero whose norms subtract it, so that they see no difference in the end."""
        self.bound.centre_({n: scales for n, scales in self.scales.items() if self._ranking.removed[n]}, share)

    def _pruned(self) -> PerUnit:
        """Return the pruned units of the structures that lose any, bool (L, U)."""
        return {name: scales == 0 for name, scales in self.scales.items() if self._ranking.removed[name]}

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all units that are to go are at zero."""
        return self.step >= self.schedule.end or not self._ranking.removes_any

    @property
    def period_ended(self) -> bool:
        """Whether the step just counted was the last of a period."""
        position = self.schedule.period_step(self.step - 1) if self.step else None
        return position is not None and position.last

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The snapshots that a run may return to: of CRIC's trial, and of the period's start where it may pause."""
        found = {"trial": self.on_trial, "period_start": self._period_start}
        return {kind: snapshot for kind, snapshot in found.items() if snapshot is not None}

    def kept_units(self) -> KeptUnits:
        """Return the units that aren't at zero."""
        return KeptUnits.of({name: scales > 0 for name, scales in self.scales.items()})

    def decision(self) -> dict[str, Any]:
        """Return how far pruning is and what it decided, as plain JSON types."""
        return {
            "step": self.step,
            "finished": self.finished,
            "schedule": self.schedule.to_dict(),
            "schedule_end": self.schedule.end,
            "target": self.target.to_dict(),
            "kept_units": self.kept_units().to_dict(),
        }

    @torch.no_grad()
    def redundant_norm(self) -> float:
        """Return the L2 norm of all redundant groups' effective weights, 0.0 where there is none."""
        return self.bound.norm_of(self.redundant) if self._shrinking else 0.0

    def cric_report(self) -> dict[str, Any] | None:
        """Return what CRIC did as plain JSON types, None without it."""
        return self.trial.report() if self.trial is not None else None

    def _scores_soon(self) -> bool:
        settled = self.trial is not None and (self.trial.probes or self.trial.ended)
        if settled or not self._ranking.removes_any:
            return False
        return self.schedule.scoring_window(self.step, self.config.saliency_batches)

    def _all_scales(self) -> torch.Tensor:
        return torch.cat([scales.flatten() for scales in self.scales.values()])

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the future: tensors and plain containers only.

        Where parameters are sharded all processes call it, since sums are added up, and a snapshot in it holds this
        process' parts.
        """
        sums = self.bound.over_ranks(self._sums)
        return {
            "format": FORMAT,
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "target": self.target.to_dict(),
            "choices": self.config.choices(),
            "scales": dict(self.scales),
            "redundant": dict(self.redundant),
            "sums": {name: dict(terms) for name, terms in sums.sums.items()},
            "batches": self._sums.batches,
            "order": None if self._order is None else dict(self._order),
            "reorder": self._reorder,
            "watch": self._watch.state_dict(),
            "trial": self.trial.state_dict() if self.trial else None,
            "period_start": self._period_start.state_dict() if self._period_start else None,
            "frozen": self.bound.frozen.state_dict(self.scales, self.trial.on_the_way if self.trial else None),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare a saved state with this run, changing nothing.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or format, with the first difference.
        """
        if state.get("format") != FORMAT:
            found = state.get("format")
            raise CheckpointMismatchError(f"pruning state of format {found!r}; this version reads {FORMAT}")
        check_same("target", state["target"], self.target.to_dict())
        check_same("config", state["choices"], self.config.choices())
        for name, scales in self.scales.items():
            if name not in state["scales"] or state["scales"][name].shape != scales.shape:
                raise CheckpointMismatchError(f"the saved pruning state has no {name} of shape {tuple(scales.shape)}")

    def load_state_dict(self, state: Mapping[str, Any], base: Optimizer) -> None:
        """Continue from a saved state; a snapshot in it belongs to the parameters of `base`.

        Raises:
            CheckpointMismatchError: as `check_state_dict` does; nothing is changed then.
        """
        self.check_state_dict(state)
        for name, scales in self.scales.items():
            scales.copy_(state["scales"][name])
            self.redundant[name].copy_(state["redundant"][name])
            for term, value in self._sums.sums[name].items():
                value.copy_(state["sums"][name][term])
                if self.bound.sharded and not is_main_process():
                    value.zero_()  # the saved sums are those of all processes
        self._sums.batches = int(state["batches"])
        self._pending.zero_()
        self.schedule = Schedule.from_dict(state["schedule"])
        self.step = int(state["step"])
        self._masking = any(bool((scales == 0).any()) for scales in self.scales.values())
        self._shrinking = any(bool(redundant.any()) for redundant in self.redundant.values())
        order, device = state["order"], self.bound.device
        self._order = None if order is None else {name: score.to(device) for name, score in order.items()}
        self._reorder = bool(state["reorder"])
        self._watch.load_state_dict(state["watch"])
        self.trial = self._new_trial()  # the samples of a cycle are the schedule's
        if self.trial is not None:
            self.trial.load_state_dict(state["trial"], base)
        self.bound.route(self.scales)
        sampling = self._sampling_step
        if self.trial is not None and self.trial.snapshot is not None and sampling is not None:
            self.trial.route(sampling.t)
        self._period_start = None
        if state["period_start"] is not None:
            self._period_start = self.bound.snapshot(base, self.config.cric_snapshot == "cpu")
            self._period_start.load_state_dict(state["period_start"])
        on_trial = self.trial.on_the_way if self.trial else None
        self.bound.frozen.load_state_dict(state.get("frozen", {}), self.scales, on_trial)
        self.prepare_gradients()
