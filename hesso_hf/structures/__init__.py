"""Structures: what can be removed from a model, index by index, and the removal itself.

In: a config and its class.
Out: `AxisMap` (which dimensions a config size determines), `PruningGroups` (which indices belong to a unit, proved on a
tiny model in `proof/`), `KeptUnits` (a decision), and the cut that turns weights and config into the smaller ones.
No score, no schedule and no optimizer is known here.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .cut import cut_model
    from .groups import KeptUnits, PruningGroups
    from .layout import Layout
    from .shape_probe import AxisMap

__all__ = ["AxisMap", "KeptUnits", "Layout", "PruningGroups", "cut_model"]
__getattr__ = hand_on(
    __name__,
    {
        "AxisMap": "shape_probe", "KeptUnits": "groups", "Layout": "layout", "PruningGroups": "groups",
        "cut_model": "cut",
    },
)  # fmt: skip
