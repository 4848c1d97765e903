"""How the help of a command shows its flags: each once, numbers as N, and the default wherever there is one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

WIDEST = 26  # characters that a flag takes before what it means


class WithDefaults(argparse.HelpFormatter):
    """Adds to what a flag means its default, where that isn't said already."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=WIDEST)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None = None
    ) -> None:
        self._prog += " [options]"  # which are named below, with what they mean
        super().add_usage(usage, [action for action in actions if not action.option_strings], [], prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", _shown(action.default)
        return f"{text} (default: {default})" if default and "default" not in text else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type in (int, float) else action.dest.split("_")[-1].upper()


def _shown(default: Any) -> str:
    """Return a default as it would be typed, "" where there is none."""
    if default is None or default is False or default == argparse.SUPPRESS:
        return ""
    if isinstance(default, list):
        return " ".join(map(_shown, default))
    return f"{default:g}".replace("e+0", "e") if isinstance(default, float) else str(default)
