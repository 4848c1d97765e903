"""The picture of CRIC in a pruning report: drawn where CRIC was used, refused by name elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hesso_hf.cli.main import main
from hesso_hf.config.files import PLOT_NAME
from hesso_hf.export.plots import _draw_sets, draw_cric
from tests.support.training import hesso_config, trainer

PNG = b"\x89PNG"


def report(**changes: Any) -> dict[str, Any]:
    """CRIC's part of a report with one structure that was corrected and one that wasn't."""
    paths = [
        {"role": "corrected", "layer": "layers.0", "unit": 3, "values": {"taylor_first_order": [0.1, 0.3, 0.4, 0.5]}},
        {"role": "replacing", "layer": "layers.0", "unit": 7, "values": {"taylor_first_order": [0.1, 0.0, 0.0, -0.1]}},
    ]
    heads = {"first": 2, "violating": [2, 0], "num_corrected": 0, "corrected": {}, "replaced_by": {}, "paths": []}
    mlp = {"first": 9, "violating": [9, 4], "num_corrected": 1, "corrected": {"0": [3]}, "replaced_by": {"0": [7]}}
    structures = {"attention_heads": heads, "mlp_channels": mlp | {"paths": paths}}
    return {"mode": "path", "cycles": 2, "samples_per_cycle": 8, "samples": 16, "structures": structures} | changes


def test_structures_that_lose_nothing_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    found = report()
    found["structures"]["attention_heads"]["first"] = 0
    assert draw_cric(found, tmp_path / "cric.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["violating sets", "MLP channels: 1 of 9 corrected"]


@pytest.mark.parametrize("name", ["cric.png", "cric.svg"])
def test_draws_sets_and_paths(tmp_path: Path, name: str) -> None:
    assert draw_cric(report(), tmp_path / name)
    drawn = (tmp_path / name).read_bytes()
    assert len(drawn) > 5_000
    if name.endswith(".png"):
        assert drawn.startswith(PNG)
    else:
        text = drawn.decode()
        assert all(f"<!-- {label}" in text for label in ("violating sets", "MLP channels: 1 of 9 corrected"))
        assert "no unit was corrected" in text


def test_the_legend_lies_above_the_bars() -> None:
    figure = Figure(figsize=(4.2, 3.6))
    axis = figure.subplots()
    names = ("attention_heads", "mlp_channels", "embedding_channels")
    structures = {name: {"first": 2, "violating": [2, 2, 2]} for name in names}
    _draw_sets(axis, structures)
    FigureCanvasAgg(figure).draw()
    legend = axis.get_legend().get_window_extent()
    assert not any(legend.overlaps(bar.get_window_extent()) for bar in axis.patches)


def test_without_matplotlib_a_warning_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    warnings: list[str] = []
    monkeypatch.setattr("hesso_hf.export.plots.logger.warning", warnings.append)
    assert not draw_cric(report(), tmp_path / "cric.png")
    assert not list(tmp_path.iterdir())
    assert "hesso_hf[plots]" in warnings[0]


def test_a_picture_that_fails_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise RuntimeError("no font")

    warnings: list[str] = []
    monkeypatch.setattr("hesso_hf.export.report.draw_cric", broken)
    monkeypatch.setattr("hesso_hf.export.report.logger.warning", warnings.append)
    run = trainer(tmp_path, config=hesso_config(cric=True, cric_sampling_steps=2, cric_max_cycles=2), max_steps=16)
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert not (tmp_path / "small" / PLOT_NAME).exists()
    assert "no font" in warnings[0]


def test_a_save_draws_it_and_a_later_one_without_cycles_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hesso_config(cric=True, cric_sampling_steps=2, cric_max_cycles=2)
    run = trainer(tmp_path / "out", config=config, max_steps=16)
    run.train()
    small = tmp_path / "small"
    run.save_model(str(small))
    assert (small / PLOT_NAME).read_bytes().startswith(PNG)
    assert f"]({PLOT_NAME})" in (small / "README.md").read_text()
    found = json.loads((small / "pruning_report.json").read_text())["cric"]
    assert main(["report", str(small), "--plot", str(tmp_path / "again.svg")]) == 0
    assert f"CRIC: {found['cycles']} cycles, {found['samples']} samples" in capsys.readouterr().out
    assert (tmp_path / "again.svg").exists()
    assert main(["report", str(small), "--plot", str(tmp_path / "again.doc")]) != 0
    assert "must end in .png" in capsys.readouterr().err

    plain = trainer(tmp_path / "plain")
    plain.train()
    plain.save_model(str(small))
    assert not (small / PLOT_NAME).exists()
    assert f"]({PLOT_NAME})" not in (small / "README.md").read_text()
    assert json.loads((small / "pruning_report.json").read_text())["cric"] is None
    assert main(["report", str(small), "--plot", str(tmp_path / "again.png")]) != 0
    assert "pruned without any" in capsys.readouterr().err
