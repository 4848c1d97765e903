"""The picture of `hesso-hf eval`: sizes and speeds as multiples of the first model's, quality as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .comparison import metrics_of, short_names

_SIZES = {
    "parameters": "parameters", "bytes": "bytes on disk", "flops_per_token": "FLOPs per token",
    "peak_memory": "peak memory",
}  # fmt: skip
_SPEEDS = {
    "tokens_per_second_alone": "prefill, batch 1", "tokens_per_second": "prefill, batch {}",
    "tokens_written_per_second": "decode, batch 1", "tokens_written_per_second_in_batches": "decode, batch {}",
}  # fmt: skip
_BASE = "#8c8c8c"

Bars = Mapping[str, Sequence[float]]  # by what they measure, of each model


def draw_comparison(models: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw models beside the first one.

    Args:
        models: what `measure_models` found, two or more.
    """
    base, names = models[0], short_names([model["model"] for model in models])
    sizes, speeds = _multiples(models, _SIZES), _multiples(models, _SPEEDS)
    perplexities = _finite({"": [model.get("perplexity") for model in models]})
    scores, errors = {}, {}
    for task, key, label in metrics_of(base) if all("tasks" in model for model in models) else ():
        found = [model["tasks"][task] for model in models]
        scores[label] = [one.get(key) for one in found]
        errors[label] = [one.get(key.replace(",", "_stderr,")) or 0.0 for one in found]
    panels: list[tuple[str, Bars, Bars, str]] = [
        (f"size, times {names[0]} (less is better)", sizes, {}, "{:.2f}x"),
        (f"tokens/s, times {names[0]} (more is better)", speeds, {}, "{:.2f}x"),
        ("perplexity (less is better)", perplexities, {}, "{:.2f}"),
        ("tasks, ± standard error", _finite(scores), errors, "{:.3f}"),
    ]
    panels = [panel for panel in panels if panel[1]]
    heights = [0.6 + 0.22 * len(bars) * (len(models) + 0.7) for _, bars, _, _ in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _draw(axes, names, *panel)
    how = f"on {base['device']}, {base['dtype']}, blocks of {base['block_size']:,} tokens"
    figure.suptitle(f"{', '.join(names[1:])} beside {names[0]}\n{how}", fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _multiples(models: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> Bars:
    """Return measures as multiples of the first model's, of those that every model has."""
    return _finite({
        label.format(models[0]["batch_size"]): [
            model[key] / models[0][key] if model.get(key) and models[0].get(key) else None for model in models
        ]
        for key, label in measures.items()
    })  # fmt: skip


def _finite(bars: Mapping[str, Sequence[float | None]]) -> Bars:
    found = {label: [value for value in values if value is not None] for label, values in bars.items()}
    return {
        label: values
        for label, values in found.items()
        if len(values) == len(bars[label]) and all(map(math.isfinite, values))
    }


def _draw(axes: Any, names: Sequence[str], title: str, bars: Bars, errors: Bars, form: str) -> None:
    """Draw a group of horizontal bars for each measure, from the top, with the values at their ends."""
    tall = 1 / (len(names) + 0.7)
    for index, name in enumerate(names):
        places = [row + index * tall for row in range(len(bars))]
        error = [errors[label][index] for label in bars] if errors else None
        colour = _BASE if index == 0 else f"C{index - 1}"
        values = [values[index] for values in bars.values()]
        drawn = axes.barh(places, values, tall * 0.9, label=name, color=colour, xerr=error, error_kw={"linewidth": 1})
        axes.bar_label(drawn, [form.format(value) for value in values], padding=4, fontsize=8)
    axes.set_yticks([row + tall * (len(names) - 1) / 2 for row in range(len(bars))], list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
