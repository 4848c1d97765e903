"""Whether a trainer's steps and losses come by where teachers are mixed into them: a subclass' own ones may not."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..errors import HessoError
from .distillation import Distillation

logger = logging.get_logger(__name__)


@dataclass
class Reached:
    """Counts what came by, until it is looked at after the first step.

    Attributes:
        steps, losses: that came by; `losses` in training mode.
        checked: whether it was looked at.
    """

    trainer: Trainer
    config: HessoConfig
    steps: int = 0
    losses: int = 0
    checked: bool = False

    def passed_by(self, replays: bool, teacher: Distillation | None) -> tuple[bool, bool]:
        """Tell whether replay and the teacher are passed by, which is warned of.

        Args:
            replays: whether there is replay.

        Raises:
            HessoError: where what is passed by was asked for.
        """
        mixes = bool(self.losses and self.steps)
        taught = teacher is None or mixes or bool(self.losses and not teacher.auto)
        no_replay, no_teacher = replays and not mixes, not taught
        if self.checked or not (no_replay or no_teacher):
            self.checked = True
            return False, False
        name, config = "compute_loss" if self.steps else "training_step", self.config
        owner = next(kind.__name__ for kind in type(self.trainer).__mro__ if name in vars(kind))
        reason = f"{owner}.{name} doesn't call HessoTrainer's (`super().{name}(...)`), so nothing is learnt from"
        if no_replay and config.replay_share != "auto":
            raise HessoError(f"`replay_share` ({config.replay_share}): {reason} replay; call it, or set 0")
        if no_teacher and (config.distill_from is not None or config.distillation_alpha != "auto"):
            raise HessoError(
                f"`distillation_alpha` ({config.distillation_alpha!r}): {reason} the teacher; call it, or leave "
                "distillation out"
            )
        logger.warning(f"{reason} the base model: replay and distillation are off")
        self.checked = True
        return no_replay, no_teacher
