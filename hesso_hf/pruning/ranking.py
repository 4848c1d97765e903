"""Ranking: which units are the lowest, and how many of them go.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isfinite
from typing import Any

import torch
from transformers.utils import logging

from ..budget.target_sizes import TargetSizes
from ..config import HessoConfig
from ..config.names import RECONSTRUCTION
from ..distributed.collectives import broadcast_decisions_, is_main_process
from ..structures.groups import PruningGroups
from .criteria import combine_criteria, criteria_of, needed_sums
from .saliency import PerUnit, UnitSums

logger = logging.get_logger(__name__)

SHOWN_SCORES = 200  # of a structure, in the report


class Ranking:
    """Turns sums per unit into scores, and scores into the units that are the lowest under the quotas.

    Args:
        elements: number of elements of one unit, per structure.
        rungs: the sizes on the way to the target that are to be met exactly, the largest model first.
    """

    def __init__(
        self,
        groups: PruningGroups,
        target: TargetSizes,
        config: HessoConfig,
        elements: Mapping[str, int],
        rungs: Sequence[TargetSizes] = (),
    ) -> None:
        self._groups, self._weights, self._elements = groups, config.saliency_weights, elements
        self._across_layers = config.layer_widths == "per_layer"
        self._pools = {name: g.pools for name, g in groups.structures.items()}
        self._rungs = [
            {name: g.num_units - rung.kept_units[name] for name, g in groups.structures.items()} for rung in rungs
        ]
        self.removed = {name: g.num_units - target.kept_units[name] for name, g in groups.structures.items()}
        self.removed_in_all = {name: self.removed[name] * len(g.layers) for name, g in groups.structures.items()}

    @property
    def removes_any(self) -> bool:
        """Whether any unit is to go."""
        return any(self.removed.values())

    @property
    def needs_gradients(self) -> bool:
        """Whether a criterion looks at more than the weights."""
        return set(needed_sums(self._weights)) != {"x2"}

    def empty_sums(self, device: torch.device) -> UnitSums:
        """Return sums of no batch, with the terms that the criteria need."""
        return UnitSums.zeros(self._groups, needed_sums(self._weights), device)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names of the C criteria in use."""
        return tuple(self._weights)

    @property
    def reconstructs(self) -> bool:
        """Whether units are judged by what the others can say for them."""
        return RECONSTRUCTION in self._weights

    def scores(self, sums: UnitSums, kept: PerUnit | None = None, costs: PerUnit | None = None) -> PerUnit:
        """Return the score of every unit, shape (L, U) per structure.

        Args:
            kept: the units that still compete, bool; all by default.
            costs: of reconstruction, for the structures that have such.
        """
        self._warn_of_zeros(sums, costs or {})
        return self.combine(criteria_of(sums, self._weights, self._elements, costs=costs), kept)

    def _warn_of_zeros(self, sums: UnitSums, costs: PerUnit) -> None:
        """Warn of structures whose gradients were all zero, such as those of rewards that are all equal."""
        some = {}
        for name, terms in sums.sums.items():
            gradients = [value.any() for term, value in terms.items() if term != "x2"]
            if self.removed[name] and name not in costs and gradients:
                some[name] = torch.stack(gradients).any()
        told = torch.stack(list(some.values())).cpu().tolist() if some else []  # fetched at once
        for name in (name for name, found in zip(some, told, strict=True) if not found):
            if is_main_process():
                logger.warning(
                    f"{name}: all gradients of the steps that were looked at are zero, so {', '.join(self._weights)} "
                    "can't tell its units apart and the first ones go; score later (`warmup_steps`) or over more steps "
                    "(`saliency_batches`)"
                )

    def signed_values(self, sums: UnitSums) -> PerUnit:
        """Return the criteria's values along a path to zero, shape (C, L, U) per structure."""
        return criteria_of(sums, self._weights, self._elements, signed=True)

    def combine(self, values: PerUnit, kept: PerUnit | None = None) -> PerUnit:
        """Return scores, shape (L, U) per structure, from the criteria's values, shape (C, L, U)."""
        return combine_criteria(values, self._weights, self._across_layers, kept, self._pools)

    def going(self, share: Fraction) -> dict[str, int] | None:
        """Return how many units of each pool of a layer are marked when `share` of all is.

        None where that isn't known beforehand: layers compete, or another criterion has a say beside `reconstruction`.
        """
        if self._across_layers or set(self._weights) != {RECONSTRUCTION}:
            return None
        return {name: self._so_far(name, share) for name in self.removed}

    def _so_far(self, name: str, share: Fraction, layers: int = 1) -> int:
        """Return how many units of a pool are marked when `share` of all is: between rungs, as much of each structure.

        Args:
            layers: whose pools are counted together.
        """
        stops = [0, *(rung[name] for rung in self._rungs), self.removed[name]]
        index = min(int(share * (len(stops) - 1)), len(stops) - 2)
        behind, ahead = (units * layers // self._pools[name] for units in stops[index : index + 2])
        return behind + round((ahead - behind) * (share * (len(stops) - 1) - index))

    def kept_after(self, share: Fraction) -> dict[str, Any]:
        """Return how many units of each structure a layer has, in the mean, when `share` of all that go is gone."""
        layers = {name: len(g.layers) if self._across_layers else 1 for name, g in self._groups.structures.items()}
        return {
            name: g.num_units - self._so_far(name, share, layers[name]) * self._pools[name] / layers[name]
            for name, g in self._groups.structures.items()
        }

    def lowest(self, scores: PerUnit, share: Fraction = Fraction(1), pruned: PerUnit | None = None) -> PerUnit:
        """Mark the lowest units so that `share` of all that are to go is marked, those already pruned included.

        Of each pool of a layer equally many are marked.
        """
        found = {}
        for name, score in scores.items():
            layers = len(score) if self._across_layers else 1
            gone, pools = pruned[name] if pruned is not None else None, self._pools[name]
            count = self._so_far(name, share, layers)
            found[name] = lowest_units(score, gone, count, self._across_layers, pools)
        return found


def ranked(judged: PerUnit, gone: PerUnit, across_layers: bool) -> dict[str, Any] | None:
    """Return the scores by which units went or stayed, in their order, as plain JSON types; None where none has.

    Units compete within a layer, whose scores are means over all layers, or across layers.

    Args:
        judged: score of each unit, shape (L, U) per structure.
        gone: the units that were removed, bool (L, U) per structure; equally many in each layer, unless these compete.

    Returns:
        Per structure `units` that compete, `removed` of them, and (rank, score) of at most `SHOWN_SCORES` of them, the
        removed ones first, each kind from the lowest score on.
    """
    found = {}
    for name, scores in judged.items():
        rows = (1, scores.numel()) if across_layers else tuple(scores.shape)
        values, stays = scores.cpu().double().reshape(rows), ~gone[name].cpu().reshape(rows)
        count, units = int((~stays[0]).sum()), rows[1]
        if not count:
            continue
        order = values.argsort(1)
        order = order.gather(1, stays.gather(1, order).int().argsort(stable=True, dim=1))
        means = values.gather(1, order).mean(0).tolist()
        shown = {count - 1, count, *torch.linspace(0, units - 1, min(units, SHOWN_SCORES - 2)).round().int().tolist()}
        points = [[rank, float(f"{means[rank]:.4g}")] for rank in sorted(shown) if isfinite(means[rank])]
        found[name] = {"units": units, "removed": count, "points": points}
    return found or None


def agreed(marked: PerUnit) -> PerUnit:
    """Overwrite a decision with that of rank 0, on all ranks, in one broadcast."""
    broadcast_decisions_(list(marked.values()))
    return marked


def lowest_units(
    scores: torch.Tensor, pruned: torch.Tensor | None, count: int, across_layers: bool, pools: int = 1
) -> torch.Tensor:
    """Mark the lowest units, those already pruned first: equally many in each pool of a layer.

    Across layers, the lowest units of a layer's pools compete together, by the sum of their scores; so do the second
    lowest, and so on.

    Args:
        scores: shape (L, U); infinite for units that are marked only where there are no others.
        pruned: shape (L, U), bool; None where no unit is pruned yet.
        count: units of each pool of each layer, or of one pool of all layers together.
        pools: consecutive runs of units into which a layer is split.
    """
    ranked = scores if pruned is None else scores.masked_fill(pruned, -torch.inf)
    pooled = ranked.reshape(len(scores), pools, -1)
    order = pooled.argsort(dim=2, stable=True)
    if across_layers:
        chosen = _lowest_ranks(pooled.gather(2, order), count).unsqueeze(1).expand_as(order)
    else:
        chosen = (torch.arange(order.shape[2], device=order.device) < count).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, chosen).view_as(scores)


def _lowest_ranks(ascending: torch.Tensor, count: int) -> torch.Tensor:
    """Choose `count` ranks of all layers, bool (L, R), from scores (L, pools, R) that ascend in every pool."""
    missing = ascending.isposinf()
    sums = ascending.masked_fill(missing, 0.0).sum(1).flatten()
    last = missing.sum(1)
    last[:, -1] = ascending.shape[1] + 1  # no layer may lose its last unit
    order = sums.argsort(stable=True)
    order = order[last.flatten()[order].argsort(stable=True)]
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view_as(last)
