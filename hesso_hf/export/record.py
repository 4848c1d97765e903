"""What a training run says of itself: the part of it that the export reads, and all of it for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..vocabulary.tokens import KeptTokens


@dataclass(frozen=True)
class TrainingRecord:
    """A run's own account; empty for a bare export.

    Attributes:
        entries: what goes into the report as it is, plain JSON types.
    """

    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_model(self) -> str:
        """Id or folder of the model that training began with, "" where it isn't known."""
        return self.entries.get("base_model") or ""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of the run's HessoConfig."""
        return self.entries.get("hesso_config") or {}

    @property
    def export_dtype(self) -> str | None:
        """The dtype that the run was to be saved in."""
        return self.config.get("export_dtype")

    @property
    def lora_export(self) -> str:
        """How the run's adapters were to be saved."""
        return self.config.get("lora_export", "merged")

    @property
    def cric(self) -> Mapping[str, Any] | None:
        """What CRIC tried and corrected."""
        return self.entries.get("cric")

    @property
    def distillation(self) -> Mapping[str, Any] | None:
        """The teacher, its weight (`alpha`) and temperature."""
        return self.entries.get("distillation")

    @property
    def vocabulary(self) -> KeptTokens | None:
        """The tokens that stay, where some were removed."""
        found = self.entries.get("vocabulary")
        return KeptTokens.from_dict(found) if found else None

    def shown(self, name: Callable[[str], str]) -> dict[str, Any]:
        """Return the entries with a teacher by the name that others may see."""
        found = dict(self.entries)
        if self.config.get("distill_from"):
            teacher = name(self.config["distill_from"])
            found["hesso_config"] = {**self.config, "distill_from": teacher}
            if self.distillation:
                found["distillation"] = {**self.distillation, "teacher": teacher}
        return found
