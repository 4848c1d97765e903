"""What decides the future of a pruning run: all that a checkpoint holds of it, as one dataclass.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ..budget.target_sizes import TargetSizes
from ..config import HessoConfig
from ..distributed.collectives import is_main_process
from ..errors import CheckpointMismatchError, check_same
from ..export.decision import Compaction
from .collapse import CollapseWatch
from .corrections import Corrections
from .cric import CricTrial
from .saliency import PerUnit, UnitSums, on_device
from .schedule import Schedule
from .weights.bound_groups import BoundGroups
from .weights.snapshot import Snapshot

FORMAT = 2  # of the saved state


@dataclass
class PruningState:
    """Where a run is and what it has decided; `print` shows it, `to_dict` is what a checkpoint holds.

    Attributes:
        target, choices: what the run is for: units to keep a layer, and the config's choices that decide them.
        schedule: resolved steps, with what CRIC and pauses have changed.
        step: steps made.
        scales: (L, U) per structure: 1 kept, between 0 and 1 shrinking, 0 pruned.
        redundant: units on their way to zero in this period, bool (L, U) per structure.
        sums: of the gradients counted for the next scoring, of this process' parts.
        order: scores that a mark goes by, (L, U) per structure: CRIC's, or those of the period that may be paused;
            where there are none, the next mark scores anew.
        watch: on the loss.
        trial: CRIC's sets, sums and snapshot; None without CRIC.
        period_start: snapshot of the period's start, while it may be paused.
        healing: what is added to matrices in this period, all its steps together (below fp32 what is left of it): by
            parameter, what belongs to each piece that this process holds.
        compaction: that the pruned units were cut out of the model; None while it has them.
        judged: (L, U) per structure: each unit's score when it was last judged, by which a pruned one went; for the
            report alone.
        corrections: what CRIC has corrected where it looks ahead once a period; for the report alone.
    """

    target: TargetSizes
    choices: dict[str, Any]
    schedule: Schedule
    scales: PerUnit
    redundant: PerUnit
    sums: UnitSums
    watch: CollapseWatch
    trial: CricTrial | None = None
    step: int = 0
    order: PerUnit | None = None
    period_start: Snapshot | None = None
    healing: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    compaction: Compaction | None = None
    judged: PerUnit = field(default_factory=dict)
    corrections: Corrections = field(default_factory=Corrections)

    def __str__(self) -> str:
        lines = [f"step {self.step} of {self.schedule.total_steps} ({self.schedule.phase(self.step)})"]
        for name, scales in self.scales.items():
            counts = int((scales > 0).sum()), int(self.redundant[name].sum()), int((scales == 0).sum())
            lines.append(f"{name}: {counts[0] - counts[1]} kept, {counts[1]} redundant, {counts[2]} pruned")
        lines.append(f"schedule: {self.schedule}")
        lines.append(f"scoring: {self.sums.batches} batches counted, " + ("anew" if self.order is None else "by order"))
        lines.append(f"watch: level {self.watch.level:.3f}, present {self.watch.present:.3f}")
        if self.trial is not None:
            cycles = f"{self.trial.cric.cycles} of at most {self.trial.cric.max_cycles} cycles begun"
            lines.append(f"CRIC: {'decided' if self.trial.ended else 'not decided'}, {cycles}")
        if self.compaction is not None:
            lines.append(f"compaction: pruned units were cut at step {self.compaction.step}")
        return "\n".join([*lines, f"snapshots: {', '.join(self.snapshots) or 'none'}"])

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The snapshots that the run may return to: of CRIC's trial, and of the period's start where it may pause."""
        found = {"trial": self.trial.snapshot if self.trial is not None else None, "period_start": self.period_start}
        return {kind: snapshot for kind, snapshot in found.items() if snapshot is not None}

    def pruned(self) -> PerUnit:
        """Return the units at zero, bool (L, U) per structure."""
        return {name: scales == 0 for name, scales in self.scales.items()}

    @property
    def on_the_way(self) -> PerUnit:
        """The units on their way to zero, in a period or on CRIC's trial, bool (L, U) per structure."""
        if self.trial is not None and self.trial.snapshot is not None:
            return self.trial.cric.shrinking
        return {name: (scales > 0) & (scales < 1) for name, scales in self.scales.items()}

    def to_(self, device: torch.device) -> None:
        """Move all tensors to another device; snapshots stay where they are."""
        self.scales, self.redundant = on_device(self.scales, device), on_device(self.redundant, device)
        self.sums.sums = on_device(self.sums.sums, device)
        self.healing = {name: [piece.to(device) for piece in pieces] for name, pieces in self.healing.items()}
        self.order = None if self.order is None else on_device(self.order, device)
        self.judged = on_device(self.judged, device)
        self.corrections.to_(device)
        if self.trial is not None:
            self.trial.cric.to_(device)

    def to_dict(self, bound: BoundGroups) -> dict[str, Any]:
        """Return tensors and plain containers only, as `torch.load(weights_only=True)` reads them.

        Where parameters are sharded all processes call it, since sums are added up; snapshots and healing in it are
        this process' parts.
        """
        return {
            "format": FORMAT,
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "target": self.target.to_dict(),
            "choices": self.choices,
            "scales": dict(self.scales),
            "redundant": dict(self.redundant),
            "sums": {name: dict(terms) for name, terms in bound.over_ranks(self.sums).sums.items()},
            "batches": self.sums.batches,
            "order": None if self.order is None else dict(self.order),
            "reorder": self.order is None,  # the order alone decides; earlier code of this format asks for it
            "watch": self.watch.state_dict(),
            "trial": self.trial.state_dict() if self.trial else None,
            "period_start": self.period_start.state_dict() if self.period_start else None,
            # which earlier code doesn't know; what it wrote is all of it, also below fp32
            **({"healing": dict(self.healing), "healing_left": True} if self.healing else {}),
            **({"compaction": self.compaction.to_dict()} if self.compaction else {}),  # nor this
            **({"judged": dict(self.judged)} if self.judged else {}),  # nor this
            **({"corrections": self.corrections.state_dict()} if self.corrections.sizes else {}),  # nor this
            "frozen": bound.frozen.state_dict(self.on_the_way),
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Compare a saved state with this run, changing nothing.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or format, with the first difference.
        """
        if saved.get("format") != FORMAT:
            found = saved.get("format")
            raise CheckpointMismatchError(f"pruning state of format {found!r}; this version reads {FORMAT}")
        check_same("target", _decided(saved["target"]), _decided(self.target.to_dict()))
        check_same("config", saved["choices"], self.choices)
        if (saved.get("compaction") is None) != (self.compaction is None):
            raise CheckpointMismatchError(
                "the pruned units were cut out of the model in only one of the checkpoint and this run: go on with the "
                "model that the run began with, loaded anew, in HessoTrainer, which cuts it as the checkpoint's was"
            )
        for name, scales in self.scales.items():
            if name not in saved["scales"] or saved["scales"][name].shape != scales.shape:
                raise CheckpointMismatchError(f"the saved pruning state has no {name} of shape {tuple(scales.shape)}")

    def load(self, saved: Mapping[str, Any], bound: BoundGroups) -> None:
        """Take over a checked state, all but what needs the optimizer: CRIC's trial and the snapshots."""
        for name, scales in self.scales.items():
            scales.copy_(saved["scales"][name])
            self.redundant[name].copy_(saved["redundant"][name])
            for term, value in self.sums.sums[name].items():
                value.copy_(saved["sums"][name][term])
                if bound.sharded and not is_main_process():
                    value.zero_()  # the saved sums are those of all processes
        self.sums.batches = int(saved["batches"])
        self.schedule = Schedule.from_dict(saved["schedule"])
        self.step = int(saved["step"])
        order = saved["order"]
        self.order = None if order is None else {name: score.to(bound.device) for name, score in order.items()}
        self.watch.load_state_dict(saved["watch"])
        self.healing = {
            name: [piece.to(bound.device) for piece in ([found] if isinstance(found, torch.Tensor) else found)]
            for name, found in saved.get("healing", {}).items()  # one whole matrix each, in earlier code
        }
        position = self.schedule.period_step(self.step)
        if position is not None and not saved.get("healing_left"):
            bound.not_yet_added(self.healing, 1 - position.t / position.length)
        self.judged = on_device(saved.get("judged", {}), bound.device)
        if "corrections" in saved:
            self.corrections = Corrections.of(saved["corrections"], bound.device)

    def load_snapshots(self, saved: Mapping[str, Any], bound: BoundGroups, base: Optimizer, on_cpu: bool) -> None:
        """Take over CRIC's trial and the snapshots, which belong to the parameters of `base`."""
        if self.trial is not None:
            self.trial.load_state_dict(saved["trial"], base)
        self.period_start = None
        if saved["period_start"] is not None:
            self.period_start = bound.snapshot(base, on_cpu)
            self.period_start.load_state_dict(saved["period_start"])


def choices_of(config: HessoConfig) -> dict[str, Any]:
    """Return what a run's sums and scales depend on."""
    names = ["saliency_batches", "layer_widths", "on_collapse"]
    names += ["healing"] if config.healing != "off" else []  # which earlier checkpoints don't know
    names += ["export_at"] if config.rungs else []  # nor this
    names += [name for name in config.to_dict() if name.startswith("cric") and name != "cric_snapshot"]
    found = {"saliency": config.saliency_weights} | {name: getattr(config, name) for name in names}
    return found if config.cric_way else found | {"cric": False}


def _decided(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a target decides, without its price: a latency is never timed twice alike."""
    return {name: value for name, value in target.items() if name not in ("cost_before", "cost_after")}
