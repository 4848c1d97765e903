"""`hesso-hf survey`: what can be pruned in every model type of the installed Transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HessoError

HELP = "what can be pruned in every model type of the installed transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--types", nargs="+", help="model types; the others that the output has are kept")
    parser.add_argument("--output", default="docs/architectures.json", help="JSON file; a page is written beside it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--resume", action="store_true", help="leave out the types that the output has already")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for one type")


def run(arguments: argparse.Namespace) -> int:
    """Survey model types, and write what is found after each.

    Raises:
        HessoError: for an unknown type, a count that isn't positive, or an output that can't be gone on with.
    """
    for name, value in (("jobs", arguments.jobs), ("time-limit", arguments.time_limit)):
        if value <= 0:
            raise HessoError(f"`--{name}` ({value}) must be above zero")
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..survey.page import summary
    from ..survey.survey import SurveyFile, survey_types

    path = Path(arguments.output)
    columns = (TextColumn("{task.description:<28}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=None)
        file = SurveyFile(path, arguments.types, arguments.resume)
        found = survey_types(file.left, arguments.jobs, arguments.time_limit)
        for done, (model_type, structures) in enumerate(found, 1):
            file.add(model_type, structures)
            progress.update(task, completed=done, total=len(file.left), description=model_type)
    print(summary(file.content))
    print(f"written: {path} and {path.with_suffix('.md')}")
    return 0
