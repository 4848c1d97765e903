"""Export: from weights and a decision to a smaller model on disk that stock `from_pretrained` loads.

In: a model or a checkpoint, or what an engine holds of one; `KeptUnits`, `KeptTokens`, a run's account of itself.
Out: config, weights, tokenizer, card, report and plots, compared with the trained model before they replace anything.
It needs neither the optimizer nor the trainer: a saved training state is enough.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .export import export_pruned
    from .publish import staged_folder
    from .report import PruningReport
    from .verify import Verification

__all__ = ["PruningReport", "Verification", "export_pruned", "staged_folder"]
__getattr__ = hand_on(
    __name__,
    {"PruningReport": "report", "Verification": "verify", "export_pruned": "export", "staged_folder": "publish"},
)
