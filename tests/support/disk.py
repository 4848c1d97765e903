"""A disk that is full, for this process alone: the system refuses whatever makes a file larger than a few kilobytes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(most: int = 10_000) -> Iterator[None]:
    """For a while, let no file be larger than `most` bytes; Python ignores the signal, so the write itself fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
