"""Several smaller models beside each other: a table with a column for each, and the loss over what was removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .figures import chart, courses
from .markup import Markup, table
from .quality import evaluation_rows
from .words import (
    VERIFIED,
    Report,
    extent_of,
    logged,
    named,
    percent,
    scientific,
    sized,
    stored_bytes,
    taught_by,
    text_of,
)


def compared(models: Sequence[tuple[str, Report]]) -> Iterator[Markup]:
    """Yield what compares models, given as name and report."""
    lines = losses_by_share([report for _, report in models])
    if lines:
        yield chart(
            courses(lines.items()),
            percent,
            "Loss over the share of the parameters that was removed; at 0% the base model as it came",
        )
    yield table(["", *(name for name, _ in models)], compared_rows([report for _, report in models]))


def compared_rows(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """Return what models are compared by: what it is, and its value of each."""
    columns = [_facts(report) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, *(column.get(name, "–") for column in columns)) for name in names]


def losses_by_share(reports: Sequence[Report]) -> dict[str, list[tuple[float, float]]]:
    """Return (share removed, loss) by the text that it is of, from the base model on.

    Empty where they don't make a line: other base models or examples, or all of one share.
    """
    shares = {report["pruning_ratio"] for report in reports}
    if len(shares) < 2 or len({report.get("base_model") for report in reports}) > 1:
        return {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, first in (reports[0].get("quality") or {}).items():
        found = [(report.get("quality") or {}).get(key, {}) for report in reports]
        same = all(part.get("examples") == first["examples"] and {"before", "after"} <= part.keys() for part in found)
        if same and len({part["before"]["loss"] for part in found}) == 1:
            points = [
                (report["pruning_ratio"], part["after"]["loss"]) for report, part in zip(reports, found, strict=True)
            ]
            lines[text_of(key)] = [(0.0, first["before"]["loss"]), *sorted(points)]
    return lines


def _facts(report: Report) -> dict[str, str]:
    """Return what models are compared by."""
    counts, checked, config = report["parameters"], report["verification"], report.get("hesso_config") or {}
    width, teacher = stored_bytes(checked["dtype"]), report.get("distillation") or {}
    facts = {
        "made from": report.get("base_model"),
        "parameters before": f"{counts['before']:,}",
        "parameters after": f"{counts['after']:,}",
        "removed": percent(report["pruning_ratio"]),
        "bytes of the weights": f"{counts['after'] * width:,}" if width else None,
        **{sized(name): f"{size:,}" for name, size in report["sizes"]["after"].items()},
        "steps": f"{report['steps']:,}" if report.get("steps") else None,
        "saliency": ", ".join(map(named, report.get("saliency") or {})),
        **{named(name): config.get(name) for name in ("stream_basis", "healing", "layer_widths")},
        "CRIC": extent_of(report["cric"]) if report.get("cric") else None,
        "teacher": teacher["teacher"] if taught_by(teacher) else None,
        "replay": percent(report["replay"]["share"]) if report.get("replay") else None,
        **{f"{logged(key)}, {when}": f"{found[when]['loss']:.4f}"
           for key, found in (report.get("quality") or {}).items() for when in ("before", "after") if when in found},
        **{name: after for name, _, after in evaluation_rows(report)},
        "stored as": checked["dtype"],
        **{title: scientific(checked[name]) for name, (title, _) in VERIFIED.items()},
    }  # fmt: skip
    return {name: str(value) for name, value in facts.items() if value}
