"""Whether a teacher knows the user's data: its loss on them is about the entropy of what it predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..hf_models.tiny_model import attention_in_fp32
from .divergence import IGNORED, surprise
from .measure import Measurer
from .rows import tokens_of
from .teacher import Teacher

KNOWN = 0.1  # nats per token: so little above what it expects is a teacher's loss on text that it knows
KNOWN_TOKENS = 4096  # of the user's data, on which that is measured
MOST_READ = 16  # times as many, where few of them are learnt
NO_LABELS = "{}'s batches have no label for every token"


@dataclass(frozen=True)
class Knowledge:
    """What was found out.

    Attributes:
        surprise: by how many nats per token the teacher's loss lies above what it expects, None where that can't be
            told.
        hindrance: why not.
    """

    surprise: float | None = None
    hindrance: str = ""

    @property
    def is_known(self) -> bool:
        """Whether the teacher knows the data."""
        return self.surprise is not None and self.surprise <= KNOWN


def knowledge_of(trainer: Trainer, teacher: Teacher, measurer: Measurer) -> Knowledge:
    """Find out whether a teacher knows the data of a trainer; all processes call it."""
    examples = [batch for batch in _examples(measurer) if _has_label_for_each(batch)]
    if not examples:
        return Knowledge(hindrance=NO_LABELS.format(type(trainer).__name__))
    if not any(map(_num_labels, examples)):
        return Knowledge(hindrance=f"in {len(examples)} examples no token has a label")
    with attention_in_fp32(teacher.model):  # there is no autocast here
        return Knowledge(surprise(teacher, ((batch, targets_of(trainer, batch)) for batch in examples)))


def targets_of(trainer: Trainer, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return for each position (B, T) of a batch the token to be predicted there, or -100."""
    labels = labels_of(batch)
    if isinstance(batch.get("shift_labels"), torch.Tensor) or not trainer._loss_shifts_labels:
        return labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def labels_of(batch: Mapping[str, Any]) -> Any:
    """Return a batch's labels, shifted ones where it has them."""
    shifted = batch.get("shift_labels")
    return shifted if isinstance(shifted, torch.Tensor) else batch.get("labels")


def _examples(measurer: Measurer) -> list[Any]:
    """Take examples; more of them where few of their tokens are learnt."""
    found = measurer.tokens(KNOWN_TOKENS)
    read = sum(map(tokens_of, found))
    learnt = sum(_num_labels(batch) for batch in found if _has_label_for_each(batch))
    times = min(KNOWN_TOKENS / 4 / max(1, learnt), MOST_READ * KNOWN_TOKENS / max(1, read))
    return measurer.examples(math.ceil(times * len(found))) if times > 1 else found


def _num_labels(batch: Mapping[str, Any]) -> int:
    return int((labels_of(batch) != IGNORED).sum())


def _has_label_for_each(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has a label for every token that the model reads, by its shapes."""
    ids, labels = batch.get("input_ids"), labels_of(batch)
    return isinstance(ids, torch.Tensor) and isinstance(labels, torch.Tensor) and ids.shape == labels.shape
