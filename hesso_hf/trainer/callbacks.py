"""What a run logs, and what it does on the way and when it is told to stop: metrics, smaller models, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed import Store
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from ..compat import default_store
from ..distributed.collectives import barrier, world_size
from ..engines.engine import Steps
from ..pruning.schedule import PHASES
from .progress import HessoProgressCallback, units_pruned

KEY = "hesso_stops_after_step"
EXIT_CODE = 128 + 15  # what a shell says of a process that SIGTERM ended: the work isn't done


def metrics(steps: Steps, parameters: Any) -> dict[str, float]:
    """Return what is logged: phase (0 warm-up, 1 sampling, 2 pruning, 3 recovery), units, ratios, norm."""
    process = steps.process
    found = {"hesso/phase": float(PHASES.index(process.schedule.phase(process.step)))}
    pruned, target = units_pruned(process)
    kept = {}
    for name, count in pruned.items():
        found[f"hesso/pruned_{name}"] = float(count)
        kept[name] = process.groups.structures[name].num_units - count / max(1, process.scales[name].shape[0])
    found |= {"hesso/pruned_units": float(sum(pruned.values())), "hesso/target_units": float(target)}
    found["hesso/pruned_ratio"] = 1 - float(parameters(kept)) / parameters.full
    found["hesso/target_ratio"] = process.target.parameter_ratio
    found["hesso/redundant_norm"] = process.redundant_norm()
    if process.trial is not None:
        found["hesso/cric_cycle"] = float(process.trial.cric.cycles)
        found["hesso/cric_units_on_trial"] = float(process.trial.units_on_trial())
    return found


class OnTheWay(TrainerCallback):
    """Has smaller models saved on the way, and the model in memory become the last one where pruning ends.

    Both are done before the step is logged, evaluated or saved.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With a smaller batch it begins again."""
        self._trainer.hesso_run.ladder.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are gone by now."""
        self._trainer.hesso_run.teaching.check_reached()
        self._trainer.hesso_run.ladder.after_step()
        self._trainer.hesso_run.compacting.at_the_end()


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


# in their order: what is saved on the way and in checkpoints is what was cut before
OWN_CALLBACKS = (HessoProgressCallback, OnTheWay, StopTogether)
