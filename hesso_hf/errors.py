"""Errors that a user of the library can meet; each message names the argument, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HessoError(ValueError):
    """Base class of the errors that the library raises for bad input or an impossible request.

    Attributes:
        in_memory: the part of the message that is so while the process lives: what there is of an unsaved model.
    """

    in_memory = ""


class UnsupportedStructureError(HessoError):
    """A structure of this architecture can't be pruned; the message names the module and the reason."""


class NotApplicableError(UnsupportedStructureError):
    """This architecture has no such structure at all; the message names the config size that is missing or unused."""


class BudgetError(HessoError):
    """No feasible target sizes meet the budget; the message lists the nearest feasible ones."""


class CheckpointMismatchError(HessoError):
    """A checkpoint's pruning state belongs to another model or configuration."""


class VerificationError(HessoError):
    """The exported model doesn't reproduce the trained one; nothing was published."""


class StorageError(HessoError, OSError):
    """A folder can't be written; the message names it, what was to be written there, and the room that there is."""


class TrainingDivergedError(HessoError):
    """Several steps in a row had a non-finite gradient."""


class StoppedError(Exception):
    """A run was told to stop, and did so after it saved a checkpoint: nothing went wrong, the work isn't done."""


def nearest_name(name: str, known: list[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known name, or "" where none is close."""
    import difflib

    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural but for one.

    Example:
        >>> counted(1, "step"), counted(2000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def check_same(what: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a checkpoint's settings with a run's.

    Raises:
        CheckpointMismatchError: naming the first that differs.
    """
    for key, value in current.items():
        if saved.get(key) != value:
            raise CheckpointMismatchError(
                f"the checkpoint was made with {what} {key} = {saved.get(key)!r}, this run has {value!r}; "
                "resume with the same configuration or start anew"
            )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
