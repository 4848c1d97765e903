"""Where a run came of: the command and the recipe that repeat it, without what is nobody else's business."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..export.report import public_name
from .recipe import Recipe

LAUNCHERS = ("accelerate", "torchrun")
_SECRET = "token"  # what keys end in whose values must not be shown


def origin_of(recipe: Recipe) -> dict[str, Any]:
    """Return what the record of a run says of its command, recipe and data: of absolute paths the last part alone."""
    return {
        "command": shlex.join([*_shown_words(launched()), "prune", *_shown_words(recipe.words)]),
        "recipe": _shown(recipe.given),
        "datasets": [public_name(str(recipe.run.dataset))],
    }


def launched() -> list[str]:
    """Return what stands before `prune` in the command that started this process: a launcher's words, or `hesso-hf`."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return ["hesso-hf"]
    import psutil

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    words = words[: words.index("prune")] if "prune" in words else []
    for start, word in enumerate(words):
        if Path(word).name in LAUNCHERS:
            return [Path(word).name, *words[start + 1 :]]
    return ["accelerate", "launch", "--num_processes", processes, "-m", "hesso_hf"]


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
