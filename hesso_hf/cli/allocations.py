"""What tensors take, counted as they are made and let go: on a CPU no allocator says it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..compat import dispatch_mode


class Allocations(dispatch_mode()):  # type: ignore[misc]
    """Counts the bytes of tensors that are made while it is active.

    Attributes:
        now, peak: bytes at present, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage.data_ptr() not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._seen or not size:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in nested containers that have memory of their own."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta":
            yield value.untyped_storage()
    elif isinstance(value, Mapping):
        yield from _storages(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _storages(each)
