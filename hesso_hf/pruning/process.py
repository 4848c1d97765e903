"""The pruning process: a run's state (`state`), what each phase does to it (`phases`), and what others ask of it.

One vector of scales per layer (1 kept, between 0 and 1 shrinking, 0 pruned) is the whole state of a structure; what it
does to the weights is `weights`'.
Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..budget.target_sizes import TargetSizes
from ..config import HessoConfig
from ..export.decision import Compaction
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.lora import NO_ADAPTERS, Adapters
from ..structures.router_gates import RouterGates
from . import phases
from .collapse import CollapseWatch
from .cric import CricTrial
from .healing import Healer
from .judging import Judging
from .ranking import Ranking
from .run import Run
from .saliency import PerUnit, float_sums, no_units, on_device
from .schedule import Schedule
from .state import PruningState, choices_of
from .weights.bound_groups import BoundGroups
from .weights.snapshot import Snapshot

# Each element of a weight by itself: one at zero, with gradient and state at zero, stays there.
ZERO_KEEPERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


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
        rungs: the sizes on the way to the target at which models are saved, the largest first.

    Attributes:
        state: what a checkpoint holds; print it.
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
        rungs: Sequence[TargetSizes] = (),
    ) -> None:
        self.groups, self.target, self.config, self.rungs = groups, target, config, tuple(rungs)
        self.bound = BoundGroups(parameters, groups, gates, adapters)
        ranking = Ranking(groups, target, config, self.bound.elements_per_unit(), self.rungs)
        shapes, device = self.bound.shapes(), self.bound.device
        self._device = device  # of the state
        self.state = PruningState(
            target,
            choices_of(config),
            schedule,
            scales={name: torch.ones(shape, device=device) for name, shape in shapes.items()},
            redundant=no_units(shapes, device),
            sums=ranking.empty_sums(device),
            watch=CollapseWatch(config.collapse_threshold),
        )
        self.run = Run(self.state, self.bound, ranking, config, Judging(self.state, self.bound, ranking, config))
        self.state.trial = self.run.new_trial()
        self._changed: list[str] = []  # of a frozen base, once the larger model is let go
        self._pending = ranking.empty_sums(device)  # of the coming step
        self._loss: float | torch.Tensor | None = None  # of the coming step
        self._phase = phases.phase_of(self.run)  # of the step that is being made

    # -- before and after the base optimizer's step ---------------------------------------------------------------

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell the loss of the step that comes, so that a collapse is noticed."""
        self._loss = loss

    def fetch_loss_with(self, norm: float | torch.Tensor) -> float:
        """Return the gradient's norm; where it and the loss still lie on the device, they come in one copy."""
        loss = self._loss
        if isinstance(norm, torch.Tensor) and isinstance(loss, torch.Tensor) and norm.device == loss.device:
            both = torch.stack([value.detach().reshape(()).to(float_sums(norm.device)) for value in (norm, loss)])
            fetched, self._loss = both.cpu().tolist()
            return fetched
        return float(norm)

    def prepare_gradients(self) -> None:
        """Before a forward pass: let frozen weights have gradients if this step is scored by them, and only then."""
        scored = phases.phase_of(self.run).is_scored
        self.bound.frozen.reveal(scored and self.run.ranking.needs_gradients)

    def _follow_parameters(self) -> None:
        """Keep the state where the parameters are: `accelerator.prepare` may move the model after the optimizer's."""
        if self._device != self.bound.device:
            self._device = self.bound.device
            self.state.to_(self._device)
            self._pending.sums = on_device(self._pending.sums, self._device)

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Mask the pruned units' gradients and, where a scoring is near, take the step's sums (not yet counted)."""
        self._follow_parameters()
        self.bound.frozen.average_gradients_()
        if self.run.masking:
            self.bound.mask_gradients_(self.run.pruned())
        self._pending.zero_()
        phases.phase_of(self.run).accumulate_(self._pending)
        self.bound.frozen.drop_gradients()

    @torch.no_grad()
    def before_step(self, base: Optimizer) -> None:
        """Count the observed gradient; sample, or at the first step of a period mark the lowest units."""
        loss, self._loss = self._loss, None
        self.run.keeps_zeros = keeps_zeros(base)
        self._phase = phases.phase_by_loss(self.run, loss)
        self._phase.before(self._pending, base)
        self._pending.zero_()

    @torch.no_grad()
    def after_step(self, base: Optimizer) -> None:
        """Shrink the units on their way to zero, keep pruned ones there, or return to a snapshot."""
        self._phase.after()
        self.state.step += 1
        if self.run.masking:
            # Matrices only when a period ends: with zero weights and masked gradients their entries stay zero. A
            # norm's vector, stored as -1 for zero or kept above zero by the optimizer's epsilon, is masked every step.
            ended, shifted_only = self.period_ended, self.run.keeps_zeros and not self.period_ended
            self.bound.mask_state_(base.state, self.run.pruned(), vectors_only=not ended, shifted_only=shifted_only)
        self.prepare_gradients()

    @torch.no_grad()
    def reapply(self) -> None:
        """Put weights that were loaded from elsewhere back under the pruned units' zeros."""
        self.run.mask()
        self.run.centre()

    def heal_with(self, healer: Healer) -> None:
        """Have marked units' contributions refitted into those that stay, from the next period on."""
        self.run.judging.healer = healer

    def healed_base(self) -> dict[str, torch.Tensor]:
        """Return frozen matrices that aren't as the base on disk has them, which nothing else in a checkpoint holds."""
        if self.bound.sharded:  # their checkpoints hold frozen weights too
            return {}
        cut, begun = self.state.compaction is not None, self.step > self.schedule.periods[0].start
        names = self._changed if cut else self._healed() if begun else []
        return {name: self.bound.parameters[name] for name in names if name in self.bound.frozen}

    def _healed(self) -> list[str]:
        if self.run.judging.healer is None or self.config.healing == "off":
            return []
        return [reader.name for reader in self.run.judging.healer.readers(self.bound)]

    def let_go(self, compaction: Compaction, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have nothing more to do with the model's parameters: the pruned units were cut out of it.

        Args:
            parameters: what is left.
        """
        centred = [name for name, axes in self.bound.axes.items() if any(axis.centred for *_, axis in axes)]
        self._changed = [name for name in dict.fromkeys([*self._healed(), *centred]) if name in parameters]
        self.bound.let_go(parameters)
        self.state.compaction = compaction

    # -- CRIC -----------------------------------------------------------------------------------------------------

    @property
    def on_trial(self) -> Snapshot | None:
        """While CRIC has the weights on their way to zero, the snapshot that they will return to; else None."""
        return self.trial.snapshot if self.trial is not None else None

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
        self._follow_parameters()
        self.run.check_agreement()
        with self.bound.frozen.revealed():
            self.trial.probe(losses, loss_scale)
        self.state.order = self.trial.scores()

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps made."""
        return self.state.step

    @property
    def schedule(self) -> Schedule:
        """Resolved steps, with what CRIC and pauses have changed."""
        return self.state.schedule

    @property
    def scales(self) -> PerUnit:
        """What is left of each unit, (L, U) per structure."""
        return self.state.scales

    @property
    def redundant(self) -> PerUnit:
        """Units on their way to zero, bool (L, U) per structure."""
        return self.state.redundant

    @property
    def trial(self) -> CricTrial | None:
        """CRIC, where it is wanted."""
        return self.state.trial

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The snapshots that a run may return to, by their kind."""
        return self.state.snapshots

    @property
    def finished(self) -> bool:
        """Whether all units that are to go are at zero."""
        return self.step >= self.schedule.end or not self.run.ranking.removes_any

    @property
    def period_ended(self) -> bool:
        """Whether the step just counted was the last of a period."""
        position = self.schedule.period_step(self.step - 1) if self.step else None
        return position is not None and position.last

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
            "rungs": [rung.to_dict() for rung in self.rungs],
            "kept_units": self.kept_units().to_dict(),
        }

    @torch.no_grad()
    def redundant_norm(self) -> float:
        """Return the L2 norm of all redundant groups' effective weights, 0.0 where there is none."""
        return self.bound.norm_of(self.redundant) if self.run.shrinking else 0.0

    def cric_report(self) -> dict[str, Any] | None:
        """Return what CRIC did as plain JSON types, None without it."""
        return self.state.corrections.report() if self.trial is None else self.trial.report()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the future: tensors and plain containers only (`PruningState.to_dict`)."""
        return self.state.to_dict(self.bound)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare a saved state with this run, changing nothing.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or format, with the first difference.
        """
        self.state.check(state)

    def load_state_dict(self, state: Mapping[str, Any], base: Optimizer) -> None:
        """Continue from a saved state; a snapshot in it belongs to the parameters of `base`.

        Raises:
            CheckpointMismatchError: as `check_state_dict` does; nothing is changed then.
        """
        self.check_state_dict(state)
        self._follow_parameters()
        self.state.load(state, self.bound)
        self._pending.zero_()
        self.state.trial = self.run.new_trial()  # the samples of a cycle are the schedule's
        self.state.load_snapshots(state, self.bound, base, self.run.snapshots_on_cpu)
        self.bound.route(self.scales)
        phase = phases.phase_of(self.run)
        if isinstance(phase, phases.CricCycle) and self.on_trial is not None:
            phase.trial.route(phase.position.t)
        self.bound.frozen.load_state_dict(state.get("frozen", {}), self.scales, self.state.on_the_way)
        self.prepare_gradients()


def keeps_zeros(base: Optimizer) -> bool:
    """Whether a base optimizer is known to leave a weight at zero whose gradient and state are zero.

    Where its epsilon may round to zero in the weights' dtype it divides zero by zero.
    """
    if type(base) not in ZERO_KEEPERS:
        return False
    weights = ((group, weight) for group in base.param_groups for weight in group["params"])
    return all(group.get("eps", 1.0) >= torch.finfo(weight.dtype).tiny for group, weight in weights)
