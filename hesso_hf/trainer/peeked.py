"""Training examples that are looked at before training reads them: it reads those too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors import HessoError


class PeekedStream(IterableDataset):
    """Stands for a stream that may be read only once.

    Args:
        stream: what the user gave; everything else that it has is had through this.
    """

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream
        self._seen: list[Any] = []
        self._rest: Iterator[Any] | None = None  # of the pass whose beginning was looked at

    def peek(self, count: int) -> list[Any]:
        """Return the first examples; after training has begun those that were looked at before it."""
        if not self._seen:
            self._rest = iter(self.stream)
        if self._rest is not None:
            self._seen += itertools.islice(self._rest, max(0, count - len(self._seen)))
        return self._seen[:count]

    def __iter__(self) -> Iterator[Any]:
        if self._rest is None:
            return iter(self.stream)
        begun, self._rest = itertools.chain(list(self._seen), self._rest), None
        return begun

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)


def single_examples(batch: Any) -> Iterator[dict[str, Any]]:
    """Divide a batch of a user's own loader into its examples, each a batch of one on the CPU.

    Raises:
        HessoError: for anything but named values, of which one at least is a tensor with a row an example.
    """
    named = batch if isinstance(batch, Mapping) else {}
    rows = next((len(value) for value in named.values() if torch.is_tensor(value) and value.dim()), None)
    if rows is None:
        raise HessoError(
            f"`get_train_dataloader` gives batches ({type(batch).__name__}) that aren't dicts of tensors with a row an "
            "example, so nothing can be measured on single ones; give `train_dataset` too"
        )
    for row in range(rows):
        yield {name: _row(value, row, rows) for name, value in named.items()}


def _row(value: Any, row: int, rows: int) -> Any:
    """Return what belongs to an example: its row, or all of what isn't one a row."""
    one_each = (torch.is_tensor(value) and value.dim() > 0) or isinstance(value, list)
    part = value[row : row + 1] if one_each and len(value) == rows else value
    return part.cpu() if torch.is_tensor(part) else part
