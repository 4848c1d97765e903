"""A page about one smaller model, or about several: nothing in it that isn't in their reports and training logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .compared import compared
from .decided import how_it_was_decided
from .figures import Line, Span, chart, colour, courses, strip
from .losses import Losses, removed_until_the_end
from .markup import Markup, coded, element, joined, page, table, terms
from .quality import evaluated_on, gained_rows, measured_on, quality_rows
from .served import loader_of, serving_commands, serving_note
from .words import PHASES, RECIPE, STRUCTURES, VERIFIED, Report, logged, named, percent, scientific, sized


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


def write_page(report: Report, path: Path) -> None:
    """Write the page about one model into a file, the losses of its run as the report has them."""
    path.write_text(report_page([Model.of("", report)]), encoding="utf-8")


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
        "What it gained": _gained(report),
        "What was removed": joined([_removed(report), _kept_units(report)]),
        "How it went": _how_it_went(report, model.losses),
        "How it was decided": how_it_was_decided(report),
        "How exact it is": _exact(report),
        "How to load and serve it": _to_load(report),
        "To repeat it": _to_repeat(report),
    }
    return [element("section", element("h2", title), part) for title, part in parts.items() if part]


# -- what it gained ----------------------------------------------------------------------------------------------------


def _gained(report: Report) -> Markup:
    """Return what is known of the base model and the smaller one: size, loss, tasks, speed."""
    found = [table(["", "before", "after", "change"], gained_rows(report))]
    if on := measured_on(report):
        said = (
            "Before is the base model, after the trained model with its removed units at zero, both by the trainer's "
            f"own loss on the same examples: {on}."
        )
        found.append(element("p", said, class_="soft"))
    added = evaluated_on(report) if report.get("evaluation") else (
        "hesso-hf eval BASE SMALL --card adds speed here, loss with --dataset, and tasks with --tasks."
    )  # fmt: skip
    return joined([*found, element("p", added, class_="soft")])


# -- what was removed --------------------------------------------------------------------------------------------------


def _removed(report: Report) -> Markup:
    """Return the sizes before and after, and the share that is gone."""
    pairs = []
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


# -- how it went -------------------------------------------------------------------------------------------------------


def _how_it_went(report: Report, losses: Losses | None) -> Markup:
    """Return the loss and the share that is gone over the steps, with the phases of the run shaded."""
    phases, removed = report.get("phases") or {}, removed_until_the_end(report)
    spans = [Span(named(name), start, end) for name, (start, end) in phases.items()]
    found = []
    if losses:
        lines = [*courses((logged(key), line) for key, line in losses.lines.items()), *_dense(report, losses)]
        found.append(chart(lines, _at_step, "Loss over the steps of the training", spans))
    elif phases:
        found.append(element("p", "No loss was logged: set ", element("code", "logging_steps"), ".", class_="soft"))
    if removed:
        share = Line("", removed, None, "steps")
        found.append(chart([share], _at_step, "Share of the parameters that is removed", spans, percent))
    if not found:
        return Markup()
    said = terms((named(name), f"{_steps(*span)}: {PHASES[name]}") for name, span in phases.items())
    skipped = losses.skipped if losses else 0
    left_out = f"Left out, as they aren't finite numbers: {skipped:,} logged losses." if skipped else ""
    return joined([element("div", *found, class_="figures"), said, element("p", left_out)])


def _dense(report: Report, losses: Losses) -> Iterator[Line]:
    """Yield the base model's losses, each of the colour of what was logged of the same text while it was trained."""
    keys, last = list(losses.lines), max(step for line in losses.lines.values() for step, _ in line)
    for key, found in (report.get("quality") or {}).items():
        if "before" in found:
            keys += [key] if key not in keys else []
            level = [(step, found["before"]["loss"]) for step in (0, last)]
            yield Line(f"{logged(key)}, base model", level, keys.index(key), "mark")


def _steps(done: int, end: int) -> str:
    return f"step {end:,}" if end == done + 1 else f"steps {done + 1:,} to {end:,}"


def _at_step(step: float) -> str:
    return f"step {step:,}"


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
    """Return the lines of Python that load the model and its tokenizer, and the commands that serve it."""
    layers = [units["kept"] for units in (report.get("kept_units") or {}).values()]
    uneven = any(len({len(kept) for kept in found}) > 1 for found in layers)
    loader = loader_of(report)
    options = ", trust_remote_code=True" if uneven else ""
    code = (
        f"from transformers import {loader}, AutoTokenizer\n"
        f'model = {loader}.from_pretrained("path/to/this/model"{options})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")\n'
    )
    why = "Its layers differ in width, so it comes with a short modelling file of its own." if uneven else ""
    engines = (element("li", coded(f"{said}.")) for said in report.get("serving") or ())
    commands = "\n".join(serving_commands(report))
    served = element("pre", element("code", commands), class_="command") if commands else ""
    note = element("p", serving_note(uneven), class_="soft")
    return joined([element("pre", element("code", code)), element("p", why), served, note, element("ul", *engines)])


def _to_repeat(report: Report) -> Markup:
    """Return the run's config as a recipe has it, its steps, and the versions that it ran on."""
    import yaml

    found, asked = [], report.get("recipe") or {"hesso": report.get("hesso_config")}
    if report.get("command"):
        found += [element("p", "The command:"), element("pre", element("code", report["command"]), class_="command")]
    if asked.get("hesso"):
        beside = joined([" (", element("code", RECIPE), " beside the model)"]) if report.get("recipe") else ""
        recipe = yaml.safe_dump(asked, sort_keys=False, allow_unicode=True)
        command = element("code", "hesso-hf prune")
        found.append(element("p", "What was asked for, as a recipe of ", command, " has it", beside, ":"))
        found.append(element("pre", element("code", recipe)))
    facts = {"model": report.get("base_model"), "class": report.get("model_class")}
    facts |= {f"{named(name)} (resolved)": value for name, value in (report.get("schedule") or {}).items()}
    facts |= {f"{named(name)} (training)": value for name, value in (report.get("hyperparameters") or {}).items()}
    facts |= report.get("versions") or {}
    shown = ((name, ", ".join(map(str, value)) if isinstance(value, list) else value) for name, value in facts.items())
    return joined([*found, table(["", ""], ((name, value) for name, value in shown if value not in (None, "")))])
