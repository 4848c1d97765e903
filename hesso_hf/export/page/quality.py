"""What a smaller model costs and gains, before and after, in rows that its card and its page share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .measures import MEASURES
from .words import Report, memory, named, stored_bytes, text_of

# What was measured, its values, whether they compare by a ratio, how they are written ("" with about five digits), and
# their standard errors.
Row = tuple[str, Mapping[str, float], bool, str, Mapping[str, float]]


def quality_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what was measured while the model was trained: what it is, before, after."""
    for name, values, _, form, errors in _quality(report):
        yield name, *_before_after(values, form, errors)


def evaluation_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what `hesso-hf eval` measured afterwards: what it is, before, after."""
    for name, values, _, form, errors in _evaluation(report):
        yield name, *_before_after(values, form, errors)


def gained_rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yield everything that is known before and after, and its change: size first, then what was measured."""
    counts, stored = report["parameters"], report["verification"]["dtype"]
    yield "parameters", f"{counts['before']:,}", f"{counts['after']:,}", _change(counts, True)
    width = stored_bytes(stored)
    if width:
        before, after = (memory(counts[when] * width, counts["before"] * width) for when in ("before", "after"))
        yield f"memory of the weights, in {stored}", before, after, _change(counts, True)
    for name, values, by_ratio, form, errors in (*_quality(report), *_evaluation(report)):
        yield name, *_before_after(values, form, errors), _change(values, by_ratio)


def evaluated_on(report: Report) -> str:
    """Say how `hesso-hf eval` measured."""
    found = report["evaluation"]
    how = [
        f", {words.format(found[key])}" for key, words in {
            "split": "split {}", "joined": "as one text", "limit": "at most {:,} examples of each",
            "num_fewshot": "{} examples in a task's prompt",
        }.items() if key in found
    ]  # fmt: skip
    return (
        f"Measured by hesso-hf eval{' on ' + found['dataset'] if found['dataset'] else ''}, in {found['dtype']} on "
        f"{found['device']}, batches of {found['batch_size']:,} x {found['block_size']:,} tokens{''.join(how)}."
    )


def _quality(report: Report) -> Iterator[Row]:
    for key, found in (report.get("quality") or {}).items():
        unit = " (nats per token)" if found["tokens"] else ""
        for measure, of, by_ratio in (("loss", unit, False), ("perplexity", "", True)):
            values = {when: found[when][measure] for when in ("before", "after") if measure in found.get(when, {})}
            if values:
                yield f"{measure} on {text_of(key)}{of}", values, by_ratio, "", {}


def _evaluation(report: Report) -> Iterator[Row]:
    evaluation = report.get("evaluation") or {}
    for name, values in evaluation.get("values", {}).items():
        if name in ("loss", "perplexity"):
            on = f" on {evaluation['dataset']}" if evaluation["dataset"] else ""
            yield f"{name}{on}", values, MEASURES[name].by_ratio, "", {}
        elif name in MEASURES:
            measure = MEASURES[name]
            yield measure.label.format(evaluation["batch_size"]), values, measure.by_ratio, measure.form, {}
        else:  # the metric of a task
            yield named(name), values, False, "", evaluation.get("errors", {}).get(name, {})


def measured_on(report: Report) -> str:
    """Return on which texts a run measured losses, and on how many examples of each; "" where on none."""
    quality = report.get("quality") or {}
    return ", ".join(f"{text_of(key)} ({found['examples']:,})" for key, found in quality.items())


def _before_after(values: Mapping[str, float], form: str, errors: Mapping[str, float]) -> tuple[str, str]:
    """Return both of a pair of values as they are written, with standard errors; a dash for one that isn't there."""
    before, after = (
        " ± ".join(_written(of[when], form) for of in (values, errors) if when in of) or "–"
        for when in ("before", "after")
    )
    return before, after


def _written(value: float, form: str) -> str:
    """Write a value as its measure says, or with about five digits."""
    if form:
        return format(value, form)
    return f"{value:,.{4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def _change(values: Mapping[str, float], by_ratio: bool) -> str:
    """Return by how much a value rose, as a share of what it was where that is how it compares."""
    if not {"before", "after"} <= values.keys() or (by_ratio and not values["before"]):
        return ""
    if by_ratio:
        return f"{values['after'] / values['before'] - 1:+.1%}"
    return f"{values['after'] - values['before']:+.4f}"
