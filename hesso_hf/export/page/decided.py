"""How it was decided what goes, as a report tells it: what each structure costs, the split, and the choice of units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figures import chart
from .markup import Markup, element, joined, table, terms
from .words import SALIENCIES, amount, named, percent, scientific

Report = Mapping[str, Any]


def how_it_was_decided(report: Report) -> Markup:
    """Return all that a run's report says of its decision; nothing for weights that were exported without a run."""
    return joined([_curves(report.get("calibration")), _split(report.get("target")), _choice(report),
                   _cric(report.get("cric"))])  # fmt: skip


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
        chart(lines, _so_far, "Rise of the loss over the share of units removed"),
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


def _basis(basis: Mapping[str, Any] | None) -> str:
    if not basis:
        return "They are the checkpoint's own: the model wasn't turned."
    energy = ", ".join(f"the first {percent(float(k))} hold {percent(v)}" for k, v in basis["energy"].items())
    return (
        f"The model was first turned, by {basis['tokens']:,} tokens of its data, so that its most important directions "
        f"come first: {energy} of what the layers see. Turning cost {basis['rise']:.2g} nats a token; a tiny model of "
        f"the same class gave the same logits up to {scientific(basis['error'])}."
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
    return (
        f"It learnt from {teacher['teacher']} as well (weight {teacher['alpha']:g}, "
        f"temperature {teacher['temperature']:g})."
    )


def _cric(cric: Mapping[str, Any] | None) -> Markup:
    """Return what CRIC changed, in plain words."""
    if not cric:
        return Markup()
    rows = (
        (named(name), f"{found['first']:,}", f"{found['num_corrected']:,}", " → ".join(map(str, found["violating"])))
        for name, found in cric["structures"].items()
    )
    return joined([
        element("h3", "Corrections by CRIC"),
        element("p", "A unit that looks unneeded may turn out to be needed on its way to zero. CRIC let the candidates "
                     f"go part of that way in {cric['cycles']:,} cycles of {cric['samples_per_cycle']:,} looks each, "
                     "and judged them again by what it saw. Corrected units were candidates at first and stayed in "
                     "the end; as many others went instead."),
        table(["", "candidates at first", "corrected", "tried for the first time in each cycle"], rows),
    ])  # fmt: skip
