"""How the units that go next are found and healed: by gradients, and on examples where a healer reads some.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch

from ..config import HessoConfig
from .fisher import OutputFisher
from .healing import Healer
from .ranking import Ranking
from .reading import NoRoom
from .saliency import PerUnit
from .state import PruningState
from .weights.bound_groups import BoundGroups

Made = TypeVar("Made")


@dataclass
class Judging:
    """Scores units, and heals those that are marked."""

    state: PruningState
    bound: BoundGroups
    ranking: Ranking
    config: HessoConfig
    healer: Healer | None = None

    def fisher(self, judges: bool) -> OutputFisher | None:
        """Look how much the model minds errors, by which units are judged, if they still are, and healed; None without.

        Args:
            judges: whether units are yet to be judged.
        """
        wanted = self.config.healing != "off" or (judges and self.ranking.reconstructs)
        return self.healer.fisher(self.bound) if self.healer is not None and wanted else None

    def _with_room(self, work: Callable[[], Made]) -> Made:
        """Do what reads examples; where there is no room for them, from the beginning with half of them, to the end."""
        while self.healer is not None:
            with suppress(NoRoom), self.healer.halving():
                return work()
            self.healer = self.healer.halved()  # which says so; what the pass held is let go by now
        return work()

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
