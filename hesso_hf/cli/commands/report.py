"""`hesso-hf report`: a smaller model's pruning report, as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...errors import HessoError
from ..printing import print_report

HELP = "show a smaller model's pruning report"
REPORT_NAME = "pruning_report.json"  # export's, whose modules import torch; a test compares the two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", help="folder of the smaller model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", help="draw what CRIC did into this file (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> int:
    """Read the report, draw where that is asked for, and print."""
    report = _read_report(arguments.model)
    if arguments.plot:
        _plot(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, arguments.model)
    return 0


def _read_report(folder: str) -> dict[str, Any]:
    """Read the pruning report of a smaller model.

    Raises:
        HessoError: where the folder has none.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        raise HessoError(f"{folder} has no {REPORT_NAME}: it isn't a model that was pruned and saved by hesso_hf")
    return json.loads(path.read_text(encoding="utf-8"))


def _plot(report: dict[str, Any], path: str) -> None:
    """Draw what CRIC did, from a pruning report.

    Raises:
        HessoError: where CRIC wasn't used, for a picture of another kind, or without matplotlib.
    """
    if not report.get("cric"):
        raise HessoError("`--plot` draws what CRIC did, and this model was pruned without it (`cric` in HessoConfig)")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise HessoError(f"`--plot` ({path!r}) must end in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise HessoError(f"`--plot` ({path!r}): there is no folder {str(Path(path).parent)!r}; make it first")
    from ...export.plots import draw_cric

    if not draw_cric(report["cric"], Path(path)):
        raise HessoError("`--plot` needs matplotlib: pip install 'hesso_hf[plots]'")
