"""Groups bound to parameters: scaling, masking, sums and snapshots of what this process holds.

In: `PruningGroups` and the parameters, whole or in shards, with LoRA's factors where there are any.
Out: `BoundGroups` (one multiplication an axis scales all units), `Snapshot` (weights and optimizer state to return to).
No unit is chosen here.
"""

from typing import TYPE_CHECKING

from ... import hand_on

if TYPE_CHECKING:
    from .bound_groups import BoundGroups
    from .holdings import Held, Holdings
    from .snapshot import Snapshot

__all__ = ["BoundGroups", "Held", "Holdings", "Snapshot"]
__getattr__ = hand_on(
    __name__, {"BoundGroups": "bound_groups", "Held": "holdings", "Holdings": "holdings", "Snapshot": "snapshot"}
)
