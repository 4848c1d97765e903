"""`hesso-hf inspect | plan | prune | export | eval | report | survey | quickstart`: parses and dispatches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from .. import __version__
from ..errors import HessoError
from .commands import eval as evaluate
from .commands import export, inspect, plan, prune, quickstart, report, survey


class Command(Protocol):
    """What each module under `commands` has."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit code."""


COMMANDS: dict[str, Command] = {
    "inspect": inspect,
    "plan": plan,
    "export": export,
    "eval": evaluate,
    "report": report,
    "survey": survey,
    "quickstart": quickstart,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one message and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["prune"]:
            return prune.run(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (HessoError, ImportError) as error:  # some optimizers and other options need a package of their own
        print(f"hesso-hf: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hesso-hf", description="Shrink language models while fine-tuning them.")
    parser.add_argument("--version", action="version", version=f"hesso-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prune", help=prune.HELP)  # its flags, those of a recipe's dataclasses, have their own parser
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
