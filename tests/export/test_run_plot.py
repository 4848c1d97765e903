"""`plot_run`: the losses, the phases and the share that is gone, of a trainer or of a smaller model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hesso_hf import HessoError, plot_run
from hesso_hf.config.files import REPORT_NAME
from tests.support.training import blocks, trainer

HIDDEN = "import sys; sys.modules['matplotlib'] = None; import hesso_hf; hesso_hf.plot_run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that has trained and saved."""
    folder = tmp_path_factory.mktemp("run")
    done = trainer(folder, eval_strategy="steps", eval_steps=4, options={"eval_dataset": blocks(8, seed=5)})
    done.train()
    done.save_model(str(folder / "small"))
    return done


def line(axes: Any, label: str) -> Any:
    return next(found for found in axes.lines if found.get_label() == label)


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_trainer_is_drawn_with_its_losses_phases_and_share(run: Any, tmp_path: Path) -> None:
    figure = plot_run(run)
    upper, lower = figure.axes
    logged = [(entry["step"], entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    drawn = upper.lines[0]
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == logged
    means = line(upper, "training loss, running mean").get_ydata()
    assert means[3] == pytest.approx((logged[2][1] + logged[3][1]) / 2)
    measured = [(entry["step"], entry["eval_loss"]) for entry in run.state.log_history if "eval_loss" in entry]
    held_out = line(upper, "loss on held-out examples")
    assert list(zip(held_out.get_xdata(), held_out.get_ydata(), strict=True)) == measured
    before = run.pruning_report.to_dict()["quality"]["eval_loss"]["before"]["loss"]
    assert set(line(upper, "loss on held-out examples, base model").get_ydata()) == {before}
    assert texts(upper) == ["warm-up", "pruning", "recovery"]
    gone = line(lower, lower.lines[0].get_label())
    ratio = run.hesso_plan.target.parameter_ratio
    assert list(gone.get_xdata()) == [0, 4, 7, 12]
    assert gone.get_ydata()[0] == 0
    assert 0 < gone.get_ydata()[1] < gone.get_ydata()[2] == pytest.approx(100 * ratio)
    assert gone.get_ydata()[-1] == gone.get_ydata()[2]
    assert set(line(lower, "to be removed").get_ydata()) == {100 * ratio}
    assert upper.get_xlim() == (0, 12)
    figure.savefig(tmp_path / "run.svg")
    assert (tmp_path / "run.svg").stat().st_size > 5_000
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_a_smaller_model_is_drawn_from_its_report(run: Any) -> None:
    folder = Path(run.args.output_dir) / "small"
    for axes, expected in zip(plot_run(folder).axes, plot_run(run).axes, strict=True):
        assert [found.get_label() for found in axes.lines] == [found.get_label() for found in expected.lines]
        drawn, again = ([list(line.get_ydata()) for line in of.lines] for of in (expected, axes))
        assert again == drawn
        assert texts(axes) == texts(expected)
    assert [found.get_label() for found in plot_run(str(folder)).axes[0].lines]


def test_what_has_nothing_to_draw_is_refused(run: Any, tmp_path: Path) -> None:
    with pytest.raises(
        HessoError, match=r"has no pruning_report\.json: give the folder of a smaller model, or a trainer"
    ):
        plot_run(tmp_path)
    report = json.loads((Path(run.args.output_dir) / "small" / REPORT_NAME).read_text())
    (tmp_path / REPORT_NAME).write_text(json.dumps({n: part for n, part in report.items() if n != "removed_by_step"}))
    assert len(plot_run(tmp_path).axes) == 1  # of a report from before it had that
    (tmp_path / REPORT_NAME).write_text(json.dumps(report | {"losses": None}))
    with pytest.raises(HessoError, match=r"no loss was logged \(`logging_steps`, `logging_strategy`\)"):
        plot_run(tmp_path)


def test_without_matplotlib_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True)
    assert "ImportError: plot_run draws with matplotlib: pip install 'hesso_hf[plots]'" in done.stderr
