"""What a run costs in quality: the loss of the base model and of the smaller one on text that isn't trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import from_all
from ..distributed.passes import in_eval
from ..engines.engine import Engine
from ..pruning.weights.snapshot import kept_random_state
from .divergence import IGNORED
from .measure import Measurer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MeanLoss:
    """A loss: the mean over the tokens of some examples, or over the examples where `tokens` is 0."""

    loss: float
    examples: int
    tokens: int


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
        self._measured: tuple[TrainerState, int] | None = None

    def begin(self) -> None:
        """Measure the base model, before anything is done to it."""
        self._measure("before")

    def go_on(self, saved: Mapping[str, Any] | None) -> None:
        """Take what a checkpoint's record has of the base model."""
        self._found = {key: {part: value for part, value in copy.deepcopy(dict(found)).items() if part != "after"}
                       for key, found in (saved or {}).items()}  # fmt: skip

    def end(self) -> None:
        """Measure the trained model with its pruned units at zero, once a step."""
        state = self._trainer.state  # each call of `train` has one of its own
        if self._measured is None or self._measured[0] is not state or self._measured[1] != state.global_step:
            self._measure("after")
            self._measured = state, state.global_step

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Measure the trained model for what is saved meanwhile, which isn't what comes out of the run."""
        before = copy.deepcopy(self._found), self._measured
        try:
            self.end()
            yield
        finally:
            self._found, self._measured = before

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
            self._found.get(key, {}).pop(when, None)
            if hindrance:
                logger.warning(f"`{key}` isn't measured {when} training: {hindrance}")
                continue
            measured, reason = MeanLoss(math.nan, 0, 0), ""
            try:
                measured = _loss_per_token(self._trainer, self._measurer, model, data, self._config.quality_examples)
                reason = "" if math.isfinite(measured.loss) else f"it is {measured.loss}"
            except Exception as error:  # of a loss that isn't this library's, there is no type for all
                reason = f"{type(error).__name__}: {error}"
            if reason := next(filter(None, from_all(reason)), ""):  # on all processes, where it fails on one
                logger.warning(f"`{key}` isn't measured {when} training: {reason}")
                continue
            found = {"loss": measured.loss}
            if measured.tokens and model.can_generate():
                found["perplexity"] = math.exp(measured.loss)
            entry = self._found.setdefault(key, {})
            entry |= {"examples": measured.examples, "tokens": measured.tokens, when: found}


@torch.no_grad()
def _loss_per_token(trainer: Trainer, measurer: Measurer, model: PreTrainedModel, dataset: Any, count: int) -> MeanLoss:
    """Measure a model as the trainer evaluates it, on examples spread over a data set."""
    total, weight, tokens, examples = 0.0, 0, 0, 0
    with in_eval(model), kept_random_state(trainer.args.device), trainer.accelerator.autocast():
        for example in measurer.singles.of(dataset, count):
            batch = trainer._prepare_inputs(example)
            predicted = _tokens_predicted(model, batch)
            if predicted == 0:
                continue
            share = 1 if predicted is None else predicted
            total += share * float(measurer.loss(model, batch))
            weight, tokens, examples = weight + share, tokens + (predicted or 0), examples + 1
    return MeanLoss(total / weight if weight else math.nan, examples, tokens)


def _tokens_predicted(model: PreTrainedModel, example: Any) -> int | None:
    """Return how many tokens' losses the mean of an example is of, None where its labels aren't one a token."""
    labels = example.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return int((labels[:, 0 if model.config.is_encoder_decoder else 1 :] != IGNORED).sum())
