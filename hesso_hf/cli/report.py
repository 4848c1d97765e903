"""`hesso-hf report`: what was published beside smaller models, printed, compared, drawn, and written as a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.files import PAGE_NAME, REPORT_NAME
from ..errors import HessoError
from ..export.page.compared import compared_rows
from ..export.page.losses import Losses
from ..export.page.page import Model, report_page
from .printing import print_report, print_table
from .training_log import losses_beside, losses_in

SMALL_NAME = "small"  # of the folder that `hesso-hf prune` saves the smaller model in, where no other is named
_PARTS = ("parameters", "pruning_ratio", "sizes", "verification")  # which every report has


def report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="RUN",
        help="folder of a smaller model, or of the run that made it; of one the page in it is made again, several are "
        "compared",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON and write nothing, of several models a list")
    parser.add_argument("--plot", help="draw CRIC's cycles into this file (.png, .svg or .pdf)")
    parser.add_argument("--html", help="write the page, which needs nothing beside it, into this file (.html)")
    parser.add_argument("--run", help="folder of the run whose log the page shows (default: the model's own losses)")


def report(arguments: argparse.Namespace) -> None:
    """Show the report of a smaller model and make its page again, or compare several; draw one where that is asked."""
    _check(arguments)
    folders = [_small_in(folder) for folder in arguments.models]
    found = [_read(folder) for folder in folders]
    if arguments.plot:
        _plot(found[0], arguments.plot)
    if arguments.html:
        write_page(arguments.html, folders, found, arguments.run)
    if arguments.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    if len(found) == 1:
        print_report(found[0], str(folders[0]))
        written = arguments.html or _remade(folders[0], found[0])
    else:
        names = names_of([folder.resolve() for folder in folders])
        print_table(", ".join(map(str, folders)), ["", *names], [list(row) for row in compared_rows(found)])
        written = arguments.html
    if written:
        print(f"written: {written}")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that don't go together, and files that can't be written."""
    for flag in ("plot", "run"):
        if getattr(arguments, flag) and len(arguments.models) > 1:
            raise HessoError(f"`--{flag}` is of one model, and {len(arguments.models)} are given: name one")
    if arguments.run and not arguments.html:
        raise HessoError(f"`--run` ({arguments.run!r}) is what the page of `--html` shows: give that too")
    for flag, path, endings in (
        ("plot", arguments.plot, (".png", ".svg", ".pdf")), ("html", arguments.html, (".html", ".htm")),
    ):  # fmt: skip
        if path and Path(path).suffix.lower() not in endings:
            raise HessoError(f"`--{flag}` ({path!r}) must end in {', '.join(endings[:-1])} or {endings[-1]}")
        if path and not Path(path).absolute().parent.is_dir():
            raise HessoError(f"`--{flag}` ({path!r}): there is no folder {str(Path(path).parent)!r}; make it first")


def _small_in(folder: str) -> Path:
    """Return the folder of a smaller model, by its own name or that of its run.

    Raises:
        HessoError: naming the folder, where it is neither, or has several.
    """
    if not Path(folder).is_dir():
        raise HessoError(
            f"`RUN` ({folder!r}): there is no such folder; give that of a smaller model, or of the run that made it"
        )
    own, beside = Path(folder), sorted(path.parent for path in Path(folder).glob(f"*/{REPORT_NAME}"))
    if (own / REPORT_NAME).is_file():
        return own
    if len(beside) == 1 or own / SMALL_NAME in beside:  # where models on the way were saved, the last one
        return own / SMALL_NAME if own / SMALL_NAME in beside else beside[0]
    if beside:
        raise HessoError(f"{folder} has several smaller models: name one of {', '.join(map(str, beside))}, or several")
    raise HessoError(
        f"{folder} has no {REPORT_NAME}, nor has a folder in it: it isn't a model that was pruned and saved by hesso_hf"
    )


def _remade(folder: Path, found: dict[str, Any]) -> Path | None:
    """Make the page of a smaller model again; where that fails, say so and return None."""
    path = folder / PAGE_NAME
    try:
        write_page(path, [folder], [found])
    except HessoError as error:
        print(f"hesso-hf: the page isn't made again: {error}", file=sys.stderr)
        return None
    return path


def _read(folder: Path) -> dict[str, Any]:
    """Read a model's report.

    Raises:
        HessoError: naming the file, where it isn't one.
    """
    path = folder / REPORT_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _PARTS if name not in found]
    except (ValueError, TypeError) as error:
        raise HessoError(f"{path} isn't a report: {error}; save or export the model again") from error
    if missing:
        raise HessoError(f"{path} isn't a report: it has no {', '.join(missing)}; save or export the model again")
    return dict(found)


def _plot(found: dict[str, Any], path: str) -> None:
    """Draw CRIC's cycles, from a pruning report."""
    from ..export.plots import draw_cric, has_cycles

    if not has_cycles(found.get("cric")):
        raise HessoError(
            "`--plot` draws CRIC's cycles, and this model was pruned without any (`cric_mode` 'path' or 'probe' in "
            "HessoConfig)"
        )
    if not draw_cric(found["cric"], Path(path)):
        raise HessoError("`--plot` needs matplotlib: pip install 'hesso_hf[plots]'")


def write_page(
    path: str | Path, folders: Sequence[str | Path], found: Sequence[dict[str, Any]], run: str | None = None
) -> None:
    """Write the page about all models, each by the shortest name that no other has.

    Args:
        folders: of the smaller models.
        found: their reports.
        run: folder of the run whose log the page shows.

    Raises:
        HessoError: where it can't be written.
    """
    paths = [Path(folder).resolve() for folder in folders]
    models = [
        Model(name, shown, _losses(run, path, shown))
        for name, path, shown in zip(names_of(paths), paths, found, strict=True)
    ]
    try:
        Path(path).write_text(report_page(models), encoding="utf-8")
    except OSError as error:
        raise HessoError(f"`--html` ({str(path)!r}) can't be written: {error.strerror}; name another") from error


def _losses(run: str | None, folder: Path, shown: Mapping[str, Any]) -> Losses | None:
    """Return what the page shows of the training: the log that is named, the report's own, or one beside the model."""
    if run is not None:
        return losses_in(run)
    found = shown.get("losses")
    return Losses.from_dict(found) if found else losses_beside(folder, shown)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the ends of paths, as long as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise HessoError(f"a folder is named twice: {', '.join(map(str, paths))}; name each once")
