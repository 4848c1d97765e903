"""Budget: what a model of some sizes costs, and which sizes meet a budget at the least loss.

In: `PruningGroups`, a ratio or sizes, and what removing units of a structure costs in loss.
Out: `TargetSizes`, tried by constructing the config, or an error that names the nearest feasible ones.
Parameters, FLOPs, memory and measured latency are counted here and nowhere else.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .cost import Cost
    from .inspect import inspect_model
    from .latency import build_latency
    from .solver import solve_budget
    from .target_sizes import TargetSizes

__all__ = ["Cost", "TargetSizes", "build_latency", "inspect_model", "solve_budget"]
__getattr__ = hand_on(
    __name__,
    {
        "Cost": "cost",
        "TargetSizes": "target_sizes",
        "build_latency": "latency",
        "inspect_model": "inspect",
        "solve_budget": "solver",
    },
)
