"""Models side by side: what `eval` is asked, checked without a framework, and the table of what it finds."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.files import REPORT_NAME
from ..errors import HessoError
from ..export.page.measures import COMPARED, MEASURES
from .data import check_text_file
from .report import names_of

PICTURES = (".svg", ".png")


def check_comparison(flags: Namespace) -> None:
    """Refuse flags of `eval` that can't be followed.

    Raises:
        HessoError: naming the flag.
    """
    for name in flags.models:
        if flags.models.count(name) > 1:
            raise HessoError(f"`model` ({name!r}) is named more than once; name each once")
    short_names(flags.models)
    for name, needed in (
        ("num_fewshot", "tasks"), ("include_path", "tasks"), ("split", "dataset"), ("dataset_config", "dataset"),
        ("joined", "dataset"), ("chat_template", "dataset"),
    ):  # fmt: skip
        value = getattr(flags, name)
        if value not in (None, False) and getattr(flags, needed) is None:
            raise HessoError(
                f"`--{name.replace('_', '-')}` ({value!r}) does nothing without `--{needed}`: give that too"
            )
    if flags.limit is not None and flags.dataset is None and flags.tasks is None:
        raise HessoError(f"`--limit` ({flags.limit}) does nothing without `--dataset` or `--tasks`: give one of them")
    for name, least in (("block_size", 2), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0), ("new_tokens", 0)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise HessoError(f"`--{name.replace('_', '-')}` ({value}) must be at least {least}")
    if flags.card and not reported(flags.models):
        raise HessoError("`--card` writes into folders of smaller models, and none of those named is one")
    if flags.dataset is not None:
        check_text_file(flags.dataset)
    if flags.chat_template is not None and not Path(flags.chat_template).is_file():
        raise HessoError(f"`--chat-template` ({flags.chat_template!r}): no such file")
    if flags.include_path is not None and not Path(flags.include_path).is_dir():
        raise HessoError(f"`--include-path` ({flags.include_path!r}) is no folder; give the one with the task files")
    if flags.output is not None:
        _check_output(flags)


def _check_output(flags: Namespace) -> None:
    """Refuse a file that can't be written."""
    path = Path(flags.output)
    if path.suffix.lower() not in (".json", ".md", *PICTURES):
        raise HessoError(f"`--output` ({flags.output!r}) must end in .json, .md, .svg or .png")
    if not path.absolute().parent.is_dir():
        raise HessoError(f"`--output` ({flags.output!r}): there is no folder {str(path.parent)!r}; make it first")
    if path.suffix.lower() in PICTURES and len(flags.models) < 2:
        raise HessoError(f"`--output` ({flags.output!r}) is a picture that compares models: name two or more")
    if path.suffix.lower() in PICTURES and find_spec("matplotlib") is None:
        raise HessoError(f"`--output` ({flags.output!r}) needs matplotlib: pip install 'hesso_hf[plots]'")


def short_names(models: Iterable[str]) -> list[str]:
    """Return what models are called in a table: the shortest ends of their names that tell them apart.

    Raises:
        HessoError: where a folder is named twice.
    """
    return names_of([Path(name).resolve() if Path(name).is_dir() else Path(name) for name in models])


def reported(models: Iterable[str]) -> list[str]:
    """Return those of models that are folders with a report."""
    return [name for name in models if (Path(name) / REPORT_NAME).is_file()]


def comparison_table(models: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Return title, header and rows: a column for each model, in those after the first the change against it.

    Args:
        models: what `measure_models` found; a row that one of them lacks is left out.
    """
    base = models[0]
    title = f"on {base['device']}, batches of {base['batch_size']} x {base['block_size']} tokens"
    if base.get("joined"):
        title += ", text joined"
    rows = [["dtype", *[model["dtype"] for model in models]]]
    for key, measure in MEASURES.items():
        if all(key in model for model in models):
            cells = [_cell(model[key], base[key], measure.form, measure.by_ratio) for model in models]
            rows.append([measure.label.format(base["batch_size"]), *cells])
    for task, key, label in metrics_of(base) if all("tasks" in model for model in models) else ():
        error, found = key.replace(",", "_stderr,"), [model["tasks"][task] for model in models]
        rows.append([label, *[_cell(one[key], found[0][key], ".4f", False, one.get(error)) for one in found]])
    return title, ["measure", *short_names([model["model"] for model in models])], rows


def metrics_of(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the metrics of a model's tasks: the task, lm-eval's key, and what a table calls it."""
    for task, scores in model.get("tasks", {}).items():
        for key in scores:
            metric, filtered, filter_name = key.partition(",")
            if filtered and not metric.endswith("_stderr"):  # else no metric, or the error of one
                yield task, key, f"{task} {metric}" if filter_name == "none" else f"{task} {metric} ({filter_name})"


def evaluation_of(
    base: Mapping[str, Any] | None,
    small: Mapping[str, Any],
    dataset: str | None,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a smaller model's report says of an evaluation.

    Args:
        base: what was measured of the model that it came of, None where that wasn't.
        small: what was measured of it.
        dataset: whose text was read.
        asked: what else says how it was measured, where that was given: `limit`, `num_fewshot`, `split`, `joined`.
    """
    models = {"after": small} if base is None else {"before": base, "after": small}
    known = [key for key in COMPARED if all(model.get(key) is not None for model in models.values())]
    errors: dict[str, dict[str, float]] = {}
    values = {key: {when: model[key] for when, model in models.items()} for key in known}
    for task, key, label in metrics_of(small):
        values[label] = {when: model["tasks"][task][key] for when, model in models.items()}
        found = {when: model["tasks"][task].get(key.replace(",", "_stderr,")) for when, model in models.items()}
        errors[label] = {when: error for when, error in found.items() if error is not None and math.isfinite(error)}
    for name in [name for name, found in values.items() if not all(map(math.isfinite, found.values()))]:
        print(f"hesso-hf: {name} isn't a finite number, and is left out of the card", file=sys.stderr)
        del values[name]
        errors.pop(name, None)
    how = {key: small[key] for key in ("dtype", "device", "batch_size", "block_size")}
    given = {key: value for key, value in (asked or {}).items() if value not in (None, False)}
    return {"dataset": dataset and Path(dataset).name, **how, **given, "values": values, "errors": errors}


def markdown_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return the table in Markdown, below its title."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([f"Measured {title}.", "", *[f"| {' | '.join(line)} |" for line in lines]])


def _cell(value: Any, base: Any, form: str, ratio: bool, error: float | None = None) -> str:
    """Write a value, its standard error where there is one, and how it differs from the first model's."""
    if value is None:
        return "-"
    text = format(value, form) if error is None else f"{value:{form}} ± {error:{form}}"
    if base is None or value == base:
        return text
    return f"{text} ({value / base - 1:+.1%})" if ratio else f"{text} ({value - base:+{form}})"
