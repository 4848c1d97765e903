"""`auto_find_batch_size`: a run that ran out of memory begins again with a smaller batch, from where it first began."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from ..engines.engine import Engine
from ..errors import HessoError
from ..pruning.optimizer import HessoOptimizer
from ..pruning.weights.snapshot import Snapshot
from .run import PruningRun

logger = logging.get_logger(__name__)


class Restarts:
    """Gives a run its first state back: weights, optimizer, random state, pruning, and a schedule for the steps of now.

    The stock `Trainer` counts its steps anew and trains on with the weights as they are by then: units that were on
    their way to zero would have gone part of it.

    Args:
        trainer: whose run it is.
        engine: returns the trainer's engine of now.
        run: what is pruned.
    """

    def __init__(self, trainer: Trainer, engine: Callable[[], Engine], run: PruningRun) -> None:
        self._trainer, self._engine, self._run = trainer, engine, run
        self._entered = False
        self._weights: Snapshot | None = None
        self._optimizer: dict[str, Any] = {}
        self._pruning: dict[str, Any] = {}
        self._scheduler: dict[str, Any] | None = None

    def reset(self) -> None:
        """A call of `train`, which may come to its loop several times, is over: keep nothing."""
        self._entered, self._weights, self._run.first_state = False, None, None

    def enter(self) -> None:
        """The loop begins: the first time as it is, then from the first state.

        Raises:
            HessoError: where memory ran out before the first step, of which no batch is the cause.
        """
        if not self._entered:
            self._entered = True
            return
        steps = self._engine().steps
        if self._weights is None or steps is None:
            raise HessoError(
                "`auto_find_batch_size` (True): memory ran out before the first step, while the run was prepared on "
                "single examples: a smaller batch changes nothing; take a smaller model, LoRA, or a device with more"
            )
        assert isinstance(steps, HessoOptimizer), "other engines refuse it"
        logger.warning(
            f"out of memory after step {self._trainer.state.global_step}: training begins again with a smaller batch, "
            "weights and pruning as at the start"
        )
        steps.process.bound.frozen.reveal(False)
        self._weights.restore()
        steps.base.load_state_dict(copy.deepcopy(self._optimizer))
        scheduler: Any = self._trainer.lr_scheduler
        if self._scheduler is not None:  # the user's own, which isn't made anew
            scheduler.load_state_dict(self._scheduler)
        self._trainer.optimizer = steps.base  # to be wrapped again, when the number of steps is known
        self._engine().steps = None
        self._run.first_state = self._pruning

    def prepared(self) -> None:
        """All is ready for the first step: keep the first state, in the host's memory, or have it back whole."""
        trainer, steps = self._trainer, self._engine().steps
        scheduler: Any = trainer.lr_scheduler
        if not trainer.args.auto_find_batch_size:
            return
        assert isinstance(steps, HessoOptimizer), "other engines refuse it"
        if self._weights is not None:
            if self._pruning["step"]:  # of a checkpoint, or of an earlier `train`
                steps.load_pruning_state(copy.deepcopy(self._pruning))
            return
        self._pruning = copy.deepcopy(steps.process.state_dict())
        self._weights = Snapshot(self._run.whole.parameters(), None, on_cpu=True)
        self._optimizer = copy.deepcopy(steps.base.state_dict())
        self._scheduler = None if trainer._created_lr_scheduler else copy.deepcopy(scheduler.state_dict())
