"""Training examples that are looked at before training reads them: it reads those too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


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
