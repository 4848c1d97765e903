"""Distillation: beside its own loss the student learns a teacher's next-token distributions, by default the unpruned
model's.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..config.names import AUTO_DISTILLATION_ALPHA
from ..distributed.collectives import mean_over_ranks
from ..errors import CheckpointMismatchError, HessoError
from .divergence import divergence, lead, num_targets
from .knowledge import NO_LABELS, knowledge_of, labels_of, targets_of
from .measure import Measurer
from .teacher import TARGETS, Teacher

logger = logging.get_logger(__name__)

TIE = 1e-3  # nats per token by which a teacher may be behind: before pruning both are the same model but for rounding
STEPS_A_COMPARISON = 10  # for which it holds, with `distillation_alpha="auto"`


@contextlib.contextmanager
def _recorded_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the logits that forwards of the model return meanwhile, with gradients where these are on."""
    found: list[torch.Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else None
        if logits is not None and (logits.requires_grad or not torch.is_grad_enabled()):
            found.append(logits)

    with model.register_forward_hook(record):
        yield found


class StepMean:
    """What micro-batches add up, by the optimizer steps since it was last asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sum: torch.Tensor | None = None
        self._since = 0

    def add(self, value: torch.Tensor) -> None:
        """Count a micro-batch's share of its step."""
        if self._sum is None:
            self._sum, self._since = torch.zeros_like(value), self._trainer.state.global_step
        self._sum += value

    def mean(self) -> float:
        """Return the mean over steps and processes, NaN where nothing was added; begin anew."""
        if self._sum is None:
            return float("nan")
        value = self._sum / max(1, self._trainer.state.global_step - self._since)
        self._sum = None
        return mean_over_ranks(value, value.device)


def accumulated(trainer: Trainer) -> int:
    """Return how many micro-batches the present step has; before training as many as are asked for."""
    return trainer.current_gradient_accumulation_steps


def is_scaled(trainer: Trainer, num_items: torch.Tensor | int | None) -> bool:
    """Return whether a trainer's loss of a micro-batch is its share of the accumulated batch already."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and num_items is not None)


def check_labels(trainer: Trainer, config: HessoConfig, measurer: Measurer) -> None:
    """Refuse distillation where batches have no labels, as far as that can be seen before training.

    Raises:
        HessoError: naming the trainer and what its batches have.
    """
    if measurer.generates:
        raise HessoError(
            f"`distillation_alpha` ({config.distillation_alpha}) needs `labels`: {measurer.generates}; set it to 0"
        )
    if trainer.train_dataset is not None and type(trainer).get_train_dataloader is Trainer.get_train_dataloader:
        for batch in measurer.examples(1):
            _check_batch(trainer, config, batch)


def _check_batch(trainer: Trainer, config: HessoConfig, batch: Mapping[str, Any]) -> None:
    if not any(isinstance(batch.get(name), torch.Tensor) for name in ("labels", "shift_labels")):
        raise HessoError(
            f"`distillation_alpha` ({config.distillation_alpha}) needs `labels` in the batches to know which tokens "
            f"are learnt; {type(trainer).__name__}'s have {sorted(batch)}; leave distillation out"
        )


def _say_without(reason: str) -> None:
    logger.warning(f"no distillation: {reason}; `distillation_alpha=0` says that this is meant")


class Distillation:
    """The teacher of a run, the loss that it adds to the trainer's own, and what that was lately.

    With `distillation_alpha="auto"` a teacher that doesn't know the user's data isn't learnt from (`knows`): it would
    hold the student back. One that does is compared with the student on the first micro-batch of every tenth step, and
    learnt from until the next comparison where it wasn't behind. So the base model teaches from the first step on.

    Args:
        trainer: whose loss it is.
        config: of the run.
        teacher: in its place.

    Attributes:
        auto: whether it is learnt from only while it isn't behind.
        own_forward: whether the trainer's loss computes no logits, so that they take a second forward.
    """

    def __init__(self, trainer: Trainer, config: HessoConfig, teacher: Teacher) -> None:
        self._trainer, self._config, self.teacher, self.own_forward = trainer, config, teacher, False
        self.auto = config.distillation_alpha == "auto"
        self._alpha = AUTO_DISTILLATION_ALPHA if self.auto else float(config.distillation_alpha or 0.0)
        self._ahead, self._compared, self._impossible = not self.auto, -1, False
        self._surprise: float | None = None
        self._learnt = False  # whether anything was, so far
        self._added: torch.Tensor | None = None  # what the last micro-batch's loss has of the teacher
        self._last: torch.Tensor | None = None  # its divergence
        self._scaled = True  # whether these are shares of an accumulated batch already
        self._noted = StepMean(trainer)

    def knows(self, measurer: Measurer) -> bool:
        """Find out whether the base model knows the user's data, where that decides and can be found out.

        A teacher that was named needn't. All processes call it.
        """
        if not self.auto or self._config.distill_from is not None or measurer.why_none():
            return True
        found = knowledge_of(self._trainer, self.teacher, measurer)
        if found.hindrance:
            _say_without(found.hindrance)
        self._surprise = found.surprise
        return found.is_known

    @property
    def impossible(self) -> bool:
        """Whether it turned out that the trainer's losses leave nothing to compare."""
        return self._impossible

    # -- the loss -------------------------------------------------------------------------------------------------

    def loss(
        self,
        plain: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items: torch.Tensor | int | None,
    ) -> Any:
        """Return the trainer's loss mixed with the divergence from the teacher.

        Args:
            plain: the trainer's own `compute_loss`.
        """
        self._added = None
        compares = self._compares()
        if not (self._ahead or compares):
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        batch = dict(inputs)  # the trainer may take labels out
        if not self.auto:
            _check_batch(self._trainer, self._config, batch)
        with _recorded_logits(model) as recorded:
            result: Any = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        loss, outputs = result if return_outputs else (result, None)
        if self.auto and (reason := self._hindrance(batch, recorded)):
            _say_without(reason)
            self._ahead, self._impossible = False, True
            return result
        targets = self._targets(batch)
        logits = recorded[-1] if recorded else self._second_forward(model, batch)
        self._check_shapes(logits, targets)
        if compares:
            self._ahead = lead(self.teacher, batch, logits, targets) > -TIE
            if not self._ahead:
                return result
        summed = divergence(self.teacher, batch, logits, targets, self._config.distillation_temperature)
        self._scaled, divisor = self._normalisation(targets, num_items)
        term = summed / divisor
        mixed, self._learnt = (1 - self._alpha) * loss + self._alpha * term, True
        self._added, self._last = (mixed.detach() - loss.detach()).mean(), term.detach()
        return (mixed, outputs) if return_outputs else mixed

    def _compares(self) -> bool:
        """Return whether teacher and student are to be compared now; count that as done."""
        step = self._trainer.state.global_step
        if not self.auto or self._impossible or step == self._compared or step % STEPS_A_COMPARISON:
            return False
        self._compared = step
        return True

    def _hindrance(self, batch: Mapping[str, Any], recorded: list[torch.Tensor]) -> str:
        """Return what stands against learning from a teacher that nobody asked for, "" where nothing does."""
        name, labels = type(self._trainer).__name__, labels_of(batch)
        if isinstance(labels, torch.Tensor) and labels.dim() < 2:
            return NO_LABELS.format(name)
        if not recorded:
            return f"{name}'s loss computes no logits, and a second forward and backward in every step is dear"
        try:
            self._check_shapes(recorded[-1], self._targets(batch))
        except HessoError:
            return NO_LABELS.format(name)
        return ""

    def _targets(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return for each position (B, T) the token to be predicted there, or -100."""
        _check_batch(self._trainer, self._config, batch)
        return targets_of(self._trainer, batch)

    def _check_shapes(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if logits.shape[:-1] != targets.shape:
            raise HessoError(
                f"`distillation_alpha` ({self._config.distillation_alpha}) needs a language model with a label at "
                f"every position; labels have the shape {tuple(targets.shape)}, logits {tuple(logits.shape)}"
            )

    def _second_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        if not self.own_forward:
            self.own_forward = True
            logger.warning(
                f"{type(self._trainer).__name__}'s loss computes no logits to compare with the teacher's: distillation "
                "takes a second forward and backward of the model in every step"
            )
        return model(**{name: value for name, value in batch.items() if name not in TARGETS}).logits

    def _normalisation(self, targets: torch.Tensor, num_items: torch.Tensor | int | None) -> tuple[bool, Any]:
        """Return whether losses are scaled for gradient accumulation already, and what the sum is divided by.

        As the trainer does it with its own loss: by the tokens of all micro-batches and processes, or by this one's.
        """
        trainer = self._trainer
        scaled = is_scaled(trainer, num_items)
        if num_items is None or not scaled:
            return scaled, num_targets(targets)
        args = trainer.args
        processes = trainer.accelerator.num_processes // trainer.get_tp_size() if args.n_gpu <= 1 else args.n_gpu
        return scaled, num_items / (processes if args.average_tokens_across_devices else 1)

    # -- what it was lately ---------------------------------------------------------------------------------------

    def note(self) -> None:
        """Count the last micro-batch's divergence for the log."""
        if self._added is not None and self._last is not None:
            self._noted.add(self._last / (1 if self._scaled else accumulated(self._trainer)))

    def without(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the last micro-batch's loss without the teacher, as the trainer would have counted it."""
        if self._added is None:
            return loss
        return loss - self._added / (1 if self._scaled else accumulated(self._trainer))

    def mean(self) -> float:
        """Return the mean divergence a step since the last call; NaN where there was none."""
        return self._noted.mean()

    def go_on(self, saved: Mapping[str, Any] | None, folder: str) -> None:
        """Compare with the teacher that a checkpoint was trained with, and learn from it as there.

        Raises:
            CheckpointMismatchError: where it was another one.
        """
        if saved is None or saved["fingerprint"] != self.teacher.fingerprint:
            raise CheckpointMismatchError(
                f"{folder} was trained with another teacher than {self.teacher.source}, as it is now. Where "
                "`distill_from` is None, the teacher is the model that the trainer is made with: make it with the "
                "original model, the checkpoint's weights are loaded on resuming"
            )
        self._ahead, self._surprise = saved.get("ahead", True), saved.get("surprise")
        self._learnt = saved.get("learnt", True)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint and the report say about the teacher."""
        return {
            "alpha": self._alpha,
            "auto": self.auto,
            "ahead": self._ahead,
            "surprise": self._surprise,
            "learnt": self._learnt,
            "temperature": self._config.distillation_temperature,
            "teacher": self.teacher.source,
            "dtype": str(self.teacher.model.dtype).removeprefix("torch."),
            "fingerprint": self.teacher.fingerprint,
        }
