"""What several commands print: tables, and the report of a smaller model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..export.page.quality import evaluation_rows, measured_on, quality_rows
from ..export.page.words import extent_of, text_of, tried_in


def print_report(report: dict[str, Any], folder: str, tells_examples: bool = True) -> None:
    """Print a pruning report; on how many examples losses were measured where nothing else says it."""
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    rows = [["parameters", f"{report['parameters']['before']:,}", f"{report['parameters']['after']:,}"]]
    rows += [[name, str(before[name]), str(after[name])] for name in after]
    rows += [list(row) for row in (*quality_rows(report), *evaluation_rows(report))]
    print_table(f"{folder}: {report['pruning_ratio']:.1%} of the parameters removed", ["", "before", "after"], rows)
    if tells_examples and (on := measured_on(report)):
        print(f"losses measured on: {on}")
    checked = report["verification"]
    print(
        f"logits against the trained model: relative error {checked['fold_error']:.1e} in fp32, "
        f"{checked['rounding_error']:.1e} stored as {checked['dtype']}"
    )
    for said in report.get("serving") or ():  # of engines that take a size for another
        print(f"serving: {said}")
    cric = report.get("cric")
    if cric:
        corrected = ", ".join(f"{found['num_corrected']} {name}" for name, found in tried_in(cric).items())
        print(f"CRIC: {extent_of(cric)}; corrected: {corrected or 'nothing'}")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table as wide as it is: a pipe has no width, and a terminal may be wider than it says.

    In a notebook it is plain text, as in a pipe.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    if title:
        print(title)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(force_jupyter=False, force_terminal=sys.stdout.isatty())  # notebooks ask for colours by force
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)


def by_share(reports: Mapping[float, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of smaller models of one base, by the share that was to be removed."""
    measured = sorted({key for report in reports.values() for key in report.get("quality") or {}})
    header = ["", "before", *[f"{ratio:g}" for ratio in reports]]
    first = next(iter(reports.values()))
    rows = [
        ["removed", "", *[f"{report['pruning_ratio']:.1%}" for report in reports.values()]],
        ["parameters", *_counts(first["parameters"]["before"], [r["parameters"]["after"] for r in reports.values()])],
    ]
    for name, before in first["sizes"]["before"].items():
        rows.append([name, *_counts(before, [report["sizes"]["after"][name] for report in reports.values()])])
    for key in measured:
        found = [(report.get("quality") or {}).get(key, {}) for report in reports.values()]
        losses = [_loss(found[0], "before"), *[_loss(one, "after") for one in found]]
        rows.append([f"loss on {text_of(key)} (nats per token)", *losses])
    return header, rows


def _counts(before: int, after: Sequence[int]) -> list[str]:
    return [f"{count:,}" for count in (before, *after)]


def _loss(found: dict[str, Any], when: str) -> str:
    return f"{found[when]['loss']:.4f}" if when in found else "-"
