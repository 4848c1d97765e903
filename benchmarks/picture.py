"""Draw docs/quality.svg from quality.json: the loss over the removed share and over training tokens, on two texts.

    make picture        or  python benchmarks/picture.py [--model smollm2] [--output docs/quality.svg]

The model is the largest one measured at several ratios. Left: text like that trained on. Right: other text. Above: the
loss of each method over the share of the parameters that was really removed, at the most training tokens at which HESSO
and enough peers were measured at several shares. Below, where there is a curve: over training tokens, at the ratio that
was measured at most of them. Points are medians over seeds. What lies far above HESSO is named at the upper edge with
its number. The colours are of one lightness, which stands out from a white page as from a dark one; the ground is left
transparent.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

RESULTS = Path(__file__).parent / "results" / "quality.json"
PICTURE = Path(__file__).parents[1] / "docs" / "quality.svg"
MODELS = {"smollm2": "SmolLM2-135M-Instruct"}
SIDES = {
    ("docs", "in"): "held-out Python documentation", ("docs", "out"): "WikiText-2",
    ("stories", "in"): "held-out TinyStories", ("stories", "out"): "Shakespeare's plays",
}  # fmt: skip
INK, HESSO, ABLATION = "#737d88", "#d4502f", "#b9644c"
# name in the JSON: label, colour
PEERS = {
    "OBS": ("OBS", "#3f78d8"),
    "FLAP": ("FLAP", "#0f86a8"),
    "Wanda-sp": ("Wanda-sp", "#6f73c9"),
    "one-shot, first-order Taylor": ("Taylor", "#9065c4"),
    "one-shot, magnitude": ("magnitude", "#b0579e"),
    "ShortGPT": ("ShortGPT", "#3b8a4d"),
    "scratch": ("from scratch", "#8a7a2e"),
}
DENSE = "dense"
ENOUGH = 3  # peers, to show runs of one length though more were measured at another
REACH = 3.0  # times HESSO's largest gap to the dense model: what lies above is named at the edge
LINE = 0.058  # height of a label, as a share of the panel's
HEIGHT, HEAD, FOOT, GAP = 3.95, 0.35, 0.54, 0.28  # inches: of a row, of the title, below and above a panel


@dataclass(frozen=True)
class Series:
    """One method's points: x and the loss, ascending in x."""

    method: str
    points: tuple[tuple[float, float], ...]

    @property
    def label(self) -> str:
        """Return what is written beside it."""
        if self.method in PEERS:
            return PEERS[self.method][0]
        if self.method == "hesso":
            return "HESSO"
        return "· " + self.method.removeprefix("hesso, ").replace("without", "no").replace("reconstruction", "recon.")

    @property
    def colour(self) -> str:
        """Return a peer's own colour, or HESSO's."""
        if self.method in PEERS:
            return PEERS[self.method][1]
        return HESSO if self.method == "hesso" else ABLATION


@dataclass(frozen=True)
class Panel:
    """What one panel shows; `dense` is the unpruned model trained alike, by x."""

    title: str
    x_label: str
    ticks: tuple[float, ...]
    series: tuple[Series, ...]
    dense: tuple[tuple[float, float], ...]
    logarithmic: bool = False

    @property
    def ceiling(self) -> float:
        """Return the loss at the upper edge: that of HESSO and of the best peer is always below."""
        every = [loss for series in self.series for _, loss in series.points]
        own = [loss for series in self.series if series.method not in PEERS for _, loss in series.points] or every
        ends = [series.points[-1][1] for series in self.series if series.method in PEERS]
        base = min([loss for _, loss in self.dense] or own)
        reach = max([base + REACH * (max(own) - base), *([min(ends)] if ends else [])])
        return min(reach, max(every)) + 0.05 * (reach - base)


def largest(result: dict[str, Any]) -> str:
    """Return the largest model that was measured at several ratios, of which there is a curve; else the largest."""
    ratios: dict[str, set[float]] = {}
    for run in result["runs"]:
        ratios.setdefault(run["model"], set()).add(run["ratio"])
    several = [name for name, found in ratios.items() if len(found - {0.0}) > 1]
    return max(several or ratios, key=lambda name: result["base"][name]["parameters"])


def panels(result: dict[str, Any], model: str) -> tuple[tuple[Panel, Panel], ...]:
    """Return a model's panels by row, each on text like that trained on and on other text.

    The first row is by share, the second, where there is a curve, by tokens.

    Raises:
        SystemExit: where nothing of it was pruned.
    """
    runs = [run for run in result["runs"] if run["model"] == model]
    pruned = [run for run in runs if run["ratio"]]
    if not pruned:
        raise SystemExit(f"quality.json has no run of {model} with anything removed")
    text, full = result["settings"][model]["text"], result["base"][model]["parameters"]
    known, other = SIDES[text, "in"], f"other text: {SIDES[text, 'out']}"
    alike = [run for run in runs if run["tokens"] == _longest(pruned)]
    by_share = (_by_share(alike, full, "in", known), _by_share(alike, full, "out", other))
    ratio = max({run["ratio"] for run in pruned}, key=lambda ratio: (len(_tokens(pruned, ratio)), ratio))
    if len(_tokens(pruned, ratio)) == 1:
        return (by_share,)
    share = f"{ratio:.0%} removed"
    return by_share, (_by_tokens(runs, ratio, "in", share), _by_tokens(runs, ratio, "out", f"{share}, other text"))


def _by_share(runs: list[dict[str, Any]], full: int, side: str, title: str) -> Panel:
    """Return the losses over the share removed of `full` parameters, of one model's runs on as many tokens."""
    pruned = [run for run in runs if run["ratio"]]
    return Panel(
        title,
        f"parameters removed, after {runs[0]['tokens']:,} tokens",
        (0.0, *sorted({run["ratio"] for run in pruned})),
        _series(pruned, side, lambda run: 1 - run["parameters"] / full),
        _points([run for run in runs if run["method"] == DENSE], side, lambda run: 0.0),
    )


def _by_tokens(runs: list[dict[str, Any]], ratio: float, side: str, title: str) -> Panel:
    """Return the losses over training tokens at one ratio, of the methods that were measured as often as HESSO."""
    pruned = [run for run in runs if run["ratio"] == ratio]
    found = _series(pruned, side, lambda run: run["tokens"])
    often = max((len(series.points) for series in found if series.method == "hesso"), default=0)
    return Panel(
        title,
        "training tokens",
        tuple(sorted(_tokens(pruned, ratio))),
        tuple(series for series in found if len(series.points) >= often),
        _points([run for run in runs if run["method"] == DENSE], side, lambda run: run["tokens"]),
        logarithmic=True,
    )


def _longest(pruned: list[dict[str, Any]]) -> int:
    """Return the most tokens at which HESSO and `ENOUGH` peers were measured at two shares; else where most were."""
    counts = sorted({run["tokens"] for run in pruned}, reverse=True)
    for tokens in counts:
        found = _measured(pruned, tokens)
        peers = {ratio: sum(of == ratio and method in PEERS for method, of in found) for _, ratio in found}
        if sum(count >= ENOUGH and ("hesso", ratio) in found for ratio, count in peers.items()) > 1:
            return tokens
    return max(counts, key=lambda tokens: (len(_measured(pruned, tokens)), tokens))


def _measured(runs: Iterable[dict[str, Any]], tokens: int) -> set[tuple[str, float]]:
    return {(run["method"], run["ratio"]) for run in runs if run["tokens"] == tokens}


def _tokens(runs: Iterable[dict[str, Any]], ratio: float) -> set[int]:
    return {run["tokens"] for run in runs if run["ratio"] == ratio}


def _series(runs: list[dict[str, Any]], side: str, place: Callable[[dict[str, Any]], float]) -> tuple[Series, ...]:
    """Return a series for each method, but for HESSO's variants that were measured less often than HESSO."""
    methods = dict.fromkeys(run["method"] for run in runs)
    found = [Series(each, _points([run for run in runs if run["method"] == each], side, place)) for each in methods]
    often = max((len(series.points) for series in found if series.method == "hesso"), default=0)
    return tuple(each for each in found if len(each.points) >= often or not each.method.startswith("hesso, "))


def _points(
    runs: list[dict[str, Any]], side: str, place: Callable[[dict[str, Any]], float]
) -> tuple[tuple[float, float], ...]:
    """Return medians over seeds, of x too, since seeds may choose other sizes."""
    alike: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for run in runs:
        alike.setdefault((run["ratio"], run["tokens"]), []).append(run)
    medians = [
        (statistics.median(map(place, found)), statistics.median(run[side] for run in found))
        for found in alike.values()
    ]
    return tuple(sorted(medians))


def draw(result: dict[str, Any], model: str) -> Figure:
    """Draw all panels."""
    rows = panels(result, model)
    height = HEIGHT * len(rows) + HEAD
    figure = Figure(figsize=(8.0, height))
    figure.patch.set_alpha(0)
    for row, axes, above in zip(rows, figure.subplots(len(rows), 2, squeeze=False), range(len(rows)), strict=True):
        for axis, panel, start in zip(axes, row, (0.055, 0.56), strict=True):
            bottom = height - HEAD - HEIGHT * (above + 1) + FOOT
            axis.set_position((start, bottom / height, 0.25, (HEIGHT - FOOT - GAP) / height))
            _draw_panel(axis, panel)
    title = f"{MODELS.get(model, model)}: loss (nats per token)"
    figure.text(0.012, 1 - 0.5 * HEAD / height, title, color=INK, fontsize=11, fontweight="bold", va="center")
    return figure


def _draw_panel(axis: Any, panel: Panel) -> None:
    axis.patch.set_alpha(0)
    ceiling = panel.ceiling
    losses = [loss for series in panel.series for _, loss in series.points] + [loss for _, loss in panel.dense]
    floor = min(losses) - 0.06 * (ceiling - min(losses))
    axis.set_ylim(floor, ceiling)
    if panel.dense:
        flat = panel.dense if panel.logarithmic and len(panel.dense) > 1 else ((0, panel.dense[-1][1]),)
        if len(flat) > 1:
            axis.plot(*zip(*flat, strict=True), color=INK, linestyle=(0, (5, 3)), linewidth=1.4, label="dense")
        else:
            axis.axhline(flat[0][1], color=INK, linestyle=(0, (5, 3)), linewidth=1.4, label="dense")
    for series in panel.series:
        bold, peer = series.method == "hesso", series.method in PEERS
        axis.plot(
            *zip(*series.points, strict=True), color=series.colour, label=series.label, clip_on=True,
            linewidth=2.8 if bold else 1.5, linestyle="-" if bold or peer else (0, (1.5, 1.5)),
            marker="o", markersize=6.5 if bold else 4.5, zorder=4 if bold else 3,
        )  # fmt: skip
    _draw_frame(axis, panel)
    _label(axis, panel)


def _draw_frame(axis: Any, panel: Panel) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)
    axis.grid(axis="y", color=INK, alpha=0.2, linewidth=0.7)
    axis.tick_params(colors=INK, labelsize=9.5)
    axis.set_title(panel.title, color=INK, fontsize=10, loc="left")
    axis.set_xlabel(panel.x_label, color=INK, fontsize=10, loc="left")
    if panel.logarithmic:
        axis.set_xscale("log")
        axis.set_xlim(panel.ticks[0] / 1.6, panel.ticks[-1] * 1.3)
    else:
        axis.set_xlim(0, 1.04 * max(x for series in panel.series for x, _ in series.points))
    axis.set_xticks(panel.ticks)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x) if panel.logarithmic else f"{x:.0%}"))


def _short(tokens: float) -> str:
    """Return a number of tokens in a few letters."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return f"{tokens:.0f}"


def _label(axis: Any, panel: Panel) -> None:
    """Write each method beside its last point, apart from the others; above the edge with an arrow and its number."""
    floor, ceiling = axis.get_ylim()
    wanted = [(*series.points[-1], series.label, series.colour, series.method == "hesso") for series in panel.series]
    if panel.dense:
        end = panel.dense[-1] if len(panel.dense) > 1 else (axis.get_xlim()[1], panel.dense[0][1])
        wanted.append((*end, "dense", INK, False))
    wanted.sort(key=lambda entry: entry[1])  # by the loss
    shares = [min(1.0, (entry[1] - floor) / (ceiling - floor)) for entry in wanted]
    for height, (x, loss, label, colour, bold) in zip(spread(shares, LINE), wanted, strict=True):
        above = loss > ceiling
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        axis.annotate(
            f"{label} {loss:.2f}" + (" ↑" if above else ""), (x, loss), (1.05, height), textcoords="axes fraction",
            color=colour, fontsize=9.5 if bold else 8.6, fontweight="bold" if bold else "normal", va="center",
            annotation_clip=False, arrowprops=None if above else leader,
        )  # fmt: skip


def spread(places: list[float], least: float) -> list[float]:
    """Move ascending places in [0, 1] apart, by as little as may be, so that neighbours are `least` from each other."""
    blocks: list[list[float]] = []  # runs of neighbours that touch: [sum of where each wants its run to start, number]
    for index, place in enumerate(places):
        blocks.append([place - index * least, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    last = 0.98 - (len(places) - 1) * least  # so that the uppermost stays below the edge
    starts = [min(last, max(0.0, total / count)) for total, count in blocks for _ in range(int(count))]
    return [start + index * least for index, start in enumerate(starts)]


def main(argv: list[str] | None = None) -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", help="by default the largest one measured at several ratios")
    parser.add_argument("--output", type=Path, default=PICTURE, help="SVG or PNG")
    options = parser.parse_args(argv)
    result = json.loads(options.results.read_text(encoding="utf-8"))
    figure = draw(result, options.model or largest(result))
    # the same JSON gives the same file; text stays text
    with matplotlib.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        dated = {"Date": None} if options.output.suffix == ".svg" else {}
        figure.savefig(options.output, dpi=200, metadata=dated)
    print(f"{options.output} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
