"""What CRIC corrected where it looks ahead once a period (`cric_mode="healed"`), for the report.

Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .cric_state import corrected_units
from .saliency import PerUnit, on_device


@dataclass
class Corrections:
    """Units that were the lowest as the model was, and those that were once these were gone and healed.

    Attributes:
        first, chosen: of all looks together, bool (L, U) per structure.
        sizes: how many units were on trial for the first time, per look, of the structures that it could judge.
    """

    first: PerUnit = field(default_factory=dict)
    chosen: PerUnit = field(default_factory=dict)
    sizes: list[dict[str, int]] = field(default_factory=list)

    def note(self, first: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor]) -> None:
        """Add a look: the lowest units before it, which were on trial, and those after it.

        What memory allowed to judge but once isn't counted.
        """
        first, chosen = ({n: u for n, u in units.items() if n in first and n in chosen} for units in (first, chosen))
        self.sizes.append({n: int((u & ~self.first[n] if n in self.first else u).sum()) for n, u in first.items()})
        for kept, units in ((self.first, first), (self.chosen, chosen)):
            kept |= {name: kept[name] | each if name in kept else each for name, each in units.items()}

    def to_(self, device: torch.device) -> None:
        """Move the units to another device."""
        self.first, self.chosen = on_device(self.first, device), on_device(self.chosen, device)

    def report(self) -> dict[str, Any] | None:
        """Return what was corrected, of the form of `Cric.report`; None where nothing was looked at."""
        if not self.sizes:
            return None
        structures = {}
        for name, first in self.first.items():
            violating = [sizes.get(name, 0) for sizes in self.sizes]
            structures[name] = corrected_units(first, self.chosen[name], violating, [])
        looks = {"cycles": len(self.sizes), "max_cycles": len(self.sizes), "samples": len(self.sizes)}
        return {"mode": "healed", **looks, "samples_per_cycle": 1, "ended": True, "structures": structures}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors and plain containers only."""
        return {"first": dict(self.first), "chosen": dict(self.chosen), "sizes": [dict(each) for each in self.sizes]}

    @classmethod
    def of(cls, saved: Mapping[str, Any], device: torch.device) -> Corrections:
        """Return what a checkpoint holds."""
        sizes = [dict(each) for each in saved["sizes"]]
        return cls(on_device(saved["first"], device), on_device(saved["chosen"], device), sizes)
