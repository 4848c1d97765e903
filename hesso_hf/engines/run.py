"""What an engine asks of the run that it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..pruning.plan import PruningPlan
from ..pruning.process import PruningProcess
from ..pruning.schedule import Schedule


class Quality(Protocol):
    """What base model and smaller one are compared by."""

    def begin(self) -> None:
        """Measure the base model, before anything is done to it."""


class Compacting(Protocol):
    """When the model in memory becomes the smaller one."""

    def check(self, base: Optimizer | None = None) -> None:
        """Refuse what stands against it where it is asked for."""

    @property
    def is_due(self) -> bool:
        """Whether the model is still larger than that of the checkpoint that training goes on from."""

    def to_resume(self, process: PruningProcess, base: Optimizer | None) -> None:
        """Make the model as small as that of the checkpoint that training goes on from."""


class Run(Protocol):
    """What an engine asks of the run that it serves."""

    plan: PruningPlan
    resume_from: Path | None

    @property
    def quality(self) -> Quality:
        """What base model and smaller one are compared by."""

    @property
    def compacting(self) -> Compacting:
        """When the model in memory becomes the smaller one."""

    @property
    def whole(self) -> nn.Module:
        """What the trainer was given: the model, or a PeftModel around it."""

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that is trained, adapters in place."""

    @property
    def tokenizer(self) -> Any:
        """What is saved with a model, None where there is nothing."""

    def new_process(self) -> PruningProcess:
        """Fix sizes and schedule, and make the pruning state."""

    def settle(self) -> None:
        """Choose the basis and measure the split between structures, as the engine has the model compute."""

    def process_on(self, schedule: Schedule) -> PruningProcess:
        """Make the pruning state of a run that begins, on the parameters that the model has now."""

    def noted_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Count a micro-batch's loss, and return the one to watch for a collapse."""

    def record(self) -> dict[str, Any]:
        """Return what checkpoints and the report say of the run."""
