"""When the model in memory becomes the smaller one, in a run and where one goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..engines.engine import Engine
from ..errors import CheckpointMismatchError, HessoError
from ..export.checkpoint_state import read_state
from ..export.decision import Compaction
from ..pruning.compaction import compact, compact_as, parallel_of, why_not_compact, why_not_refit_parallel
from ..pruning.optimizer import HessoOptimizer
from ..structures.groups import KeptUnits
from ..structures.lora import num_parameters, parameters_of
from ..structures.turned_base import heal_base_

if TYPE_CHECKING:
    from .run import PruningRun

logger = logging.get_logger(__name__)

_WHOLE = "the model in memory stays whole"


class Compacting:
    """Cuts the pruned units out of the model that a trainer trains.

    Args:
        trainer: whose model it is.
        config: of the run.
        engine: returns the trainer's engine of now.
        run: what is pruned.
    """

    def __init__(self, trainer: Trainer, config: HessoConfig, engine: Callable[[], Engine], run: PruningRun) -> None:
        self._trainer, self._config, self._engine, self._run = trainer, config, engine, run
        self._stays_whole = False

    def check(self, base: Optimizer | None = None) -> None:
        """Refuse what stands against it where it is asked for.

        Args:
            base: the trainer's own optimizer, where there is one already.

        Raises:
            HessoError: with the reason.
        """
        if self._config.compact == "end" and (reason := self._why_not(base)):
            raise HessoError(f"`compact` ('end'): {_WHOLE}: {reason}; use 'auto' or 'never'")

    def _why_not(self, base: Optimizer | None) -> str:
        args, compiled = self._trainer.args, self._trainer.accelerator.state.dynamo_plugin
        if not self._engine().keeps_whole:
            return "FSDP and DeepSpeed divide it over the processes"
        if args.auto_find_batch_size:
            return "`auto_find_batch_size` (True) may have training begin again with the larger one"
        if args.n_gpu > 1:
            return "DataParallel copies it to several devices"
        if compiled.use_regional_compilation:
            return "regional compilation trains a copy of it"
        return why_not_compact(self._run.whole, base, self._config.layer_widths)

    def at_the_end(self) -> None:
        """After a step, when gradients are gone: cut the units, where the step was the last of the last period.

        Where the smaller model isn't the same, or there is no room for it, the run goes on masked, with a warning.
        """
        process, optimizer, wrapped = self._run.process, self._engine().steps, self._trainer.model_wrapped
        if self._config.compact == "never" or not (process.finished and process.period_ended):
            return
        if self._stays_whole or process.state.compaction is not None or process.kept_units().all_stay:
            return
        reason = self._why_not(getattr(optimizer, "base", None)) or why_not_refit_parallel(wrapped)
        if not reason:
            assert isinstance(optimizer, HessoOptimizer)
            try:
                found = compact(parallel_of(wrapped) or self._run.whole, optimizer)
            except (HessoError, torch.OutOfMemoryError) as error:
                logger.warning(f"{_WHOLE}, its pruned units at zero: {error}")
            else:
                logger.info(
                    f"the pruned units are cut out of the model in memory: {found.parameters_before:,} -> "
                    f"{num_parameters(self._run.model):,} parameters, relative error {found.error:.1e}"
                )
                return
        else:
            logger.info(f"`compact` ({self._config.compact!r}): {_WHOLE}, its pruned units at zero: {reason}")
        self._stays_whole = True  # as its checkpoints say

    @property
    def is_due(self) -> bool:
        """Whether the model is still larger than that of the checkpoint that training goes on from."""
        return self._smaller_checkpoint() is not None

    def check_resumable(self, state: Mapping[str, Any], folder: str) -> None:
        """Refuse a checkpoint of the smaller model where training can't go on from one.

        Args:
            state: what is recorded in it.

        Raises:
            CheckpointMismatchError: naming the checkpoint and the remedy.
        """
        smaller = state["training"].get("compaction") is not None
        if smaller and (not self._engine().keeps_whole or self._trainer.args.auto_find_batch_size):
            raise CheckpointMismatchError(
                f"the model in {folder} is the smaller one already, with which neither FSDP, DeepSpeed nor "
                "`auto_find_batch_size` can go on: resume without them, or export it and fine-tune that"
            )

    def to_resume(self, optimizer: HessoOptimizer) -> None:
        """Make the model as small as that of the checkpoint that training goes on from."""
        folder = self._run.resume_from
        if folder is not None and (state := self._smaller_checkpoint()) is not None:
            compaction = Compaction.from_dict(state["training"]["compaction"])
            compact_as(self._run.model, optimizer, compaction, KeptUnits.from_dict(state["kept_units"]))
            heal_base_(parameters_of(self._run.model), folder)

    def _smaller_checkpoint(self) -> dict[str, Any] | None:
        folder = self._run.resume_from
        state = read_state(folder) if folder is not None else {"training": {}}
        found = state["training"].get("compaction")
        return state if found and num_parameters(self._run.model) == found["parameters_before"] else None
