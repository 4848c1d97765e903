"""Memory: what training a model takes on each GPU, by engine, and how long, before it is tried.

In: a model's config, a `Workload`, a `Cluster`, a `TokenPace`.
Out: bytes of one GPU by what they are for, and the simplest engine that fits (`MemoryPlan`).
"""

from typing import TYPE_CHECKING

from ... import hand_on

if TYPE_CHECKING:
    from .plan import MemoryPlan, plan_memory
    from .workload import Cluster, TokenPace, Workload

__all__ = ["Cluster", "MemoryPlan", "TokenPace", "Workload", "plan_memory"]
__getattr__ = hand_on(
    __name__,
    {
        "Cluster": "workload",
        "MemoryPlan": "plan",
        "TokenPace": "workload",
        "Workload": "workload",
        "plan_memory": "plan",
    },
)
