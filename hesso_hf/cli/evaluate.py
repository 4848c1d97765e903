"""Measuring a model: held-out loss, speed and size on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.benchmark import timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Any, batch_size: int = 8) -> float:
    """Return the mean negative log-likelihood in nats a predicted token over blocks of `input_ids`."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    ids = blocks["input_ids"]
    for start in range(0, len(ids), batch_size):
        batch = torch.tensor(ids[start : start + batch_size], device=model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total, tokens = total + float(losses), tokens + batch[:, 1:].numel()
    model.train(was_training)
    return total / tokens


def perplexity(loss: float) -> float:
    """Return exp(loss)."""
    return math.exp(loss)


@torch.no_grad()
def tokens_per_second(
    models: Sequence[PreTrainedModel], batch_size: int = 8, length: int = 256, repeats: int = 7
) -> list[float]:
    """Return each model's forward throughput (tokens a second), medians of runs that alternate between the models."""
    seconds: list[list[float]] = [[] for _ in models]
    batches = []
    for model in models:
        model.eval()
        vocabulary = model.config.get_text_config().vocab_size
        batches.append(torch.randint(0, vocabulary, (batch_size, length), device=model.device))
    for repeat in range(repeats + 1):
        for index, model in enumerate(models):
            started = timer()  # waits for the device
            model(input_ids=batches[index], use_cache=False)
            elapsed = timer() - started
            if repeat:  # the first round warms up
                seconds[index].append(elapsed)
    return [batch_size * length / median(times) for times in seconds]


def weights_bytes(folder: str | Path) -> int:
    """Return the size of a folder's safetensors files (bytes)."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
