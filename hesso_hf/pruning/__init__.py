"""Pruning: what happens around the step of any torch optimizer (HESSO, CRIC).

In: a model, `HessoConfig`, the number of steps.
Out: `PruningPlan` (groups, target sizes, schedule), `HessoOptimizer`, and in the end `KeptUnits`.
A run goes through the phases of `phases`; all that it has decided is one `PruningState`, which checkpoints hold.
`weights/` binds groups to the parameters, or shards of them, that this process holds.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .basis import turn_stream
    from .compaction import compact
    from .healing import Healer
    from .optimizer import HessoOptimizer
    from .plan import PruningPlan, wrap_optimizer
    from .process import PruningProcess
    from .schedule import Schedule
    from .state import PruningState

__all__ = [
    "Healer",
    "HessoOptimizer",
    "PruningPlan",
    "PruningProcess",
    "PruningState",
    "Schedule",
    "compact",
    "turn_stream",
    "wrap_optimizer",
]
__getattr__ = hand_on(
    __name__,
    {
        "turn_stream": "basis",
        "compact": "compaction",
        "Healer": "healing",
        "HessoOptimizer": "optimizer",
        "PruningPlan": "plan",
        "PruningProcess": "process",
        "PruningState": "state",
        "Schedule": "schedule",
        "wrap_optimizer": "plan",
    },
)
