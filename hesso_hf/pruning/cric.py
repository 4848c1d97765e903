"""CRIC on a model: the violating units go the way to zero on trial, and the run returns to where it was.

Legend: L layers, U units per layer, S samples in a cycle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..config import HessoConfig
from ..distributed.parts import Part
from ..errors import HessoError
from .cric_state import PROBE_CYCLES, PROBE_SAMPLES, Cric
from .ranking import Ranking, agreed
from .saliency import OnTrial, ParameterAxes, PathDisplacements, PerUnit, UnitSums, marked
from .schedule import PeriodStep, Schedule
from .weights.bound_groups import BoundGroups
from .weights.snapshot import Snapshot


class CricTrial:
    """CRIC's cycles around the steps of a base optimizer, or by gradients alone (algorithm 2 of arXiv 2409.09085)."""

    def __init__(self, bound: BoundGroups, ranking: Ranking, schedule: Schedule, config: HessoConfig) -> None:
        self._bound, self._ranking, self._config = bound, ranking, config
        self._on_cpu = config.cric_snapshot == "cpu"
        self.probes = config.cric_mode == "probe"
        samples = (config.cric_sampling_steps or PROBE_SAMPLES) if self.probes else schedule.cycle_steps
        cycles = (config.cric_max_cycles or PROBE_CYCLES) if self.probes else schedule.cycles
        removed, criteria = ranking.removed_in_all, len(ranking.criteria)
        self.cric = Cric(bound.shapes(), removed, criteria, samples, cycles, config.cric_tolerance, bound.device)
        self.snapshot: Snapshot | None = None

    @property
    def ended(self) -> bool:
        """Whether the decision has been taken."""
        return self.cric.ended

    def units_on_trial(self) -> int:
        """Return how many units are on their way to zero, 0 between the trials and after them."""
        if self.snapshot is None:
            return 0
        return int(torch.stack([units.sum() for units in self.cric.shrinking.values()]).sum())

    def begin(self, scores: PerUnit, base: Optimizer) -> None:
        """Take the snapshot, and choose the first violating set: the lowest units by the scores at this point."""
        self.snapshot = self._bound.snapshot(base, self._on_cpu)
        self._choose_first(scores)

    def _choose_first(self, scores: PerUnit) -> None:
        lowest = agreed(self._ranking.lowest(scores))
        self.cric.begin_cycle(lowest, lowest)

    def accumulate_(self, sums: UnitSums, t: int) -> None:
        """Add the gradient at sample t of a cycle to the sums, for displacements by the whole way to zero."""
        snapshot, trial = self.snapshot, OnTrial(self.cric.shrinking, self._scale(t)) if t else None

        def whole_way(name: str, axes: ParameterAxes, part: Part, n: int) -> PathDisplacements:
            assert snapshot is not None
            assert trial is not None
            return PathDisplacements(self._bound.copied(name, snapshot)[n], axes, trial, part)

        sums.batches += 1
        self._bound.accumulate_(sums, whole_way if t else None)

    def record(self, t: int, sums: UnitSums) -> None:
        """Score all units by what all processes accumulated at sample t, and note which look redundant from there."""
        values = self._ranking.signed_values(sums)
        self.cric.record(t, values, self._ranking.lowest(self._ranking.combine(values)))

    def go_along(self, position: PeriodStep) -> None:
        """Take the units on trial a step towards zero; at the end of the cycle return to the snapshot."""
        assert self.snapshot is not None
        if position.last:
            self.snapshot.restore()
            self.route(0)
            self._next_cycle()
        else:
            self._bound.multiply_(self._factors(position.factor))
            self.route(position.t + 1, ask=position.t == 0)

    def scores(self) -> PerUnit:
        """Return the final scores, shape (L, U) per structure."""
        return self._ranking.combine(self.cric.means())

    def probe(self, losses: Sequence[Callable[[], torch.Tensor]], loss_scale: float = 1.0) -> None:
        """Make all cycles at once, by gradients at points on the way to zero instead of training steps.

        Weights are as before afterwards, bit for bit; `.grad` of the groups' parameters is cleared.

        Args:
            losses: each computes the loss of one batch; the same batches serve at every point.
            loss_scale: what the losses were multiplied by.

        Raises:
            HessoError: where a gradient isn't finite.
        """
        sums, before = self._ranking.empty_sums(self._bound.device), copy.deepcopy(self.cric.state_dict())
        self.snapshot = Snapshot(self._bound.parameters.values(), None, self._on_cpu)
        try:
            while not self.ended:
                for t in range(self.cric.samples):
                    self._probe_point(t, losses, sums, loss_scale)
                self.snapshot.restore_weights()
                self.route(0)
                self._next_cycle()
        except BaseException:  # whatever a loss raises, it can be tried again
            self.snapshot.restore_weights()
            self.route(0)
            self.snapshot = None
            self.cric.load_state_dict(before)
            raise

    def _probe_point(
        self, t: int, losses: Sequence[Callable[[], torch.Tensor]], sums: UnitSums, loss_scale: float
    ) -> None:
        assert self.snapshot is not None
        if t:
            self.snapshot.restore_weights()
            self._bound.multiply_(self._factors(self._scale(t)))
            self.route(t)
        sums.zero_()
        for loss in losses:
            with torch.enable_grad():
                loss().backward()
            if loss_scale != 1.0:
                for parameter in self._bound.parameters.values():
                    if parameter.grad is not None:
                        parameter.grad.div_(loss_scale)
            self.accumulate_(sums, t)
            for parameter in self._bound.parameters.values():
                parameter.grad = None
        sums = self._bound.over_ranks(sums)
        if not sums.are_finite():
            raise HessoError(
                f"`losses` of the probe: a gradient isn't finite where {self._scale(t):.0%} of the units on trial are "
                "left; leave out batches without labels, or probe in a wider dtype"
            )
        if not self.cric.cycles:
            self._choose_first(self._ranking.scores(sums))
        self.record(t, sums)

    def _next_cycle(self) -> None:
        """Begin the next cycle with the newcomers, or decide."""
        agreed(self.cric.entering)
        if self.cric.end_cycle():
            self.cric.decide(agreed(self._ranking.lowest(self.scores())))
            self.snapshot = None
            return
        scores, entering = self.scores(), self.cric.entering
        others = {name: score.masked_fill(~entering[name], torch.inf) for name, score in scores.items()}
        lowest = agreed(self._ranking.lowest(others))
        violating = {name: units & entering[name] for name, units in lowest.items()}
        self.cric.begin_cycle(violating, agreed(self._ranking.lowest(scores, pruned=violating)))

    def route(self, t: int, ask: bool = True) -> None:
        """Let routers choose experts as they are scaled at sample t."""
        self._bound.route(self._factors(self._scale(t)), ask)

    def _scale(self, t: int) -> float:
        """What is left of the units on trial at sample t."""
        return (self.cric.samples - t) / self.cric.samples

    def _factors(self, factor: float) -> PerUnit:
        return marked(self.cric.shrinking, factor)

    # -- report and state -----------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return what CRIC did, as plain JSON types."""
        layers = {name: group.layers for name, group in self._bound.groups.structures.items()}
        return {"mode": self._config.cric_mode, **self.cric.report(layers, self._ranking.criteria)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the future: tensors and plain containers only."""
        return {
            "cric": self.cric.state_dict(),
            "snapshot": self.snapshot.state_dict() if self.snapshot else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], base: Optimizer) -> None:
        """Continue from a saved state; a snapshot in it belongs to the parameters of `base`."""
        self.cric.load_state_dict(state["cric"])
        self.snapshot = None
        if state["snapshot"] is not None:
            self.snapshot = self._bound.snapshot(base, self._on_cpu)
            self.snapshot.load_state_dict(state["snapshot"])
