"""What the phases of one run share: its state, the groups on the model's parameters, and the ranking.

Legend: L layers, U units a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import HessoConfig
from ..distributed.collectives import check_agreement
from .cric import CricTrial
from .ranking import Ranking
from .saliency import PerUnit
from .state import PruningState
from .weights.bound_groups import BoundGroups


@dataclass
class Run:
    """A state with its effect on a model's parameters."""

    state: PruningState
    bound: BoundGroups
    ranking: Ranking
    config: HessoConfig

    def new_trial(self) -> CricTrial | None:
        """Return CRIC before its first cycle, with as many samples as the schedule says; None without CRIC."""
        wanted = self.config.cric and self.ranking.removes_any
        return CricTrial(self.bound, self.ranking, self.state.schedule, self.config) if wanted else None

    @property
    def snapshots_on_cpu(self) -> bool:
        """Where snapshots lie."""
        return self.config.cric_snapshot == "cpu"

    @property
    def pausing(self) -> bool:
        """Whether a collapse gives the period up."""
        return self.config.on_collapse == "pause"

    @property
    def masking(self) -> bool:
        """Whether units are pruned: a period that marks some has ended."""
        ended = (period.share and period.end <= self.state.step for period in self.state.schedule.periods)
        return self.ranking.removes_any and any(ended)

    @property
    def shrinking(self) -> bool:
        """Whether units are on their way to zero: between the first and the last step of a period."""
        position = self.state.schedule.period_step(self.state.step)
        return self.ranking.removes_any and position is not None and position.t > 0

    def scores_soon(self) -> bool:
        """Whether the coming gradient counts in the next scoring."""
        trial, state = self.state.trial, self.state
        settled = trial is not None and (trial.probes or trial.ended)
        if settled or not self.ranking.removes_any:
            return False
        return state.schedule.scoring_window(state.step, self.config.saliency_batches)

    def check_agreement(self, period: int | None = None) -> None:
        """Check that all processes have the same scales, and are in the same period."""
        scales = torch.cat([scales.flatten() for scales in self.state.scales.values()])
        check_agreement(scales) if period is None else check_agreement(scales, period)

    def scores(self) -> PerUnit:
        """Return the saliency of every unit from the gradients counted so far: shape (L, U) per structure."""
        sums = self.bound.over_ranks(self.state.sums)
        return self.ranking.scores(sums, {name: scales > 0 for name, scales in self.state.scales.items()})

    def pruned(self) -> PerUnit:
        """Return the pruned units of the structures that lose any, bool (L, U)."""
        return {name: units for name, units in self.state.pruned().items() if self.ranking.removed[name]}

    def mask(self) -> None:
        """Put the pruned units' weights at zero."""
        self.bound.mask_weights_(self.pruned())

    def centre(self, share: float = 1.0) -> None:
        """Keep the mean of a stream at zero whose norms subtract it, so that they see no difference in the end."""
        self.bound.centre_({n: scales for n, scales in self.state.scales.items() if self.ranking.removed[n]}, share)

    def end_period(self) -> None:
        """Forget the period: its marks, its snapshot, and its order unless CRIC decided it."""
        for redundant in self.state.redundant.values():
            redundant.zero_()
        self.state.period_start = None
        if self.state.trial is None:
            self.state.order = None
