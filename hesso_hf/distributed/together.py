"""What all processes write together, of which none goes on where one can't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HessoError, StorageError
from .collectives import barrier, from_all


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

        Args:
            shared: whether a failure is told. Where the work itself waits for all processes, as that of FSDP and of
                DeepSpeed does, the others may be waiting there, and whoever fails can only end.

        Raises:
            HessoError: a failure of another process, a StorageError where it is one.
        """
        self.underway, self._shared, self._failed = True, shared, False
        try:
            yield
            self.meet()
        except Exception as error:
            if shared and not self._failed:  # the others are on their way to a point where they meet
                from_all((isinstance(error, StorageError), str(error)))
            raise
        finally:
            self.underway = False

    def meet(self) -> None:
        """Wait for all processes.

        Raises:
            HessoError: what one of them has failed with.
        """
        if not self._shared:
            return barrier()
        nothing: tuple[bool, str] | None = None
        failures = [told for told in from_all(nothing) if told is not None]
        if failures:
            self._failed = True
            out_of_room, message = failures[0]
            if out_of_room:
                raise StorageError(message)
            raise HessoError(f"another process could not write the checkpoint: {message}")
        return None
