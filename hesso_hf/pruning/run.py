"""What the phases of a run share: how units are judged and healed, and what keeps pruned ones at zero.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch

from ..config import HessoConfig
from ..config.names import CRIC_TRIALS
from ..distributed.collectives import check_agreement
from .cric import CricTrial
from .fisher import OutputFisher
from .healing import Healer
from .ranking import Ranking
from .reading import NoRoom
from .saliency import PerUnit
from .state import PruningState
from .weights.bound_groups import BoundGroups

Made = TypeVar("Made")


@dataclass
class Run:
    """What the phases of a run share: its state, the groups on the model's parameters, and the ranking."""

    state: PruningState
    bound: BoundGroups
    ranking: Ranking
    config: HessoConfig
    healer: Healer | None = None
    keeps_zeros: bool = False  # the base optimizer does, where weight, gradient and state are zero

    def fisher(self, judges: bool) -> OutputFisher | None:
        """Look how much the model minds errors, by which units are judged, if they still are, and healed; None without.

        Args:
            judges: whether units are yet to be judged.
        """
        wanted = self.config.healing != "off" or (judges and self.ranking.reconstructs)
        return self.healer.fisher(self.bound) if self.healer is not None and wanted else None

    def _with_room(self, work: Callable[[], Made]) -> Made:
        """Do what reads examples; where there is no room for them, from the beginning with half of them, to the end."""
        while True:
            try:
                return work()
            except NoRoom:
                assert self.healer is not None
                self.healer = self.healer.halved()

    def judge(self, share: Fraction) -> tuple[PerUnit, OutputFisher | None]:
        """Score the units of which some are to go next; with CRIC as the model is once the lowest are gone and healed.

        Args:
            share: of all units that are to go, those that will have gone then.

        Returns:
            The scores, shape (L, U) per structure, and how much the model minds errors, by which the others are healed.
        """
        return self._with_room(lambda: self._judge(share))

    def _judge(self, share: Fraction) -> tuple[PerUnit, OutputFisher | None]:
        fisher, going = self.fisher(judges=True), self.ranking.going(share)
        if self.healer is None or fisher is None or going is None or self.config.cric_way != "healed":
            return self._scores(share, fisher), fisher
        pruned = self.state.pruned()
        costs, ahead, fisher = self.healer.look_ahead(self.bound, pruned, going, fisher)
        first, then = (self.ranking.lowest(each, share, pruned) for each in (costs, ahead))
        self.state.corrections.note(*({n: units > pruned[n] for n, units in each.items()} for each in (first, then)))
        return self._combined(ahead), fisher

    def heal(self, fisher: OutputFisher | None) -> None:
        """Have what the marked units say refitted into the others, which take it on as the period goes along."""
        if self.healer is None or self.config.healing == "off":
            return
        looked = self.healer  # on fewer examples it is looked anew how much the model minds errors

        def corrections() -> dict[str, list[torch.Tensor]]:
            healer, state = self.healer, self.state
            assert healer is not None
            return healer.corrections(self.bound, state.redundant, state.pruned(), fisher if healer is looked else None)

        found = self._with_room(corrections)
        self.state.healing = found if self.bound.sharded else self.bound.from_main(found)

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

    def scores(self) -> PerUnit:
        """Return the saliency of every unit, from the gradients counted so far: shape (L, U) per structure."""
        return self._with_room(self._scores)

    def _scores(self, share: Fraction | None = None, fisher: OutputFisher | None = None) -> PerUnit:
        """Return `scores`, of units that go next where it is known what share of all will have gone then."""
        costs = None
        if self.healer is not None and self.ranking.reconstructs:
            going = None
            if share is not None and self.config.healing != "off":
                going = self.ranking.going(share)
            costs = self.healer.costs(self.bound, self.state.pruned(), going, fisher)
        return self._combined(costs)

    def _combined(self, costs: PerUnit | None) -> PerUnit:
        """Return the scores that the gradients counted so far and the costs of reconstruction make together."""
        kept = {name: scales > 0 for name, scales in self.state.scales.items()}
        return self.ranking.scores(self.bound.over_ranks(self.state.sums), kept, costs)

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
