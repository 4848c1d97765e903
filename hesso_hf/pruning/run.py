"""What the phases of a run share: its state, and what keeps pruned units at zero.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import HessoConfig
from ..config.names import CRIC_TRIALS
from ..distributed.collectives import check_agreement
from .cric import CricTrial
from .judging import Judging
from .ranking import Ranking
from .saliency import PerUnit
from .state import PruningState
from .weights.bound_groups import BoundGroups


@dataclass
class Run:
    """What the phases of a run share: its state, the groups on the model's parameters, the ranking, and who judges."""

    state: PruningState
    bound: BoundGroups
    ranking: Ranking
    config: HessoConfig
    judging: Judging
    keeps_zeros: bool = False  # the base optimizer does, where weight, gradient and state are zero

    def new_trial(self) -> CricTrial | None:
        """Return CRIC before its first cycle, with as many samples as the schedule says; None without CRIC."""
        wanted = self.config.cric_way in CRIC_TRIALS and self.ranking.removes_any
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
        """Whether the model has pruned units: a period that marks some has ended, and they weren't cut out yet."""
        if self.state.compaction is not None:
            return False
        ended = (period.share and period.end <= self.state.step for period in self.state.schedule.periods)
        return self.ranking.removes_any and any(ended)

    @property
    def shrinking(self) -> bool:
        """Whether units are on their way to zero: between the first and the last step of a period."""
        position = self.state.schedule.period_step(self.state.step)
        return self.ranking.removes_any and position is not None and position.t > 0

    def check_agreement(self, period: int = 0) -> None:
        """Check that all processes have the same scales, and are in the same period."""
        check_agreement(torch.cat([scales.flatten() for scales in self.state.scales.values()]), period)

    def pruned(self) -> PerUnit:
        """Return the pruned units of the structures that lose any, bool (L, U)."""
        return {name: units for name, units in self.state.pruned().items() if self.ranking.removed[name]}

    def mask(self, shifted_only: bool = False) -> None:
        """Put the pruned units' weights at zero, or only those for which a number stands that isn't zero."""
        self.bound.mask_weights_(self.pruned(), shifted_only)

    def centre(self, share: float = 1.0) -> None:
        """Keep the mean of a stream at zero whose norms subtract it, so that they see no difference in the end."""
        self.bound.centre_({n: scales for n, scales in self.state.scales.items() if self.ranking.removed[n]}, share)

    def end_period(self) -> None:
        """Forget the period: its marks, its snapshot, and its order unless CRIC decided it."""
        for redundant in self.state.redundant.values():
            redundant.zero_()
        self.state.period_start = None
        self.state.healing = {}
        if self.state.trial is None:
            self.state.order = None
