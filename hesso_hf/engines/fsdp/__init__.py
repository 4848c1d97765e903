"""FSDP2: pruning state beside a sharded checkpoint, and the smaller model written from DTensor shards.

In: a trainer's arguments and accelerator, then its run; a folder.
Out: `Fsdp2Engine`, which a trainer asks; small vectors in safetensors, the snapshot through DCP, the exported model.
"""

from typing import TYPE_CHECKING

from ... import hand_on

if TYPE_CHECKING:
    from .engine import Fsdp2Engine
    from .export import export_sharded
    from .state import load_pruning_state, save_pruning_state

__all__ = ["Fsdp2Engine", "export_sharded", "load_pruning_state", "save_pruning_state"]
__getattr__ = hand_on(
    __name__,
    {
        "Fsdp2Engine": "engine",
        "export_sharded": "export",
        "load_pruning_state": "state",
        "save_pruning_state": "state",
    },
)
