"""A page about one smaller model, or about several: nothing in it that isn't in their reports and training logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compared import compared
from .decided import how_it_was_decided
from .figures import Span, chart, colour, strip
from .losses import Losses
from .markup import Markup, element, joined, page, table, terms
from .quality import evaluated_on, evaluation_rows, quality_rows
from .words import PHASES, STRUCTURES, VERIFIED, logged, named, percent, scientific, sized, stored_bytes, text_of

PAGE_NAME = "report.html"

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A smaller model: its name among others, its report, and the losses of its run where there are some."""

    name: str
    report: Report
    losses: Losses | None = None

    @classmethod
    def of(cls, name: str, report: Report) -> Model:
        """Take the losses of the run as the report has them."""
        losses = report.get("losses")
        return cls(name, report, Losses.from_dict(losses) if losses else None)


def report_page(models: Sequence[Model]) -> str:
    """Return the page as HTML: all of one model, or a table of several with each one's account below."""
    if len(models) == 1:
        report = models[0].report
        title = f"{_title(report)}, made smaller"
        return page(title, element("h1", title), _summary(report), *_sections(models[0]))
    accounts = (
        element("details", element("summary", model.name), _summary(model.report), *_sections(model), class_="model")
        for model in models
    )
    title = "Smaller models compared"
    return page(title, element("h1", title), *compared([(model.name, model.report) for model in models]), *accounts)


def write_page(report: Report, path: Path) -> bool:
    """Write the page about one model into a file, the losses of its run as the report has them."""
    path.write_text(report_page([Model.of("", report)]), encoding="utf-8")
    return True


def _title(report: Report) -> str:
    return report.get("base_model") or report.get("model_class") or "A model"


def _summary(report: Report) -> Markup:
    counts = report["parameters"]
    removed = (
        f"{percent(report['pruning_ratio'])} of the parameters were removed: {counts['before']:,} before, "
        f"{counts['after']:,} after."
    )
    measured = (
        f" Loss{name.removeprefix('loss')}: {before} before, {after} after."
        for name, before, after in quality_rows(report)
        if name.startswith("loss") and "–" not in (before, after)
    )
    return element("p", removed, *measured)


def _sections(model: Model) -> list[Markup]:
    """Return the parts that the report has something for."""
    report = model.report
    parts = {
        "What was removed": joined([_removed(report), _kept_units(report)]),
        "How good it is": _how_good(report),
        "How it went": _how_it_went(report, model.losses) if model.losses else Markup(),
        "How it was decided": how_it_was_decided(report),
        "How exact it is": _exact(report),
        "How to load it": _to_load(report),
        "To repeat it": _to_repeat(report),
    }
    return [element("section", element("h2", title), part) for title, part in parts.items() if part]


# -- what was removed --------------------------------------------------------------------------------------------------


def _removed(report: Report) -> Markup:
    """Return the sizes before and after, and the share that is gone."""
    counts, stored = report["parameters"], report["verification"]["dtype"]
    pairs = [("parameters", counts["before"], counts["after"])]
    width = stored_bytes(stored)
    if width:
        pairs.append((f"bytes of the weights, stored as {stored}", counts["before"] * width, counts["after"] * width))
    if report.get("vocabulary"):
        pairs.append(("tokens", *(report["vocabulary"]["tokens"][when] for when in ("before", "after"))))
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    pairs += [(sized(name), before[name], after[name]) for name in after]
    rows = ((name, f"{old:,}", f"{new:,}", percent(1 - new / old) if old else "") for name, old, new in pairs)
    return table(["", "before", "after", "removed"], rows)


def _kept_units(report: Report) -> Markup:
    """Return a heat map for each structure: a row a layer, darker where more units stayed."""
    found = []
    for index, (name, units) in enumerate((report.get("kept_units") or {}).items()):
        total, layers = units["num_units"], units["kept"]
        rows = (
            ("all" if len(layers) == 1 else layer, strip(kept, total), f"{len(kept):,} of {total:,}")
            for layer, kept in enumerate(layers)
        )
        found += [
            element("h3", named(name)),
            element("p", STRUCTURES.get(name, ""), class_="soft"),
            element("div", table(["layer", "which ones stayed, in their old order", ""], rows, class_="units"),
                    class_=colour(index)),
        ]  # fmt: skip
    return joined(found)


# -- how good it is ----------------------------------------------------------------------------------------------------


def _how_good(report: Report) -> Markup:
    """Return what the base model and the smaller one say of text that wasn't trained on."""
    found, head = [], ["", "before", "after"]
    if report.get("quality"):
        on = ", ".join(f"{part['examples']:,} of {text_of(key)}" for key, part in report["quality"].items())
        said = (
            "Before is the base model, after the trained model with its removed units at zero, both by the trainer's "
            f"own loss on the same examples: {on}."
        )
        found += [table(head, quality_rows(report)), element("p", said, class_="soft")]
    if report.get("evaluation"):
        found += [table(head, evaluation_rows(report)), element("p", evaluated_on(report), class_="soft")]
    return joined(found)


# -- how it went -------------------------------------------------------------------------------------------------------


def _how_it_went(report: Report, found: Losses) -> Markup:
    """Return the loss over the steps, with the phases of the run shaded."""
    phases = report.get("phases") or {}
    spans = [Span(named(name), start, end) for name, (start, end) in phases.items()]
    lines = {logged(key): line for key, line in found.lines.items()}
    losses = chart(lines, lambda step: f"step {step:,}", "Loss over the steps of the training", spans)
    said = terms(
        (named(name), f"steps {start + 1:,} to {end:,}: {PHASES[name]}") for name, (start, end) in phases.items()
    )
    skipped = f"Left out, as they aren't finite numbers: {found.skipped:,} logged losses." if found.skipped else ""
    return joined([losses, said, element("p", skipped)])


# -- exactness, loading, repeating -------------------------------------------------------------------------------------


def _exact(report: Report) -> Markup:
    """Return the errors that were measured before the model was published, and what each means."""
    checked = report["verification"]
    pairs = [(f"{scientific(checked[name])}: {title}", said) for name, (title, said) in VERIFIED.items()]
    compared = f" Compared on {checked['tokens']:,} random tokens." if "tokens" in checked else ""
    return joined([
        terms(pairs),
        element("p", f"Both are the largest difference of a logit, over the largest logit.{compared} They say whether "
                     "the file is the model that was trained, not how good that model is."),
    ])  # fmt: skip


def _to_load(report: Report) -> Markup:
    """Return the lines of Python that load the model and its tokenizer."""
    layers = [units["kept"] for units in (report.get("kept_units") or {}).values()]
    uneven = any(len({len(kept) for kept in found}) > 1 for found in layers)
    name = report.get("model_class") or "AutoModelForCausalLM"
    loader = "AutoModelForCausalLM" if uneven or name.endswith("ForCausalLM") else name
    options = ", trust_remote_code=True" if uneven else ""
    code = (
        f"from transformers import {loader}, AutoTokenizer\n"
        f'model = {loader}.from_pretrained("path/to/this/model"{options})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")\n'
    )
    why = "Its layers differ in width, so it comes with a short modelling file of its own." if uneven else ""
    engines = (element("li", f"{said}.") for said in report.get("serving") or ())
    return joined([element("pre", element("code", code)), element("p", why), element("ul", *engines)])


def _to_repeat(report: Report) -> Markup:
    """Return the run's config as a recipe has it, its steps, and the versions that it ran on."""
    import yaml

    found, asked = [], report.get("recipe") or {"hesso": report.get("hesso_config")}
    if report.get("command"):
        found += [element("p", "The command:"), element("pre", element("code", report["command"]), class_="command")]
    if asked.get("hesso"):
        recipe = yaml.safe_dump(asked, sort_keys=False, allow_unicode=True)
        found += [element("p", "What was asked for, as a recipe of ", element("code", "hesso-hf prune"), " has it:"),
                  element("pre", element("code", recipe))]  # fmt: skip
    facts = {"model": report.get("base_model"), "class": report.get("model_class")}
    facts |= {f"{named(name)} (resolved)": value for name, value in (report.get("schedule") or {}).items()}
    facts |= {f"{named(name)} (training)": value for name, value in (report.get("hyperparameters") or {}).items()}
    facts |= report.get("versions") or {}
    shown = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in facts.items())
    return joined([*found, table(["", ""], ((name, value) for name, value in shown if value not in (None, "")))])
