"""`hesso-hf inspect | plan | prune | sweep | export | eval | report | survey | quickstart`: parses and dispatches."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import HessoError, nearest_name
from . import commands, prune, sweep
from .export import export, export_flags
from .finishing import told
from .help import WithDefaults
from .report import report, report_flags

# Name to what the help says, what adds the flags, and what does the work.
Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {
    "inspect": ("what can be pruned in a model, from its config alone", commands.inspect_flags, commands.inspect),
    "plan": ("which engine a training run fits in memory, from the config alone", commands.plan_flags, commands.plan),
    "export": ("write the smaller model of a checkpoint", export_flags, export),
    "eval": ("sizes, speed, held-out perplexity and lm-eval tasks", commands.eval_flags, commands.evaluate),
    "report": ("show smaller models' pruning reports, or write a page about them", report_flags, report),
    "survey": (
        "what can be pruned in every model type of the installed transformers", commands.survey_flags, commands.survey,
    ),
    "quickstart": (
        "prune the bundled model by half and compare, offline", commands.quickstart_flags, commands.quickstart,
    ),
}  # fmt: skip
PASSING_ON = {"prune": prune, "sweep": sweep}  # whose flags are those of other libraries too
CLOSED_PIPE = 128 + 13  # what a shell says of a process whose reader went away


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the exit code is 2 after a user's mistake, 130 after Ctrl-C, 141 after a closed pipe."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("DeepSpeed").addFilter(_is_news)  # which some libraries import wherever it is installed
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except (HessoError, ImportError) as error:  # some optimizers and other options need a package of their own
        print(f"hesso-hf: {type(error).__name__}: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhesso-hf: interrupted", file=sys.stderr)
        return prune.INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return CLOSED_PIPE


def _run(argv: list[str]) -> int:
    command, *flags = argv or [""]
    if command in PASSING_ON:
        return PASSING_ON[command].run(["--help-all" if flag == "--help_all" else flag for flag in flags])
    known = [*COMMANDS, *PASSING_ON]
    if command and not command.startswith("-") and command not in known:
        raise HessoError(f"unknown command {command!r}{nearest_name(command, known)}; see `hesso-hf --help`")
    arguments, unknown = _parser().parse_known_args([_hyphens(word) for word in argv])
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in vars(arguments) if name not in ("command", "work")]
        hint = nearest_name(unknown[0].partition("=")[0], known)
        raise HessoError(f"unknown argument {unknown[0]!r}{hint}; see `hesso-hf {arguments.command} --help`")
    arguments.work(arguments)
    return 0


def _hyphens(word: str) -> str:
    """Write a flag's name as the parser has it."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _nobody_reads() -> bool:
    """Whether stdout is a closed pipe; what is left for it then goes nowhere, and Python's exit doesn't complain."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a record says more than that a machine without a GPU has none."""
    return not str(record.msg).startswith("Setting accelerator to CPU")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hesso-hf", description="Shrink language models while fine-tuning them.")
    parser.add_argument("--version", action="version", version=f"hesso-hf {__version__}")
    _help_all(parser)
    subparsers = parser.add_subparsers(dest="command", required=True)
    pruning = subparsers.add_parser("prune", help=prune.HELP)  # its flags have a parser of their own
    pruning.add_argument("--help-all", action="store_true", help="list them")
    sweep.sweep_flags(subparsers.add_parser("sweep", help=sweep.HELP))  # which passes other flags on to these
    for name, (text, add_flags, work) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, formatter_class=WithDefaults)
        add_flags(subparser)
        _help_all(subparser)
        subparser.set_defaults(work=work)
    return parser


def _help_all(parser: argparse.ArgumentParser) -> None:
    """Have `--help-all`, which says more in `prune` and `sweep` alone."""
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
