"""The outcome of a proof: what was settled for each structure and how exactly it holds, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .depth import LayerScheme
from .errors import NotApplicableError, UnsupportedStructureError
from .experts import ExpertScheme
from .groups import Scheme

TOLERANCE = 1e-5


@dataclass(frozen=True)
class StructureProof:
    """The outcome for one structure: a scheme with its relative error, or a reason.

    Attributes:
        applicable: False where the architecture has no such structure, so that there is nothing to refuse.
    """

    structure: str
    scheme: Scheme | ExpertScheme | LayerScheme | None
    relative_error: float | None
    reason: str = ""
    applicable: bool = True


@dataclass(frozen=True)
class Proof:
    """The outcome for all structures of one architecture.

    Attributes:
        joint_error: the relative error with all proved ones cut at once.
        coupled: whether heads and width only shrink together.
    """

    structures: dict[str, StructureProof]
    joint_error: float | None = None
    coupled: bool = False


def guarded(names: tuple[str, ...], prove: Callable[[], dict[str, StructureProof]]) -> dict[str, StructureProof]:
    """Turn whatever a proof raises into a refusal."""
    try:
        return prove()
    except NotApplicableError as error:
        return {name: StructureProof(name, None, None, str(error), applicable=False) for name in names}
    except UnsupportedStructureError as error:
        reason = str(error)
    except Exception as error:  # model code may fail on a cut model with any exception type
        reason = f"{type(error).__name__}: {error}"
    return {name: StructureProof(name, None, None, reason) for name in names}
