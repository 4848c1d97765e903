"""How good a model is before and after, in rows that its card and its page share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .words import named, text_of

Report = Mapping[str, Any]


def quality_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what was measured while the model was trained: what it is, before, after."""
    for key, found in (report.get("quality") or {}).items():
        unit = " (nats a token)" if found["tokens"] else ""
        for measure, of in (("loss", unit), ("perplexity", "")):
            values = {when: found[when][measure] for when in ("before", "after") if measure in found.get(when, {})}
            if values:
                yield f"{measure} on {text_of(key)}{of}", *before_after(values)


def evaluation_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what `hesso-hf eval` measured afterwards: what it is, before, after."""
    for name, values in (report.get("evaluation") or {}).get("values", {}).items():
        yield named(name), *before_after(values)


def before_after(values: Mapping[str, float]) -> tuple[str, str]:
    """Return both of a pair of values as they are written, a dash for one that isn't there."""
    before, after = (_written(values[when]) if when in values else "–" for when in ("before", "after"))
    return before, after


def _written(value: float) -> str:
    """Write a value with about five digits."""
    return f"{value:,.{4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def evaluated_on(report: Report) -> str:
    """Say how `hesso-hf eval` measured."""
    found = report["evaluation"]
    return (
        f"Measured by hesso-hf eval{' on ' + found['dataset'] if found['dataset'] else ''}, in {found['dtype']} on "
        f"{found['device']}, batches of {found['batch_size']:,} x {found['block_size']:,} tokens."
    )
