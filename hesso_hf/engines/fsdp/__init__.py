"""FSDP2: pruning state beside a sharded checkpoint, and the smaller model written from DTensor shards.

In: a prepared model and a folder.
Out: small vectors in safetensors, the snapshot through DCP, the exported model.
"""

from typing import TYPE_CHECKING

from ... import hand_on

if TYPE_CHECKING:
    from .export import export_sharded
    from .state import load_pruning_state, save_pruning_state

__all__ = ["export_sharded", "load_pruning_state", "save_pruning_state"]
__getattr__ = hand_on(
    __name__, {"export_sharded": "export", "load_pruning_state": "state", "save_pruning_state": "state"}
)
