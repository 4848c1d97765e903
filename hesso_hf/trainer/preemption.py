"""Preemption: when a run of several processes is told to stop, all write their checkpoint after the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed import Store
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from ..compat import default_store
from ..distributed.collectives import barrier, world_size

KEY = "hesso_stops_after_step"
EXIT_CODE = 128 + 15  # what a shell says of a process that SIGTERM ended: the work isn't done


class StopTogether(TrainerCallback):
    """Agrees on the step after which `enable_jit_checkpoint` saves: each process has a signal and a clock of its own.

    A process that was told names the next step when it is at the end of one. No other can be past that by then, since
    every step waits for the gradients of all.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._store: Store | None = None
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place of what saves, and among several processes of what sets the request to save."""
        found = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
        if not found or found[0].jit_manager is None:
            return
        manager: CheckpointManager = found[0].jit_manager
        if world_size() == 1:
            plain = manager.execute_jit_checkpoint
            manager.execute_jit_checkpoint = lambda: self._save(plain)  # type: ignore[method-assign]
        else:
            self._store = default_store()
            manager._enable_checkpoint = self._ask  # type: ignore[method-assign]

    def _ask(self) -> None:
        self._told = True  # in a thread of its own, which can't tell how far the step is

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name a step, or save after the one that was named."""
        if self._store is None:
            return
        if self._told:
            self._store.compare_set(KEY, "", str(state.global_step + 1))
        if not self._store.check([KEY]) or state.global_step < int(self._store.get(KEY)):
            return
        control.should_save, control.should_training_stop = False, True
        # Transformers' own way has all processes make and remove one file, which fails where two are at it at once
        self._save(lambda: self._trainer._save_checkpoint(self._trainer.model, trial=None))
        barrier()  # a process that ends early may have the launcher end the one that still writes

    def _save(self, save: Callable[[], None]) -> None:
        save()
        self._trainer.told_to_stop = True
