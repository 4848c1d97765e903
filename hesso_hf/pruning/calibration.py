"""Calibration: what losing a share of each structure's units costs, measured in loss by real removals on a few batches.

The saliencies of different structures aren't comparable (the elementwise Taylor term is off by up to 1.9x between
them), so the budget splits by these curves instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..budget.cost import Counts
from ..budget.solver import LossFunction
from ..config import HessoConfig
from ..config.names import RECONSTRUCTION
from ..distributed.parts import local, reshard
from ..distributed.passes import checkpointed, in_eval
from ..structures.experts import EXPERT_UNITS
from ..structures.groups import PruningGroups, StructureGroups
from ..structures.lora import Adapters, parameters_of
from ..structures.router_gates import routed_by
from .criteria import combine_criteria, criteria_of, needed_sums
from .fisher import OutputFisher
from .healing import Healer
from .ranking import lowest_units
from .saliency import UnitSums, no_units
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

REMOVED_SHARES = (0.125, 0.25, 0.5, 0.75, 0.875)

BatchLoss = Callable[[PreTrainedModel, Any], torch.Tensor]


@dataclass(frozen=True)
class LossCurves:
    """Rise of the loss (nats per token) when the lowest units of one structure go in every layer.

    Attributes:
        removed: per structure, shares of its units that went, ascending.
        rises: per structure, the rise at each of these.
    """

    removed: dict[str, tuple[float, ...]]
    rises: dict[str, tuple[float, ...]]

    def loss(self, units: Mapping[str, int]) -> LossFunction:
        """Return the expected rise of kept units: the structures' curves added up, each going on as it ends."""
        points = {name: _to_the_end((0.0, *self.removed[name]), (0.0, *rises)) for name, rises in self.rises.items()}

        def loss(kept: Counts) -> np.ndarray:
            terms = [np.interp(1 - np.asarray(count) / units[name], *points[name]) for name, count in kept.items()]
            return np.sum(np.broadcast_arrays(*terms), axis=0)

        return loss

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def _to_the_end(shares: tuple[float, ...], rises: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Draw a curve on to where all units are removed, as steep as at its end."""
    slope = (rises[-1] - rises[-2]) / (shares[-1] - shares[-2])
    return (*shares, 1.0), (*rises, rises[-1] + slope * (1.0 - shares[-1]))


def measure_curves(
    model: PreTrainedModel,
    groups: PruningGroups,
    batches: list[Any],
    batch_loss: BatchLoss,
    config: HessoConfig,
    healer: Healer | None = None,
    progress: bool = False,
) -> LossCurves:
    """Score all units on `batches` and measure the loss without the lowest ones, one structure at a time.

    Weights, mode and random state are as before afterwards; meanwhile a copy of the weights stays on the CPU.

    Args:
        healer: refits what stays, where the run will, and tells what the others can say of a unit.
        progress: show a bar of the forward passes: three an example, and one for each share that is removed.
    """
    counts = {name: _counts(structure) for name, structure in groups.structures.items()}
    passes = len(batches) * (3 + sum(map(len, counts.values())))
    bound = BoundGroups(parameters_of(model), groups, adapters=Adapters.of(model))
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        logging.tqdm(total=passes, desc="Measuring what structures cost", disable=not progress) as bar,
        torch.random.fork_rng(devices=devices),
        in_eval(model),
    ):

        def counted_loss(model: PreTrainedModel, batch: Any) -> torch.Tensor:
            bar.update()
            return batch_loss(model, batch)

        try:
            batches = usable(model, batches, counted_loss)
            if not batches:
                logger.warning("no calibration example gives a finite loss: the structures share the cut evenly")
                return LossCurves({}, {})
            with bound.frozen.revealed(), checkpointed(model):
                fisher = healer.fisher(bound) if healer is not None else None
                scores = _scores(model, bound, batches, counted_loss, config, healer, fisher)
            mean_loss = partial(_mean_loss, model, batches, counted_loss)
            before, heals = mean_loss(), healer if config.healing != "off" else None
            rises = {
                name: _rises(model, bound, name, scores[name], counts[name], mean_loss, before, heals, fisher)
                for name in counts
            }
        finally:
            model.zero_grad(set_to_none=True)
    sizes = {name: structure.pool_size for name, structure in groups.structures.items()}
    return LossCurves(
        {name: tuple(count / sizes[name] for count in removed) for name, removed in counts.items()}, rises
    )


@torch.no_grad()
def usable(model: PreTrainedModel, batches: list[Any], batch_loss: BatchLoss) -> list[Any]:
    """Leave out batches without a finite loss, such as an example whose labels were all masked."""
    found = [batch for batch in batches if math.isfinite(float(batch_loss(model, batch)))]
    reshard(model)
    return found


def _counts(structure: StructureGroups) -> list[int]:
    """Return the numbers of units of a pool to remove: the shares, rounded, without repetition and never all."""
    units = structure.pool_size
    return sorted({min(units - 1, max(1, round(share * units))) for share in REMOVED_SHARES})


def _scores(
    model: PreTrainedModel,
    bound: BoundGroups,
    batches: list[Any],
    batch_loss: BatchLoss,
    config: HessoConfig,
    healer: Healer | None,
    fisher: OutputFisher | None,
) -> dict[str, torch.Tensor]:
    sums = UnitSums.zeros(bound.groups, needed_sums(config.calibration_weights), bound.device)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            batch_loss(model, batch).backward()
        bound.accumulate_(sums)
        sums.batches += 1
    model.zero_grad(set_to_none=True)
    pools = {name: structure.pools for name, structure in bound.groups.structures.items()}
    sums, elements = bound.over_ranks(sums), bound.elements_per_unit()
    criteria, costs = config.calibration_weights, None
    if healer is not None and RECONSTRUCTION in criteria:
        costs = healer.costs(bound, no_units(bound.shapes(), bound.device), fisher=fisher)
    values = criteria_of(sums, criteria, elements, costs=costs)
    return combine_criteria(values, criteria, across_layers=False, pools=pools)


@torch.no_grad()
def _rises(
    model: PreTrainedModel,
    bound: BoundGroups,
    name: str,
    scores: torch.Tensor,
    counts: list[int],
    mean_loss: Callable[[], float],
    before: float,
    healer: Healer | None,
    fisher: OutputFisher | None,
) -> tuple[float, ...]:
    """Return by how much the loss rises where so many of a structure's lowest units go; weights return."""
    structure = bound.groups.structures[name]
    touched = [key for key, axes in bound.axes.items() if any(owner == name for owner, _, _ in axes)]
    copies = {key: local(bound.parameters[key]).detach().to("cpu", copy=True) for key in touched}
    rises: list[float] = []
    try:
        for count in counts:
            pruned = lowest_units(scores, None, count, across_layers=False, pools=structure.pools)
            if healer is not None:
                none = no_units(bound.shapes(), bound.device)
                bound.add_(healer.corrections(bound, {**none, name: pruned}, none, fisher))
            bound.mask_weights_({name: pruned})
            bound.centre_({name: (~pruned).float()})
            with routed_by(model, structure if name == EXPERT_UNITS else None, ~pruned):
                rise = mean_loss() - before
            rises.append(max(rise, rises[-1] if rises else 0.0))
            _restore(bound, copies)
    finally:
        _restore(bound, copies)
    return tuple(rises)


def _restore(bound: BoundGroups, copies: Mapping[str, torch.Tensor]) -> None:
    for key, copy in copies.items():
        local(bound.parameters[key].data).copy_(copy)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, batches: list[Any], batch_loss: BatchLoss) -> float:
    mean = sum(float(batch_loss(model, batch)) for batch in batches) / len(batches)
    reshard(model)
    return mean
