"""Examples of streams that are looked at before training or evaluation reads them: it reads those too."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Sized
from typing import Any

from datasets import IterableDataset as HubStream
from torch.utils.data import IterableDataset

from ..errors import HessoError

COMPARED = 8  # examples by which a stream that begins anew is told from one that can be read once


class PeekedStream(IterableDataset):
    """Stands for a stream that may be read only once.

    One that begins anew is left to itself: workers may share it out among them.

    Args:
        stream: what the user gave; everything else that it has is had through this.
        argument: what an error calls it.
    """

    def __init__(self, stream: IterableDataset, argument: str) -> None:
        self.stream, self._argument = stream, argument
        self._seen: list[Any] = []
        self._rest: Iterator[Any] | None = None  # of one that can be read once and was looked at
        self._begun = False

    def peek(self, count: int) -> list[Any]:
        """Return the first examples; after training has begun those that were looked at before it."""
        missing = max(0, count - len(self._seen))
        if self._rest is not None:
            self._seen += itertools.islice(self._rest, missing)
        elif missing and not self._begun:
            self._look(count)
        return self._seen[:count]

    def _look(self, count: int) -> None:
        """Read the first examples, and find out whether they come again."""
        first = iter(self.stream)
        self._seen = list(itertools.islice(first, max(count, COMPARED)))
        again = iter(self.stream)
        compared = list(itertools.islice(again, COMPARED))
        if _alike(compared, self._seen[:COMPARED]):
            return
        self._seen += compared  # which are the next ones
        self._rest = _going_on(first, again)

    def __iter__(self) -> Iterator[Any]:
        self._begun = True
        if self._rest is None:
            return iter(self.stream)
        begun, self._rest = itertools.chain(list(self._seen), self._rest), None
        return begun

    def __getstate__(self) -> dict[str, Any]:
        if self._rest is not None:
            raise HessoError(
                f"`{self._argument}` ({type(self.stream).__name__}) can be read once, and its first examples are "
                "measured on: workers that don't start as copies of this process can't go on with it; set "
                "`dataloader_num_workers=0` or `dataloader_multiprocessing_context='fork'`"
            )
        return self.__dict__

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.stream, name)


class SizedStream(PeekedStream):
    """Stands for one that knows its length."""

    def __len__(self) -> int:
        return len(self.stream)  # type: ignore[arg-type]


def peeked(dataset: Any, argument: str) -> Any:
    """Return what stands for a stream that may be read only once; of a dict, for each in it; other data as it is.

    Streams of the package datasets begin anew whenever they are read.

    Args:
        argument: what an error calls it.
    """
    if isinstance(dataset, dict):
        return {name: peeked(part, argument) for name, part in dataset.items()}
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, HubStream | PeekedStream):
        return dataset
    return (SizedStream if isinstance(dataset, Sized) else PeekedStream)(dataset, argument)


def _going_on(first: Iterator[Any], other: Iterator[Any]) -> Iterator[Any]:
    """Read one of two readers of the same source; the other isn't let go before, which may close the source."""
    yield from first
    del other


def _alike(found: list[Any], seen: list[Any]) -> bool:
    """Tell whether examples are the same, as far as that can be seen."""
    try:
        return pickle.dumps(found) == pickle.dumps(seen)
    except Exception:  # of what isn't this library's, there is no type for all
        return False
