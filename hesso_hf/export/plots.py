"""A picture of CRIC's cycles, drawn from the pruning report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from transformers.utils import logging

from .page.words import named

logger = logging.get_logger(__name__)

_ROLES = {"corrected": ("#1b7837", "first thought redundant, kept"), "replacing": ("#b2182b", "removed instead")}
_CRITERION = "taylor_first_order"  # along the path: the estimated rise of the loss if the unit goes


def has_cycles(cric: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Tell whether units went the way to zero in cycles, which can be drawn; a look in each period has no way."""
    return cric is not None and cric["mode"] != "healed"


def draw_cric(cric: Mapping[str, Any], path: Path) -> bool:
    """Draw the violating sets and the paths of corrected and replacing units; tell whether it could be done.

    Structures that lose no units aren't shown.

    Args:
        cric: what `pruning_report.json` has under `cric`.
        path: the picture, PNG or SVG.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            f"{path.name} isn't drawn: matplotlib isn't installed. `pip install 'hesso_hf[plots]'`, then "
            f"`hesso-hf report FOLDER --plot {path.name}`"
        )
        return False
    structures: Mapping[str, Any] = {name: found for name, found in cric["structures"].items() if found["first"]}
    figure = Figure(figsize=(4.2 * (1 + len(structures)), 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(structures))
    _draw_sets(axes[0], structures)
    for axis, (name, found) in zip(axes[1:], structures.items(), strict=True):
        _draw_paths(axis, name, found)
    steps = "steps" if cric["mode"] == "path" else "points"
    figure.suptitle(f"CRIC: {cric['cycles']} cycles of {cric['samples_per_cycle']} {steps} on the way to zero")
    figure.savefig(path, dpi=110)
    return True


def _draw_sets(axis: Any, structures: Mapping[str, Any]) -> None:
    """Bars: units that went the way to zero for the first time, per cycle, as a multiple of those to be removed."""
    width = 0.8 / len(structures)
    cycles = max(len(found["violating"]) for found in structures.values())
    for index, (name, found) in enumerate(structures.items()):
        heights = [size / max(1, found["first"]) for size in found["violating"]]
        places = [cycle + 1 + (index - (len(structures) - 1) / 2) * width for cycle in range(len(heights))]
        axis.bar(places, heights, width, label=named(name))
    axis.set_xticks(range(1, cycles + 1))
    axis.set_xlabel("cycle")
    axis.set_ylabel("units tried / units to be removed")
    axis.set_title("violating sets", fontsize=10)
    axis.margins(y=0.1 + 0.1 * len(structures))  # room for the legend above the bars
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_paths(axis: Any, name: str, found: Mapping[str, Any]) -> None:
    """Lines: what a unit's criterion says at up to four points of its way, for units that were on trial."""
    paths = found["paths"]
    criteria = [criterion for path in paths for criterion in path["values"]]
    criterion = _CRITERION if _CRITERION in criteria else next(iter(criteria), None)
    for role, (colour, label) in _ROLES.items():
        lines = [path["values"][criterion] for path in paths if path["role"] == role]
        for line in lines:
            axis.plot(_left(len(line)), line, color=colour, alpha=0.25, linewidth=1)
        if lines:
            means = [sum(values) / len(values) for values in zip(*lines, strict=True)]
            axis.plot(_left(len(means)), means, color=colour, linewidth=2.5, label=f"{label} (mean)")
    axis.invert_xaxis()
    axis.set_xlabel("share of the unit that is left")
    axis.set_title(f"{named(name)}: {found['num_corrected']} of {found['first']} corrected", fontsize=10)
    if criterion is None:
        axis.text(0.5, 0.5, "no unit was corrected", ha="center", transform=axis.transAxes)
        return
    axis.set_ylabel("rise of the loss if it goes" if criterion == _CRITERION else criterion.replace("_", " "))
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.margins(y=0.25)
    axis.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _left(parts: int) -> list[float]:
    """Return the middle of each part of the way, from a whole unit to none."""
    return [1 - (part + 0.5) / parts for part in range(parts)]
