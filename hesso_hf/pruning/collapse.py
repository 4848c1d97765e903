"""An early warning: the training loss during a pruning period, compared with its level before pruning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from ..distributed.collectives import is_main_process
from .saliency import PerUnit, UnitSums
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

LEVEL_STEPS, RECENT_STEPS = 8, 3  # steps over which the level before pruning and the present loss are averaged
NAMED = 3  # layers that a warning names


class CollapseWatch:
    """Tells when the loss has risen by more than `threshold` (in units of the loss) over its level before pruning."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._level: deque[float] = deque(maxlen=LEVEL_STEPS)
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._warned = False  # in this period

    def note_level(self, loss: float) -> None:
        """Count a loss of the unpruned model."""
        if math.isfinite(loss):
            self._level.append(loss)

    def note(self, loss: float) -> None:
        """Count a loss during a period."""
        if math.isfinite(loss):
            self._recent.append(loss)

    def begin_period(self) -> None:
        """Forget the losses of the period before."""
        self._recent.clear()
        self._warned = False

    @property
    def level(self) -> float:
        """Mean loss before pruning; NaN where none was told."""
        return sum(self._level) / len(self._level) if self._level else math.nan

    @property
    def present(self) -> float:
        """Mean loss of the last steps of this period; NaN where none was told."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    def is_new_collapse(self) -> bool:
        """Whether the loss has risen beyond the threshold and no warning in this period has said so."""
        return not self._warned and self.present - self.level > self.threshold  # false while either is NaN

    def warn(self, step: int, bound: BoundGroups, redundant: PerUnit, then: str) -> None:
        """Warn, from the main process, with the layers at fault by this step's gradient and what happens next."""
        self._warned = True
        if not is_main_process():
            return
        slopes = UnitSums.zeros(bound.groups, ("xg",), bound.device)
        bound.accumulate_(slopes)
        layers = {name: group.layers for name, group in bound.groups.structures.items()}
        fault = layers_at_fault({name: terms["xg"] for name, terms in slopes.sums.items()}, redundant, layers)
        logger.warning(
            f"step {step}: the loss is {self.present:.3f}, {self.present - self.level:.3f} above its level before "
            f"pruning (`collapse_threshold` {self.threshold}). At fault: {fault}; {then}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers."""
        return {"level": list(self._level), "recent": list(self._recent), "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._level = deque(state["level"], maxlen=LEVEL_STEPS)
        self._recent = deque(state["recent"], maxlen=RECENT_STEPS)
        self._warned = bool(state["warned"])


def layers_at_fault(
    slopes: Mapping[str, torch.Tensor], redundant: Mapping[str, torch.Tensor], layers: Mapping[str, tuple[str, ...]]
) -> str:
    """Name the structures and layers whose redundant units would lower the loss most if they came back.

    Args:
        slopes: sum of x*g per unit, shape (L, U): how the loss changes as the unit grows.
        redundant: units that are shrinking, bool (L, U).
        layers: names of the layers.
    """
    gains = [
        (gain, name, layer)
        for name, slope in slopes.items()
        for layer, gain in zip(layers[name], (-slope).masked_fill(~redundant[name], 0.0).sum(1).tolist(), strict=True)
        if gain > 0
    ]
    if not gains:
        return "no single structure stands out"
    total = sum(gain for gain, _, _ in gains)
    worst = sorted(gains, reverse=True)[:NAMED]
    return ", ".join(f"{name} of {layer or 'the whole model'} ({gain / total:.0%})" for gain, name, layer in worst)
