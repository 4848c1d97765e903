"""`hesso-hf report`: what was published beside a smaller model, printed, drawn, or written as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HessoError
from ..export.page.losses import Losses
from ..export.page.page import Model, report_page
from .printing import print_report
from .training_log import losses_beside, losses_in

REPORT_NAME = "pruning_report.json"  # export's, whose modules import torch; a test compares the two
_PARTS = ("parameters", "pruning_ratio", "sizes", "verification")  # which every report has


def report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="SMALL", help="folder of a smaller model; several are compared")
    parser.add_argument("--json", action="store_true", help="print JSON, of several models a list")
    parser.add_argument("--plot", help="draw what CRIC did into this file (.png, .svg or .pdf)")
    parser.add_argument("--html", help="write a page that needs nothing beside it into this file (.html)")
    parser.add_argument("--run", help="folder of the run whose log the page shows (default: SMALL's own losses)")


def report(arguments: argparse.Namespace) -> None:
    """Show the pruning reports of smaller models, draw one or write a page about them where that is asked for."""
    _check(arguments)
    found = [_read(folder) for folder in arguments.models]
    if arguments.plot:
        _plot(found[0], arguments.plot)
    if arguments.html:
        write_page(arguments.html, arguments.models, found, arguments.run)
    if arguments.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    for folder, shown in zip(arguments.models, found, strict=True):
        print_report(shown, folder)
    if arguments.html:
        print(f"written: {arguments.html}")


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


def _read(folder: str) -> dict[str, Any]:
    """Read a model's report.

    Raises:
        HessoError: naming the folder, where there is none, or a file that isn't one.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        raise HessoError(f"{folder} has no {REPORT_NAME}: it isn't a model that was pruned and saved by hesso_hf")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _PARTS if name not in found]
    except (ValueError, TypeError) as error:
        raise HessoError(f"{path} isn't a report: {error}; save or export the model again") from error
    if missing:
        raise HessoError(f"{path} isn't a report: it has no {', '.join(missing)}; save or export the model again")
    return dict(found)


def _plot(found: dict[str, Any], path: str) -> None:
    """Draw what CRIC did, from a pruning report."""
    if not found.get("cric"):
        raise HessoError("`--plot` draws what CRIC did, and this model was pruned without it (`cric` in HessoConfig)")
    from ..export.plots import draw_cric

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
