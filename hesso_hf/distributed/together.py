"""What all processes write together, of which none goes on where one can't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HessoError, StorageError
from .collectives import barrier, from_all, rank


class Together:
    """Work that all processes do; where one fails, the others hear of it at the next point where they meet.

    Attributes:
        underway: whether it is being done.
    """

    def __init__(self) -> None:
        self.underway = False
        self._shared = self._failed = False

    @contextmanager
    def doing(self, shared: bool) -> Iterator[None]:
        """Do it.

        Between two points where all meet nothing else may wait for all processes.

        Args:
            shared: whether a failure is told. Where the work itself waits for all processes, as that of FSDP and of
                DeepSpeed does, the others may be waiting there, and whoever fails can only end.

        Raises:
            HessoError: on all processes, a failure of the first that had one, a StorageError where it is one.
        """
        self.underway, self._shared, self._failed = True, shared, False
        try:
            yield
            self.meet()
        except Exception as error:
            if shared and not self._failed:  # the others are on their way to a point where they meet
                is_full, message = isinstance(error, StorageError), str(error)
                self._compare((is_full, message if is_full else f"{type(error).__name__}: {message}"))
            raise
        finally:
            self.underway = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something else meanwhile, in which all processes fail or none."""
        before, self.underway = self.underway, False
        yield
        self.underway = before

    def meet(self) -> None:
        """Wait for all processes, where it is underway.

        Raises:
            HessoError: what one of them has failed with.
        """
        if self.underway and self._shared:
            self._compare(None)
        elif self.underway:
            barrier()

    def _compare(self, failure: tuple[bool, str] | None) -> None:
        """Tell of a failure, or that there is none, and raise the first of all processes' unless it is this one's."""
        told = from_all(failure)
        first = next((index for index, other in enumerate(told) if other is not None), None)
        self._failed = first is not None
        if first is None or first == rank():
            return
        is_full, message = told[first] or (False, "")
        if is_full:
            raise StorageError(message)
        raise HessoError(f"another process could not write the checkpoint: {message}")
