"""What is known of a model in memory that is pruned, or was: how far that is, and what was cut out of it.

An export that is given the model alone asks here; nothing keeps the model or its process alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..budget.target_sizes import TargetSizes
from ..errors import HessoError, StorageError
from .decision import Compaction

GO_ON = "go on stepping until `optimizer.process.finished`, and export then"

Decided = Callable[[], dict[str, Any]]

_processes = weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod[Decided]]()
_compactions = weakref.WeakKeyDictionary[nn.Module, Compaction]()


@dataclass(frozen=True)
class Unfinished:
    """That pruning hasn't come to its end.

    Attributes:
        step: steps that were made, of `end`.
        ratio: share of the parameters that is to go.
    """

    step: int
    end: int
    ratio: float

    def __str__(self) -> str:
        return f"pruning isn't finished (step {self.step} of {self.end})"

    def warning(self, removed: float) -> str:
        """Say of a model that was exported what it lacks."""
        return f"{self}: {removed:.1%} of the parameters are removed, not {self.ratio:.1%}; {GO_ON}"


def begin(model: nn.Module, decided: Decided) -> None:
    """Know a model as one that is pruned from now on.

    Args:
        decided: the method of its process that says how far pruning is.
    """
    _processes[model] = weakref.WeakMethod(decided)
    _compactions.pop(model, None)


def note_cut(model: nn.Module, compaction: Compaction) -> None:
    """Know a model as one out of which the pruned units were cut."""
    _compactions[model] = compaction


def compaction_of(model: nn.Module) -> Compaction | None:
    """Return what was cut out of a model in memory, None where nothing was."""
    return _compactions.get(model)


def unfinished(model: nn.Module) -> Unfinished | None:
    """Return how far the pruning of a model in memory is, None where it is finished or nothing is known of it."""
    method = _processes.get(model)
    decided = method() if method is not None else None
    if decided is None or (told := decided())["finished"]:
        return None
    return Unfinished(told["step"], told["schedule_end"], TargetSizes.from_dict(told["target"]).parameter_ratio)


@contextlib.contextmanager
def blamed_on(found: Unfinished | None) -> Iterator[None]:
    """Have what is wrong with a model's units say that pruning isn't finished, where it isn't."""
    try:
        yield
    except StorageError:
        raise
    except HessoError as error:
        if found is None:
            raise
        raise type(error)(
            f"`source`: {found}; {GO_ON}. Without the units that are at zero so far there is no such model: {error}"
        ) from error
