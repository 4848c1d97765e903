"""Single examples of a trainer's data sets, each as a batch of its collator: what is measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.utils import logging

from ..distributed.collectives import from_main, is_main_process, on_all
from ..errors import first_line
from .peeked import PeekedStream

logger = logging.get_logger(__name__)


class _NeedsOthersError(Exception):
    """A collator fails with one row."""


class SingleExamples:
    """Takes examples, spread over a data set by index, of a stream the first ones, which aren't read twice.

    Args:
        trainer: whose collator makes them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._first: list[tuple[Any, int, list[Any]]] = []  # streams, how many rows were asked for, and these
        self._at_once = 1  # rows of an example

    def of(self, dataset: Any, count: int, between: bool = False) -> list[Any]:
        """Return examples; a stream's are the main process' on all processes, which all call this.

        Those without a token are left out, or of a data set by index the next one is taken. A collator that fails with
        one row is given as many as training gives it.

        Args:
            between: take those that lie between, as far as there are others.
        """
        trainer = self._trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration")
        if self._at_once == 1:
            try:
                return list(self._singles(collate, dataset, count, between))
            except _NeedsOthersError as error:
                self._at_once = max(2, trainer._train_batch_size)
                logger.warning(
                    f"the data collator fails with one example ({error}): losses before "
                    f"training are measured on {self._at_once} at a time"
                )
        return [collate(rows) for rows in self._together(dataset, count, between)]

    def _singles(self, collate: Callable[..., Any], dataset: Any, count: int, between: bool) -> Iterator[Any]:
        if not is_indexed(dataset):
            places: Iterable[Iterable[Any]] = [[row] for row in self._first_of(dataset, count)]
        else:
            starts, step = _spread(dataset, count, between)
            near = max(1, step // 2)  # what may stand in for one
            places = (map(dataset.__getitem__, range(start, min(start + near, len(dataset)))) for start in starts)
        for rows in places:
            examples = (_alone(collate, row) for row in rows)
            yield from itertools.islice((example for example in examples if not _is_empty(example)), 1)

    def _together(self, dataset: Any, count: int, between: bool) -> Iterator[list[Any]]:
        size = self._at_once
        if not is_indexed(dataset):
            rows = self._first_of(dataset, count * size)
            yield from (rows[start : start + size] for start in range(0, len(rows) - size + 1, size))
            return
        for start in _spread(dataset, count, between)[0]:
            yield [dataset[index % len(dataset)] for index in range(start, start + size)]

    def _first_of(self, stream: Any, count: int) -> list[Any]:
        """Return a stream's first rows, the main process', for others may have other streams."""

        def read() -> list[Any]:
            if not is_main_process():
                return []
            if isinstance(stream, PeekedStream):
                return stream.peek(count)
            return list(itertools.islice(iter(stream), count))  # of the package datasets, which begins anew each time

        for other, asked, rows in self._first:
            if other is stream and (count <= asked or len(rows) < asked):
                return rows[:count]
        rows = from_main(on_all(read, "read the data"))
        self._first = [entry for entry in self._first if entry[0] is not stream] + [(stream, count, rows)]
        return rows


def is_indexed(dataset: Any) -> bool:
    """Whether rows can be had by index."""
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def tokens_of(example: Any, longest: int | None = None) -> int:
    """Return how many tokens an example has, 0 where it holds none: what it is padded with isn't read.

    Args:
        longest: of a row that count at most.
    """
    if "input_ids" not in example:
        return 0
    ids, mask = example["input_ids"], example.get("attention_mask")
    real = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
    return int(real.sum(-1).clamp(max=longest).sum() if longest else real.sum())


def _is_empty(example: Any) -> bool:
    """Whether an example is that of an empty text, which a model reads only among others of a batch."""
    return "input_ids" in example and not tokens_of(example)


def _alone(collate: Callable[..., Any], row: Any) -> Any:
    try:
        return collate([row])
    except Exception as error:  # of a collator that isn't this library's, there is no type for all
        raise _NeedsOthersError(first_line(error)) from error


def _spread(dataset: Any, count: int, between: bool) -> tuple[range, int]:
    """Return where rows are taken, and how far from one to the next."""
    step = max(1, len(dataset) // count)
    return range(step // 2 if between else 0, len(dataset), step)[:count], step
