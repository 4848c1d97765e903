"""When the model in memory becomes the smaller one, in a run and where one goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import from_all
from ..engines.engine import Engine
from ..errors import CheckpointMismatchError, HessoError
from ..export.checkpoint_state import read_state
from ..export.decision import Compaction
from ..pruning.process import PruningProcess
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

    def _why_not(self, base: Optimizer | None, model: nn.Module | None = None) -> str:
        args = self._trainer.args
        if args.auto_find_batch_size:
            return "`auto_find_batch_size` (True) may have training begin again with the larger one"
        if args.n_gpu > 1:
            return "DataParallel copies it to several devices"
        if getattr(args, "use_vllm", False):
            return "`use_vllm` (True): vLLM takes weights of no other shapes than it began with"
        if model is not None and (keepers := [found for found in from_all(self._keeper_of_weights()) if found]):
            return f"{keepers[0]} keeps a copy of its weights, which would stay as large"
        return self._engine().why_not_compact(base, model)

    def _keeper_of_weights(self) -> str:
        """Return which callback has a copy of the model's weights, such as an average of them, "" where none has."""
        parameters = list(self._run.model.parameters())
        own, half = {id(parameter) for parameter in parameters}, sum(map(torch.Tensor.numel, parameters)) / 2
        for callback in self._trainer.callback_handler.callbacks:
            for name, value in getattr(callback, "__dict__", {}).items():
                tensors = [tensor for tensor in _tensors_in(value) if id(tensor) not in own]
                if sum(tensor.numel() for tensor in tensors) > half:
                    return f"{type(callback).__name__} (`{name}`)"
        return ""

    def at_the_end(self) -> None:
        """After a step, when gradients are gone: cut the units, where the step was the last of the last period.

        Where the smaller model isn't the same, or there is no room for it, the run goes on masked, with a warning.
        """
        process, engine, wrapped = self._run.process, self._engine(), self._trainer.model_wrapped
        if self._config.compact == "never" or not (process.finished and process.period_ended):
            return
        if self._stays_whole or process.state.compaction is not None or process.kept_units().all_stay:
            return
        reason = self._why_not(getattr(engine.steps, "base", None), wrapped)
        if not reason:
            try:
                found = engine.compact(self._run, wrapped)
            except (HessoError, torch.OutOfMemoryError) as error:
                logger.warning(f"{_WHOLE}, its pruned units at zero: {error}")
            else:
                logger.info(
                    f"the pruned units are cut out of the model in memory: {found.parameters_before:,} -> "
                    f"{num_parameters(self._run.model):,} parameters, relative error {found.error:.1e}"
                )
                return
        else:
            say = logger.warning if self._config.compact == "end" else logger.info
            say(f"`compact` ({self._config.compact!r}): {_WHOLE}, its pruned units at zero: {reason}")
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
        if smaller and self._trainer.args.auto_find_batch_size:
            raise CheckpointMismatchError(
                f"the model in {folder} is the smaller one already, with which `auto_find_batch_size` (True) can't go "
                "on: resume without it, or export it and fine-tune that"
            )

    def to_resume(self, process: PruningProcess, base: Optimizer | None) -> None:
        """Make the model as small as that of the checkpoint that training goes on from.

        Args:
            base: the optimizer that HESSO is around, where there is one already.
        """
        folder = self._run.resume_from
        if folder is not None and (state := self._smaller_checkpoint()) is not None:
            compaction = Compaction.from_dict(state["training"]["compaction"])
            kept = KeptUnits.from_dict(state["kept_units"])
            self._engine().shrink(self._run.model, process, base, compaction, kept)
            heal_base_(parameters_of(self._run.model), folder)

    def _smaller_checkpoint(self) -> dict[str, Any] | None:
        folder = self._run.resume_from
        state = read_state(folder) if folder is not None else {"training": {}}
        found = state["training"].get("compaction")
        return state if found and num_parameters(self._run.model) == found["parameters_before"] else None


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a module, or of a mapping or sequence of tensors."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
