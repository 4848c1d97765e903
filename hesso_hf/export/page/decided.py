"""How it was decided what goes, as a report tells it: what each structure costs, the split, and the choice of units."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any

from .figures import Line, chart, courses
from .markup import Markup, element, joined, table, terms
from .words import SALIENCIES, Report, amount, named, percent, scientific, tried_in

_WIDE = 50.0  # scores of which the highest is so many times the lowest


def how_it_was_decided(report: Report) -> Markup:
    """Return all that a run's report says of its decision; nothing for weights that were exported without a run."""
    return joined([_curves(report.get("calibration")), _split(report.get("target")), _choice(report),
                   _scores(report.get("scores")), _cric(report.get("cric"))])  # fmt: skip


def _curves(measured: Mapping[str, Any] | None) -> Markup:
    """Return the measured rises of the loss, as lines and as a table."""
    if not measured:
        return Markup()
    removed, rises = measured["removed"], measured["rises"]
    lines = {named(name): list(zip(removed[name], rises[name], strict=True)) for name in removed}
    rows = ((name, percent(share), f"{rise:.4f}") for name, points in lines.items() for share, rise in points)
    lines = {name: [(0.0, 0.0), *points] for name, points in lines.items()}
    return joined([
        element("h3", "What each structure costs"),
        element("p", "Before training, more and more of the least needed units of one kind were taken out on a few "
                     "examples, and the rise of the loss was measured. The flatter a line, the more of it may go."),
        chart(courses(lines.items()), _so_far, "Rise of the loss over the share of units removed"),
        element("details", element("summary", "The numbers"),
                table(["", "removed", "rise of the loss"], rows)),
    ])  # fmt: skip


def _so_far(share: float) -> str:
    return f"{percent(share)} removed" if share else "none removed"


def _split(target: Mapping[str, Any] | None) -> Markup:
    """Return how many units of each structure were to stay in a layer, and what the budget counts."""
    if not target:
        return Markup()
    units = target["num_units"]
    rows = (
        (named(name), f"{units[name]:,}", f"{kept:,}", percent(1 - kept / units[name]))
        for name, kept in target["kept_units"].items()
    )
    return joined([
        element("h3", "The split"),
        element("p", f"The budget counts {named(target['metric'])}: {amount(target['cost_before'])} before, "
                     f"{amount(target['cost_after'])} after. To meet it, so many units of each kind stay in a layer:"),
        table(["", "units", "stay", "removed"], rows),
    ])  # fmt: skip


def _choice(report: Report) -> Markup:
    """Return what units were ranked by, and what else the run did besides training."""
    config = report.get("hesso_config") or {}
    said: list[tuple[object, object]] = []
    weights = report.get("saliency") or {}
    if weights:
        judged = "; ".join(f"{named(n)} (weight {w:g}): {SALIENCIES.get(n, '')}" for n, w in weights.items())
        said.append(("Which units go", f"Those that score lowest. A unit's score: {judged}."))
    if config:
        said += [("Channels of the stream", _basis(report.get("stream_basis"))), ("Healing", _healing(config))]
        said += [("Replay", _replay(report.get("replay"))), ("Teacher", _teacher(report.get("distillation")))]
    return joined([element("h3", "The choice of units"), terms(said)] if said else [])


def _scores(scores: Mapping[str, Any] | None) -> Markup:
    """Return a picture for each structure: the scores of its units in their order, what went and what stayed."""
    if not scores:
        return Markup()
    return joined([
        element("h3", "The scores and the cut"),
        element("p", "The units that compete with each other, from the lowest score to the highest: those of a layer, "
                     "in the mean over all layers, or those of all layers where these compete. A unit that went is "
                     "shown by the score it went by, one that stayed by its last."),
        element("div", *(_cut(name, found) for name, found in scores.items() if found["points"]), class_="figures"),
    ])  # fmt: skip


def _cut(name: str, found: Mapping[str, Any]) -> Markup:
    """Return the picture of one structure; scores that differ by more than a picture shows by their logarithm."""
    removed, points = found["removed"], found["points"]
    scores = [score for _, score in points]
    low, high = min(scores), max(scores)
    wide = low > 0 and high > _WIDE * low
    drawn = [(rank, log10(score)) for rank, score in points] if wide else points
    parts = [
        Line("went", [(rank, y) for rank, y in drawn if rank < removed], 1),
        Line("stayed", [(rank, y) for rank, y in drawn if rank >= removed], 0),
        Line("the cut", [(removed - 0.5, log10(y) if wide else y) for y in (low, high)], None, "mark"),
    ]
    label = f"{named(name)}: {removed:,} of {found['units']:,} went{'; scores by their logarithm' if wide else ''}"
    return chart(
        [part for part in parts if part.points],
        lambda rank: "highest" if rank else "lowest",
        label,
        value=lambda y: f"{10**y if wide else y:.2g}",
    )


def _basis(basis: Mapping[str, Any] | None) -> str:
    if not basis:
        return "They are the checkpoint's own: the model wasn't turned."
    energy = ", ".join(f"the first {percent(float(k))} hold {percent(v)}" for k, v in basis["energy"].items())
    return (
        f"The model was first turned, by {basis['tokens']:,} tokens of its data, so that its most important directions "
        f"come first: {energy} of what the layers see. Turning cost {basis['rise']:.2g} nats per token; a tiny model "
        f"of the same class gave the same logits up to {scientific(basis['error'])}."
    )


def _healing(config: Mapping[str, Any]) -> str:
    if config.get("healing") == "off":
        return "Off: training alone made up for what was removed."
    return (
        "Allowed: where it lowers the error on held-out tokens, matrices that stay are refitted to say what the "
        "removed units said."
    )


def _replay(replay: Mapping[str, Any] | None) -> str:
    if not replay:
        return "None."
    return (
        f"{percent(replay['share'])} of the tokens trained on were text written by {replay['source']}, on which the "
        "model is held near the original one, so that it keeps what the data doesn't teach."
    )


def _teacher(teacher: Mapping[str, Any] | None) -> str:
    if not teacher:
        return "None."
    if not teacher["alpha"]:
        excess = teacher["surprise"]
        told = "" if excess is None else f" Its loss there is {excess:.2f} nats per token above what it expects."
        return f"None on the training data: {teacher['teacher']} doesn't know them, or can't be compared.{told}"
    if not teacher.get("learnt", True):
        return f"None on the training data: {teacher['teacher']} never predicted them better."
    ahead = ", while that predicted the training data better" if teacher.get("auto") else ""
    return (
        f"It learnt from {teacher['teacher']} as well{ahead} (weight {teacher['alpha']:g}, "
        f"temperature {teacher['temperature']:g})."
    )


def _cric(cric: Mapping[str, Any] | None) -> Markup:
    """Return what CRIC changed, in plain words."""
    if not cric:
        return Markup()
    rows = (
        (named(name), f"{found['first']:,}", f"{found['num_corrected']:,}", " → ".join(map(str, found["violating"])))
        for name, found in tried_in(cric).items()
    )
    how = (
        f"go part of that way in {cric['cycles']:,} cycles of {cric['samples_per_cycle']:,} looks each, and judged "
        "them again by what it saw."
    )
    if cric["mode"] == "healed":
        how = (
            f"go on trial once in each of the {cric['cycles']:,} pruning periods, the others standing in for them, and "
            "judged all units again by what the model then minded."
        )
    return joined([
        element("h3", "Corrections by CRIC"),
        element("p", "A unit that looks unneeded may turn out to be needed on its way to zero. CRIC let the candidates "
                     f"{how} Corrected units were candidates and stayed in the end; others went instead."),
        table(["", "candidates", "corrected", "tried for the first time in each cycle"], rows),
    ])  # fmt: skip
