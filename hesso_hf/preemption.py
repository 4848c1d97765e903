"""Preemption: when a run of several processes is told to stop, all write their checkpoint after the same step."""

from __future__ import annotations

from typing import Any

from torch.distributed.distributed_c10d import Store, _get_default_store
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from .agreement import world_size

KEY = "hesso_stops_after_step"


class StopTogether(TrainerCallback):
    """Agrees on the step after which `enable_jit_checkpoint` saves: each process has a signal and a clock of its own.

    The first process that is told names a step two ahead. No other can be past it by then, since every step waits for
    the gradients of all.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._manager: CheckpointManager | None = None
        self._store: Store | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place of what sets the request to save."""
        found = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
        if not found or found[0].jit_manager is None or world_size() == 1:
            return
        self._manager, self._store = found[0].jit_manager, _get_default_store()
        self._manager._enable_checkpoint = self._ask  # type: ignore[method-assign]

    def _ask(self) -> None:
        assert self._store is not None
        self._store.compare_set(KEY, "", str(self._trainer.state.global_step + 2))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request the save after the step that was named."""
        if self._store is None or self._manager is None or not self._store.check([KEY]):
            return
        if state.global_step >= int(self._store.get(KEY)):
            self._manager.is_checkpoint_requested = True
