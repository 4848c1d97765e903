"""`hesso-hf sweep`: prune as a recipe says at several ratios, one run after the other, and compare what comes out."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.files import REPORT_NAME
from ..errors import HessoError
from .comparison import markdown_table
from .printing import by_share, print_table
from .prune import INTERRUPTED, PART_OF_SWEEP
from .recipe import parse_recipe, recipe_parser
from .report import SMALL_NAME, write_page

HELP = "prune as a recipe says at several ratios, and compare: hesso-hf sweep RECIPE --ratios 0.2 0.3 0.5"
_SET_HERE = ("pruning_ratio", "target_sizes", "output", "resume_from_checkpoint")


def sweep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="the recipe of every run; each has a folder in its output_dir")
    parser.add_argument("--ratios", type=float, nargs="+", required=True, help="shares of the parameters to remove")
    parser.add_argument("--launcher", default="", help="what starts each run, such as 'accelerate launch'")
    parser.epilog = "All other flags are those of `hesso-hf prune`."


def run(flags: Sequence[str]) -> int:
    """Sweep as the flags say; the exit code of the first run that fails, 0 where all are done.

    Raises:
        HessoError: for flags that can't be followed, before anything is run.
    """
    parser = argparse.ArgumentParser(prog="hesso-hf sweep", description=HELP, allow_abbrev=False)
    sweep_flags(parser)
    if "--help-all" in flags:
        parser.print_help()
        print()
        recipe_parser().print_help()
        return 0
    arguments, rest = parser.parse_known_args(flags)
    _check(arguments, rest)
    recipe = parse_recipe(arguments.recipe, [*rest, *_ratio(arguments.ratios[0])])
    if recipe.run.output is not None:
        raise HessoError(
            f"`output` ({recipe.run.output!r}) is one folder, and a sweep saves a model for each ratio: leave it out "
            "of the recipe (`output_dir` names the folder of all runs)"
        )
    folder = Path(str(recipe.training.output_dir))
    small = {ratio: folder / f"{ratio:g}" / SMALL_NAME for ratio in sorted(arguments.ratios)}
    launcher = shlex.split(arguments.launcher) or [sys.executable]
    for ratio, output in small.items():
        if (output / REPORT_NAME).is_file():
            print(f"{output}: done before; for another run remove it")
            continue
        told = [*rest, *_ratio(ratio), "--output_dir", str(output.parent), "--resume_from_checkpoint", "auto"]
        code = _ended([*launcher, "-m", "hesso_hf", "prune", arguments.recipe, *told])
        if code:
            again = shlex.join(["hesso-hf", "sweep", *flags])
            ended = "was interrupted" if code == INTERRUPTED else f"ended with {code}"
            print(f"hesso-hf: the run at {ratio:g} {ended}; this goes on with the sweep:\n  {again}", file=sys.stderr)
            return code
    if not recipe.run.dry_run:
        _compare(folder, small)
    return 0


def _ended(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code, 128 + 2 at Ctrl-C.

    The command is told of Ctrl-C too, and has the time to end; a second one ends it.
    """
    process = subprocess.Popen(command, env={**os.environ, PART_OF_SWEEP: "1"})
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
    return INTERRUPTED


def _ratio(ratio: float) -> list[str]:
    return ["--hesso_pruning_ratio", f"{ratio:g}"]


def _check(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuse ratios that aren't different shares, and flags that each run has of its own."""
    ratios = arguments.ratios
    for ratio in ratios:
        if not 0.0 < ratio < 1.0:
            raise HessoError(f"`--ratios` ({ratio:g}) must lie between 0 and 1")
        if ratios.count(ratio) > 1:
            raise HessoError(f"`--ratios` ({ratio:g}) is given more than once; give each once")
    for flag in (word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")):
        if flag.removeprefix("hesso_") in _SET_HERE:
            raise HessoError(
                f"`--{flag}` is what the runs of a sweep differ in, or follows from that: leave it out (`--output_dir` "
                "names the folder of all runs)"
            )


def _compare(folder: Path, small: dict[float, Path]) -> None:
    """Print a table of all runs, and write it and a page about them beside their folders."""
    reports = {ratio: json.loads((path / REPORT_NAME).read_text(encoding="utf-8")) for ratio, path in small.items()}
    header, rows = by_share(reports)
    title = f"{folder}, by the share of the parameters to remove"
    print_table(title, header, rows)
    (folder / "sweep.md").write_text(markdown_table(title, header, rows) + "\n", encoding="utf-8")
    write_page(folder / "sweep.html", list(small.values()), list(reports.values()))
    print(f"written: {folder / 'sweep.md'}, {folder / 'sweep.html'}")
