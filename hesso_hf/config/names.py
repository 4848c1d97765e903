"""Names that a user may give: structures and saliency criteria, alone, as a list, or with weights."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from types import NoneType
from typing import Any, TypeVar

from ..errors import HessoError, nearest_name

_T = TypeVar("_T")

STRUCTURES: tuple[str, ...] = (
    "attention_heads", "mlp_channels", "expert_channels", "mixer_channels", "embedding_channels", "query_heads",
    "experts", "layers",
)  # fmt: skip
INSTEAD_OF = {"query_heads": "attention_heads"}  # their units are parts of the other's
OPT_IN = (*INSTEAD_OF, "experts", "layers")  # pruned only where they are named
DEFAULT_STRUCTURES = tuple(name for name in STRUCTURES if name not in OPT_IN)  # what 'all' stands for
RECONSTRUCTION = "reconstruction"  # the default where marked units are healed
DTYPE_NAMES = ("float32", "bfloat16", "float16")  # that weights are trained, measured and stored in
SALIENCIES = (
    "magnitude", "avg_magnitude", "cosine_similarity", "taylor_first_order", "taylor_second_order", RECONSTRUCTION,
)  # fmt: skip
DEFAULT_SALIENCY = "taylor_second_order"
AUTO_REPLAY_SHARE = 0.25
TAUGHT_REPLAY_SHARE = 0.125  # where the base model teaches the user's data too, which then keep some of it themselves
AUTO_DISTILLATION_ALPHA = 0.9
AUTO_CRIC = "healed"  # where units are judged by reconstruction
CRIC_TRIALS = ("path", "probe")  # in which units go the way to zero, scored by gradients
CRIC_SALIENCY = {"taylor_first_order": 1.0, "taylor_second_order": 3.0}  # the path's integral, and its curvature


def structures_around(names: Iterable[str]) -> tuple[str, ...]:
    """Return the structures that may be pruned together with `names`: the default ones, some replaced, some added."""
    names = list(names)
    instead = {INSTEAD_OF[name]: name for name in names if name in INSTEAD_OF}
    added = [name for name in OPT_IN if name in names and name not in INSTEAD_OF]
    return (*(instead.get(name, name) for name in DEFAULT_STRUCTURES), *added)


def parse(name: str, value: Any) -> Any:
    """Turn a JSON string (from a command line) into what it says; leave everything else alone.

    Raises:
        HessoError: naming the argument, where it isn't JSON.
    """
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise HessoError(
                f"`{name}` ({value!r}) is not valid JSON: {error}; in a shell put it between single quotes"
            ) from error
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def truth(value: Any) -> Any:
    """Turn a truth value's text (from a command line) into it; leave everything else alone."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def number(value: Any) -> Any:
    """Turn a number's text (from a command line) into it; leave everything else alone."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def numbers(name: str, value: Any) -> Any:
    """Turn one number or several, or their text (from a command line), into a list; leave everything else alone."""
    value = parse(name, value)
    if isinstance(value, tuple):
        value = list(value)
    values = [number(each) for each in (value if isinstance(value, list) else [value])]
    return values if all(isinstance(each, int | float) for each in values) else value


def names_checked(owner: type[_T]) -> type[_T]:
    """Have a dataclass say of an unknown keyword which known one is nearest."""
    plain = owner.__init__

    @functools.wraps(plain)
    def init(self: _T, *args: Any, **values: Any) -> None:
        known = list(owner.__dataclass_fields__)  # type: ignore[attr-defined]
        for key in values:
            if key not in known:
                raise HessoError(f"unknown key `{key}` for {owner.__name__}{nearest_name(key, known)}; known: {known}")
        plain(self, *args, **values)

    owner.__init__ = init  # type: ignore[assignment, method-assign]
    return owner


def weights_by_name(argument: str, value: Any, known: tuple[str, ...]) -> dict[str, float]:
    """Normalise a name, a list of names or a dict of weights to a dict; refuse unknown names."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, dict | list | tuple | set | NoneType):
        raise HessoError(f"`{argument}` ({value!r}) must be a name, a list of names or a dict of weights")
    weights = dict(value) if isinstance(value, dict) else dict.fromkeys(value or (), 1.0)
    if not weights:
        raise HessoError(f"`{argument}` ({value!r}) must name at least one of {list(known)}")
    for name, weight in weights.items():
        if name not in known:
            raise HessoError(
                f"`{argument}`: unknown name {name!r}{nearest_name(name, list(known))}; known: {list(known)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise HessoError(f"`{argument}[{name!r}]` ({weight!r}) must be a positive number")
    return {name: float(weight) for name, weight in weights.items()}
