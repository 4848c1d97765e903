"""How fast models read and write: medians of runs that alternate between the models, so that noise meets all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.utils.benchmark import timer

from ..hf_models.tiny_model import inputs_of, reads_single_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATS = 7


def tokens_per_second(
    models: Sequence[PreTrainedModel], batch_size: int = 8, length: int = 256, repeats: int = REPEATS
) -> list[float]:
    """Return each model's forward throughput (tokens per second) over a batch of sequences."""
    works = [partial(_read, model.eval(), _ids(model, batch_size, length)) for model in models]
    return [batch_size * length / seconds for seconds in median_seconds(works, repeats)]


def first_token_seconds(
    models: Sequence[PreTrainedModel], length: int, repeats: int = REPEATS, cache: str | None = None
) -> list[float]:
    """Return how long each model takes to read a prompt and to write the first token (seconds), at batch 1.

    Args:
        cache: as `generate` takes it (`cache_implementation`); with "static" it compiles the model where that pays.
    """
    works = [partial(_write, model.eval(), _ids(model, 1, length), 1, cache) for model in models]
    return median_seconds(works, repeats)


def tokens_written_per_second(
    models: Sequence[PreTrainedModel],
    batch_size: int,
    length: int,
    new_tokens: int,
    repeats: int = REPEATS,
    cache: str | None = None,
) -> list[float]:
    """Return how many tokens per second each model writes after the first one, in all sequences of a batch together.

    It is `generate`'s greedy search, whose time for the prompt and one token is taken off; where noise is
    longer than what is left, the number is infinite.

    Args:
        length: tokens of the prompts.
        new_tokens: tokens that are written to each after the first.
        cache: as in `first_token_seconds`.
    """
    works = []
    for model in models:
        prompts = _ids(model.eval(), batch_size, length)
        works += [partial(_write, model, prompts, count, cache) for count in (1, 1 + new_tokens)]
    seconds = median_seconds(works, repeats)
    spent = [many - one for one, many in zip(seconds[::2], seconds[1::2], strict=True)]
    return [batch_size * new_tokens / time if time > 0 else math.inf for time in spent]


def median_seconds(works: Sequence[Callable[[], object]], repeats: int = REPEATS) -> list[float]:
    """Return the median time (seconds) of each piece of work, done in turns; the first round warms up."""
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for times, work in zip(seconds, works, strict=True):
            started = timer()  # waits for the device
            work()
            elapsed = timer() - started
            if repeat:
                times.append(elapsed)
    return [median(times) for times in seconds]


def _ids(model: PreTrainedModel, batch_size: int, length: int) -> torch.Tensor:
    """Return random token ids, shape (batch_size, length)."""
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch_size, length), device=model.device)


@torch.no_grad()
def _read(model: PreTrainedModel, ids: torch.Tensor) -> None:
    for rows in ids.split(1) if reads_single_rows(model) else (ids,):
        model(**inputs_of(model, rows))


@torch.no_grad()
def _write(model: PreTrainedModel, prompts: torch.Tensor, count: int, cache: str | None = None) -> torch.Tensor:
    """Return the prompts with so many tokens written to each, whatever ends a text."""
    return model.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, num_beams=1,
        min_new_tokens=count, max_new_tokens=count, pad_token_id=0, cache_implementation=cache,
    )  # fmt: skip
