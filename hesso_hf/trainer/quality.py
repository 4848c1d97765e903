"""What a run costs in quality: the loss of the base model and of the smaller one on text that isn't trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..engines.engine import Engine
from .measure import Measurer

logger = logging.get_logger(__name__)


class Quality:
    """Losses on a few examples of each `eval_dataset`, once before training and once at each step that is saved.

    What fails while it is measured is warned of and left out: it must not cost the run. All processes make every call.

    Args:
        trainer: whose data sets are measured on.
        config: of the run, which says on how many examples.
        engine: returns the trainer's engine of now.
        measurer: with the trainer's loss.
        model: returns the model that is trained.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: HessoConfig,
        engine: Callable[[], Engine],
        measurer: Measurer,
        model: Callable[[], PreTrainedModel],
    ) -> None:
        self._trainer, self._config, self._engine, self._measurer = trainer, config, engine, measurer
        self._model = model
        self._found: dict[str, dict[str, Any]] = {}
        self._measured_at: int | None = None

    def begin(self) -> None:
        """Measure the base model, before anything is done to it."""
        self._measure("before")

    def go_on(self, saved: Mapping[str, Any] | None) -> None:
        """Take what a checkpoint's record has of the base model."""
        self._found = copy.deepcopy(dict(saved or {}))

    def end(self) -> None:
        """Measure the trained model with its pruned units at zero, once a step."""
        step = self._trainer.state.global_step
        if step != self._measured_at:
            self._measure("after")
            self._measured_at = step

    def record(self) -> dict[str, Any] | None:
        """Return, by the key that the trainer logs each loss under, on how much it was measured, before and after."""
        return copy.deepcopy(self._found) or None

    def _texts(self) -> Iterator[tuple[str, Any]]:
        data: Any = self._trainer.eval_dataset
        if data is None or not self._config.quality_examples:
            return
        if not isinstance(data, dict):
            yield "eval_loss", data
            return
        yield from ((f"eval_{name}_loss", part) for name, part in data.items())

    def _measure(self, when: str) -> None:
        model, hindrance = self._model(), self._measurer.generates
        if not self._engine().measures_quality:
            hindrance = "DeepSpeed computes in its own steps alone"
        for key, data in self._texts():
            if hindrance:
                logger.warning(f"`{key}` isn't measured {when} training: {hindrance}")
                continue
            try:
                measured = self._measurer.mean_loss(model, data, self._config.quality_examples)
            except Exception as error:  # of a loss that isn't this library's, there is no type for all
                logger.warning(f"`{key}` isn't measured {when} training: {type(error).__name__}: {error}")
                continue
            if not math.isfinite(measured.loss):
                logger.warning(f"`{key}` isn't measured {when} training: it is {measured.loss}")
                continue
            found = {"loss": measured.loss}
            if measured.tokens and model.can_generate():
                found["perplexity"] = math.exp(measured.loss)
            entry = self._found.setdefault(key, {})
            entry |= {"examples": measured.examples, "tokens": measured.tokens, when: found}
