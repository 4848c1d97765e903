"""The pruning process: which units are kept, redundant or pruned, and what that does to weights, gradients and state.

One vector of scales per layer (1 kept, between 0 and 1 shrinking, 0 pruned) is the whole state of a structure;
applying it is one broadcast multiply per axis, without index lists or copies of weights.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .agreement import broadcast_decision_, check_agreement
from .budget import TargetSizes
from .config import HessoConfig
from .errors import CheckpointMismatchError
from .groups import Axis, KeptUnits, PruningGroups, mask_, shrink_
from .saliency import UnitSums, accumulate_, chunk_rows, chunk_size, needed_sums, saliency_scores
from .schedule import PeriodStep, Schedule

FORMAT = 1  # of the saved state


class PruningProcess:
    """HESSO's state and its effect on a model's parameters (algorithm 1 of arXiv 2409.09085).

    Args:
        parameters: the model's parameters by name; frozen ones included.
        groups: the structures that are pruned.
        target: units to keep a layer.
        schedule: resolved steps.
        config: criteria and ranking.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: PruningGroups,
        target: TargetSizes,
        schedule: Schedule,
        config: HessoConfig,
    ) -> None:
        self.groups, self.target, self.schedule, self.config = groups, target, schedule, config
        self.step = 0
        self._axes = groups.by_parameter()
        self.bind(parameters)
        device = next(iter(self._parameters.values())).device
        self._elements = {
            name: structure.elements_per_unit({n: tuple(p.shape) for n, p in parameters.items()})
            for name, structure in groups.structures.items()
        }
        shape = {name: (len(g.layers), g.num_units) for name, g in groups.structures.items()}
        self.scales = {name: torch.ones(size, device=device) for name, size in shape.items()}
        self.redundant = {name: torch.zeros(size, dtype=torch.bool, device=device) for name, size in shape.items()}
        terms = needed_sums(config.saliency_weights)
        self._sums = UnitSums.zeros(groups, terms, device)
        self._pending = UnitSums.zeros(groups, terms, device)
        self._masking = self._shrinking = False
        self._chunk = chunk_size(sum(parameter.numel() for parameter in parameters.values()))

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take (new) parameter objects by name: sharding replaces them after the optimizer is made."""
        missing = [name for name in self._axes if name not in parameters]
        if missing:
            raise CheckpointMismatchError(f"the model has no parameter {missing[0]!r} that the groups were built on")
        self._parameters = {name: parameters[name] for name in self._axes}

    # -- before and after the base optimizer's step ---------------------------------------------------------------

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Mask the pruned units' gradients and, where a scoring is near, take the step's sums (not yet counted)."""
        if self._masking:
            self._for_pruned(lambda p, axis, pruned: None if p.grad is None else mask_(p.grad, axis, pruned, 0.0))
        self._pending.zero_()
        if self.schedule.scoring_window(self.step, self.config.saliency_batches) and self._to_mark():
            for name, axes in self._axes.items():
                parameter = self._parameters[name]
                accumulate_(self._pending, parameter.data, parameter.grad, axes, self._chunk)
            self._pending.batches = 1

    @torch.no_grad()
    def before_step(self) -> None:
        """Count the observed gradient; at the first step of a period, score the kept units and mark the lowest."""
        self._sums.add_(self._pending)
        self._pending.zero_()
        position = self.schedule.period_step(self.step)
        if position is not None and position.t == 0 and self._to_mark():
            self._mark(position)
            self._sums.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Shrink the redundant units, or set them to exactly zero at a period's end; keep pruned ones there."""
        position = self.schedule.period_step(self.step)
        if position is not None and self._to_mark():
            self._shrink(position)
        elif self._masking:
            self._mask_weights()
        self.step += 1

    def _mark(self, position: PeriodStep) -> None:
        check_agreement(torch.cat([scales.flatten() for scales in self.scales.values()]), position.index)
        scores = self.scores()
        for name, score in scores.items():
            removed = self.groups.structures[name].num_units - self.target.kept_units[name]
            if self._across_layers:
                removed *= score.shape[0]
            done = round(removed * (position.index + 1) / self.schedule.pruning_periods)
            marked = _lowest(score, self.scales[name] == 0, done, self._across_layers)
            broadcast_decision_(marked)
            self.redundant[name].copy_(marked & (self.scales[name] > 0))
        self._shrinking = True

    def scores(self) -> dict[str, torch.Tensor]:
        """Return the saliency of every unit from the gradients counted so far: shape (L, U) per structure."""
        kept = {name: scales > 0 for name, scales in self.scales.items()}
        return saliency_scores(self._sums, self.config.saliency_weights, self._elements, self._across_layers, kept)

    def _shrink(self, position: PeriodStep) -> None:
        last = position.t == position.length - 1
        scale = (position.length - position.t - 1) / position.length
        factors = {}
        for name, redundant in self.redundant.items():
            # pruned units are kept at zero by the same multiply
            factors[name] = torch.where(redundant, position.factor, (self.scales[name] > 0).float())
            self.scales[name].masked_fill_(redundant, scale)
        if last:
            for redundant in self.redundant.values():
                redundant.zero_()
            self._masking, self._shrinking = True, False
            self._mask_weights()
        else:
            for name, axes in self._axes.items():
                for structure, layer, axis in axes:
                    shrink_(self._parameters[name].data, axis, factors[structure][layer])

    def mask_optimizer_state(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Zero the pruned units' entries in optimizer state of the parameter's own shape and a floating dtype.

        Matrices only when a period ends: with zero weights and masked gradients their entries stay zero. A norm's
        vector, stored as -1 for zero or kept above zero by the optimizer's epsilon, is masked after every step.
        """
        if not self._masking:
            return

        def mask(parameter: nn.Parameter, axis: Axis, pruned: torch.Tensor) -> None:
            for value in state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    mask_(value, axis, pruned, 0.0)

        self._for_pruned(mask, vectors_only=not self.period_ended)

    @torch.no_grad()
    def reapply(self) -> None:
        """Put weights that were loaded from elsewhere back under the pruned units' zeros."""
        self._mask_weights()

    def _mask_weights(self) -> None:
        self._for_pruned(lambda parameter, axis, pruned: mask_(parameter.data, axis, pruned))

    def _for_pruned(self, apply: Any, vectors_only: bool = False) -> None:
        pruned = {name: scales == 0 for name, scales in self.scales.items() if self._removes(name)}
        for name, axes in self._axes.items():
            if vectors_only and self._parameters[name].dim() > 1:
                continue
            for structure, layer, axis in axes:
                if structure in pruned:
                    apply(self._parameters[name], axis, pruned[structure][layer])

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all units that are to go are at zero."""
        return self.step >= self.schedule.end or not self._to_mark()

    @property
    def period_ended(self) -> bool:
        """Whether the step just counted was the last of a period."""
        position = self.schedule.period_step(self.step - 1) if self.step else None
        return position is not None and position.t == position.length - 1

    def kept_units(self) -> KeptUnits:
        """Return the units that aren't at zero."""
        kept = {}
        for name, scales in self.scales.items():
            kept[name] = tuple(tuple(layer.nonzero().flatten().tolist()) for layer in (scales > 0).cpu())
        return KeptUnits({name: g.num_units for name, g in self.groups.structures.items()}, kept)

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
        total = 0.0
        for name, axes in self._axes.items() if self._shrinking else ():
            total += self._marked_square_sum(self._parameters[name].data, axes)
        return total**0.5

    def _marked_square_sum(self, parameter: torch.Tensor, axes: list[tuple[str, int, Axis]]) -> float:
        """Sum the squares of a parameter's effective weights that belong to a redundant unit, each counted once."""
        masks = [
            (axis.dim, axis.spread(self.redundant[structure][layer], parameter.dim(), fixed_value=False))
            for structure, layer, axis in axes
        ]
        total, rows = 0.0, chunk_rows(parameter, self._chunk)
        for start in range(0, parameter.shape[0], rows):
            part = parameter[start : start + rows].float()
            marked = torch.zeros_like(part, dtype=torch.bool)
            for dim, mask in masks:
                marked |= mask[start : start + rows] if dim == 0 else mask
            total += float((part + axes[0][2].shift).masked_select(marked).square().sum())
        return total

    @property
    def _across_layers(self) -> bool:
        return self.config.layer_widths == "per_layer"

    def _removes(self, name: str) -> bool:
        return self.target.kept_units[name] < self.groups.structures[name].num_units

    def _to_mark(self) -> bool:
        return any(self._removes(name) for name in self.groups.structures)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the future: tensors and plain containers only."""
        return {
            "format": FORMAT,
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "target": self.target.to_dict(),
            "ranking": self._ranking(),
            "scales": dict(self.scales),
            "redundant": dict(self.redundant),
            "sums": {name: dict(terms) for name, terms in self._sums.sums.items()},
            "batches": self._sums.batches,
        }

    def _ranking(self) -> dict[str, Any]:
        """What the saved sums and scales depend on."""
        return {
            "saliency": self.config.saliency_weights,
            "saliency_batches": self.config.saliency_batches,
            "layer_widths": self.config.layer_widths,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare a saved state with this run, changing nothing.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or format, with the first difference.
        """
        if state.get("format") != FORMAT:
            raise CheckpointMismatchError(
                f"pruning state of format {state.get('format')!r}; this version reads {FORMAT}"
            )
        _check_same("target", state["target"], self.target.to_dict())
        _check_same("config", state["ranking"], self._ranking())
        for name, scales in self.scales.items():
            if name not in state["scales"] or state["scales"][name].shape != scales.shape:
                raise CheckpointMismatchError(f"the saved pruning state has no {name} of shape {tuple(scales.shape)}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointMismatchError: as `check_state_dict` does; nothing is changed then.
        """
        self.check_state_dict(state)
        for name, scales in self.scales.items():
            scales.copy_(state["scales"][name])
            self.redundant[name].copy_(state["redundant"][name])
            for term, value in self._sums.sums[name].items():
                value.copy_(state["sums"][name][term])
        self._sums.batches = int(state["batches"])
        self._pending.zero_()
        self.schedule = Schedule.from_dict(state["schedule"])
        self.step = int(state["step"])
        self._masking = any(bool((scales == 0).any()) for scales in self.scales.values())
        self._shrinking = any(bool(redundant.any()) for redundant in self.redundant.values())


def _lowest(scores: torch.Tensor, pruned: torch.Tensor, count: int, across_layers: bool) -> torch.Tensor:
    """Mark the `count` lowest units of each layer, or of all layers together, those already pruned first."""
    ranked = scores.masked_fill(pruned, -torch.inf)
    if across_layers:
        best = ranked.argmax(dim=1, keepdim=True)  # no layer may lose its last unit
        ranked = ranked.scatter(1, best, torch.inf).reshape(1, -1)
    order = ranked.argsort(dim=1, stable=True)
    marked = torch.zeros_like(ranked, dtype=torch.bool)
    marked.scatter_(1, order[:, :count], True)
    return marked.view_as(scores)


def _check_same(what: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for key, value in current.items():
        if saved.get(key) != value:
            raise CheckpointMismatchError(
                f"the checkpoint was made with {what} {key} = {saved.get(key)!r}, this run has {value!r}; "
                "resume with the same configuration or start anew"
            )
