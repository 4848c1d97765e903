"""`plot_run`: a picture of how a run went, its losses over the steps with the phases shaded."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.files import REPORT_NAME
from ..errors import HessoError
from .page.losses import Losses, removed_until_the_end
from .page.words import logged, named

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plot_run draws with matplotlib: pip install 'hesso_hf[plots]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {"warmup": "tab:gray", "sampling": "tab:purple", "pruning": "tab:red", "recovery": "tab:green"}
SMOOTHED = 10  # a line of more points has a mean beside it, over a tenth of them


class RunFigure(Figure):
    """A figure that a notebook shows, whichever backend it has."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def plot_run(run: Any) -> RunFigure:
    """Draw how a run went: losses over the optimizer steps (nats per token), and what share of the parameters is gone.

    Args:
        run: a trainer that has trained, or the folder of a smaller model.

    Returns:
        The figure: a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
        HessoError: where no loss was logged, or there is no report.
        ImportError: where matplotlib isn't installed.
    """
    report = run.hesso_run.record() if hasattr(run, "hesso_run") else _report_in(Path(run))
    shares = removed_until_the_end(report)
    if not report.get("losses"):
        raise HessoError("there is nothing to draw: no loss was logged (`logging_steps`, `logging_strategy`)")
    heights = [3, 2] if shares else [3]
    figure = RunFigure(figsize=(7.5, 1.8 + 0.6 * sum(heights)), layout="constrained")
    upper, *lower = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(upper, Losses.from_dict(report["losses"]), report.get("quality") or {})
    for axes in lower:
        _draw_shares(axes, shares, report["target"])
    _shade([upper, *lower], report.get("phases") or {})
    return figure


def _report_in(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_NAME
    if not path.is_file():
        raise HessoError(
            f"`run` ({str(folder)!r}) has no {REPORT_NAME}: give the folder of a smaller model, or a trainer"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _draw_losses(axes: Axes, losses: Losses, quality: Mapping[str, Any]) -> None:
    for index, (key, line) in enumerate(losses.lines.items()):
        steps, values = zip(*line, strict=True)
        colour, many = f"C{index}", len(line) > SMOOTHED
        axes.plot(steps, values, color=colour, alpha=0.3 if many else 1, label=None if many else logged(key),
                  marker="o" if len(line) == 1 else None)  # fmt: skip
        if many:
            axes.plot(steps, _means(values), color=colour, label=f"{logged(key)}, running mean")
        if key in quality:
            axes.axhline(quality[key]["before"]["loss"], color=colour, linestyle="--", linewidth=1,
                         label=f"{logged(key)}, base model")  # fmt: skip
    axes.set_ylabel("loss (nats per token)")
    axes.legend(fontsize=8, frameon=False)


def _means(values: Sequence[float]) -> list[float]:
    """Return the mean over the last tenth of all values, at each."""
    width = max(2, len(values) // SMOOTHED)
    last = [values[max(0, index - width + 1) : index + 1] for index in range(len(values))]
    return [sum(each) / len(each) for each in last]


def _draw_shares(axes: Axes, shares: Sequence[tuple[int, float]], asked: Mapping[str, Any]) -> None:
    steps, gone = zip(*shares, strict=True)
    target = 1 - asked["parameters_after"] / asked["parameters_before"]
    axes.step(steps, [100 * share for share in gone], where="post", color="black")
    axes.axhline(100 * target, color="black", linewidth=0.8, linestyle="--", label="to be removed")
    axes.set_ylabel("removed (% of\nparameters)")
    axes.set_ylim(-3, 115 * target)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _shade(rows: Sequence[Axes], phases: Mapping[str, Sequence[int]]) -> None:
    """Shade the phases in all rows; name them above the first, one above the other where they are narrow."""
    rows[-1].set_xlabel("optimizer step")
    last = max((end for _, end in phases.values()), default=0)
    for axes in rows if last else ():
        axes.set_xlim(0, last)
    narrow = 0
    for name, (start, end) in phases.items():
        for axes in rows:
            axes.axvspan(start, end, color=SHADES.get(name, "tab:blue"), alpha=0.1, linewidth=0)
        narrow = 0 if end - start > 0.15 * last else narrow + 1
        rows[0].annotate(
            named(name), ((start + end) / 2, 1.0), (0, 4 + 10 * max(0, narrow - 1)), fontsize=8, ha="center",
            xycoords=rows[0].get_xaxis_transform(), textcoords="offset points",
        )  # fmt: skip
