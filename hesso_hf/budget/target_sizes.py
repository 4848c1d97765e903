"""The decision of the budget: how many units stay, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LITTLE = 0.2  # share of a structure's units: where less stays, the structure is named


@dataclass(frozen=True)
class TargetSizes:
    """The decision of the budget: units kept a layer, the config sizes that follow, and what they cost."""

    kept_units: dict[str, int]
    num_units: dict[str, int]
    sizes: dict[str, int]
    metric: str
    cost_before: float
    cost_after: float
    parameters_before: int
    parameters_after: int

    @property
    def ratio(self) -> float:
        """Share of the metric that is removed."""
        return 1.0 - self.cost_after / self.cost_before

    @property
    def parameter_ratio(self) -> float:
        """Share of the parameters that is removed."""
        return 1.0 - self.parameters_after / self.parameters_before

    @property
    def nearly_gone(self) -> dict[str, float]:
        """The structures of which so little stays that hardly anybody means it, and the share of units that does."""
        left = {name: kept / self.num_units[name] for name, kept in self.kept_units.items()}
        return {name: share for name, share in left.items() if share < LITTLE}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TargetSizes:
        """Read what `to_dict` wrote."""
        return cls(**values)
