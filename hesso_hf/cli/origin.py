"""Where a run came of: the command and the recipe that repeat it, without what is nobody else's business."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..export.report import public_name
from .recipe import Recipe

_SECRET = "token"  # what keys end in whose values must not be shown


def origin_of(recipe: Recipe) -> dict[str, Any]:
    """Return what the record of a run says of its command, recipe and data: of absolute paths the last part alone."""
    return {
        "command": shlex.join(["hesso-hf", "prune", *_shown_words(recipe.words)]),
        "recipe": _shown(recipe.given),
        "datasets": [public_name(str(recipe.run.dataset))],
    }


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items() if not key.endswith(_SECRET)}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _shown_words(words: Sequence[str]) -> list[str]:
    shown, hidden = [], False
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not hidden and not name.endswith(_SECRET):
            shown.append(f"{name}{equals}{_shown(value)}")
        hidden = name.endswith(_SECRET) and not equals  # what comes next is its value
    return shown
