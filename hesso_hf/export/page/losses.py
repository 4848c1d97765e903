"""What a run's pictures show over its steps: its losses, out of what Trainer logs, and the share that is gone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

MOST = 200  # points of a line that are kept: a picture shows no more
_LOSS = re.compile(r"loss|eval_(\w+_)?loss")


@dataclass(frozen=True)
class Losses:
    """Losses over steps.

    Attributes:
        lines: (step, loss) by the key that the loss is logged under.
        skipped: number of losses that aren't finite, which no picture can show.
    """

    lines: dict[str, list[tuple[int, float]]]
    skipped: int

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]]) -> Losses | None:
        """Return the losses of a trainer's `log_history`, None where it has no finite one."""
        entries = [(key, entry["step"], entry[key]) for entry in history for key in entry if _LOSS.fullmatch(key)]
        lines: dict[str, list[tuple[int, float]]] = {}
        for key, step, loss in entries:
            if isfinite(loss):
                lines.setdefault(key, []).append((step, loss))
        skipped = len(entries) - sum(map(len, lines.values()))
        return cls({key: _thinned(line) for key, line in lines.items()}, skipped) if lines else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"lines": {key: [list(point) for point in line] for key, line in self.lines.items()},
                "skipped": self.skipped}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Losses:
        """Read what `to_dict` wrote."""
        return cls({key: [(x, y) for x, y in line] for key, line in values["lines"].items()}, values["skipped"])


def removed_until_the_end(report: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return (step, share of the parameters that is gone from there on), up to the run's last step."""
    found = [(step, share) for step, share in report.get("removed_by_step") or ()]
    return [*found, (report["steps"], found[-1][1])] if found else []


def _thinned(line: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return every so many-th point, and always the last one."""
    return list(line[:: -ceil(len(line) / MOST)])[::-1]
