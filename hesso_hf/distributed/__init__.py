"""Several processes: which part of a tensor this one holds, and how all of them agree.

In: parameters as DDP, FSDP2 or DeepSpeed hand them out.
Out: `Part` (a parameter's shard and where it lies), whole tensors, sums and decisions that are the same on all ranks.
Nothing here knows what pruning is, and everything here is the identity where there is one process.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .collectives import barrier, is_main_process, on_all, world_size
    from .parts import Part, part_of, whole

__all__ = ["Part", "barrier", "is_main_process", "on_all", "part_of", "whole", "world_size"]
__getattr__ = hand_on(
    __name__,
    {
        "Part": "parts",
        "barrier": "collectives",
        "is_main_process": "collectives",
        "on_all": "collectives",
        "part_of": "parts",
        "whole": "parts",
        "world_size": "collectives",
    },
)
