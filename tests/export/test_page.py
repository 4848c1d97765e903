"""The page beside a smaller model: that of `hesso-hf report --html`, linked, atomic, never at a model's cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hesso_hf import HessoTrainer
from hesso_hf.cli.main import main
from hesso_hf.config.files import CARD_NAME, PAGE_NAME, REPORT_NAME
from hesso_hf.errors import HessoError
from hesso_hf.export import publish
from hesso_hf.export.page.losses import MOST, Losses
from tests.project.test_structure import reachable
from tests.support.checks import propagated
from tests.support.training import trainer

LINK = f"]({PAGE_NAME})"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    trained = trainer(tmp_path_factory.mktemp("run"))
    trained.train()
    return trained


def test_a_save_writes_the_page_of_its_report_and_links_it(run: HessoTrainer, tmp_path: Path) -> None:
    small = tmp_path / "small"
    run.save_model(str(small))
    assert LINK in (small / CARD_NAME).read_text()
    assert main(["report", str(small), "--html", str(tmp_path / "again.html")]) == 0
    page = (small / PAGE_NAME).read_text()
    assert page == (tmp_path / "again.html").read_text()
    assert "Loss over the steps of the training" in page
    report = json.loads((small / REPORT_NAME).read_text())
    logged = [[entry["step"], entry["loss"]] for entry in run.state.log_history if "loss" in entry]
    assert report["losses"] == {"lines": {"loss": logged}, "skipped": 0}
    assert report["phases"] == {"warmup": [0, 2], "pruning": [2, 7], "recovery": [7, 12]}


def test_a_report_has_what_was_gone_when_and_the_scores_by_which_it_went(run: HessoTrainer, tmp_path: Path) -> None:
    run.save_model(str(tmp_path))
    report = json.loads((tmp_path / REPORT_NAME).read_text())
    logged = {entry["step"]: entry["hesso/pruned_ratio"] for entry in run.state.log_history if "loss" in entry}
    assert [step for step, _ in report["removed_by_step"]] == [0, 4, 7]  # the ends of the periods
    for step, share in report["removed_by_step"][1:]:
        assert share == pytest.approx(logged[step])
        assert share > logged[step - 1]
    process, units = run.hesso_run.process, {"attention_heads": (3, 1), "mlp_channels": (44, 16)}
    assert {n: (f["units"], f["removed"]) for n, f in report["scores"].items()} == units | {
        "embedding_channels": (60, 12)
    }
    for name, found in report["scores"].items():
        gone = process.scales[name] == 0
        means = [process.state.judged[name][chosen].mean().item() for chosen in (gone, ~gone)]
        went = [score for rank, score in found["points"] if rank < found["removed"]]
        points = [went, [score for _, score in found["points"][len(went) :]]]
        assert [sum(part) / len(part) for part in points] == pytest.approx(means, rel=1e-3)
        assert points == [sorted(part) for part in points]


def test_a_page_that_fails_costs_no_model_and_is_named(
    run: HessoTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(report: Any, path: Path) -> None:
        path.write_text("<html>half")
        raise RuntimeError("no ink")

    small = tmp_path / "small"
    run.save_model(str(small))
    monkeypatch.setattr("hesso_hf.export.report.write_page", broken)
    with propagated(caplog):
        run.save_model(str(small))
    assert f"{PAGE_NAME} isn't written: RuntimeError: no ink" in caplog.text
    assert (small / "model.safetensors").exists()
    assert not (small / PAGE_NAME).exists()  # the earlier save's neither
    assert LINK not in (small / CARD_NAME).read_text()


def test_a_save_that_fails_leaves_the_page_that_was_there(
    run: HessoTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    run.save_model(str(small))
    (small / PAGE_NAME).write_text("of the model before")

    def broken(*_: Any) -> None:
        raise OSError("no way")

    monkeypatch.setattr(publish, "_sync", broken)
    with pytest.raises(HessoError, match=r"can't be made \(OSError: no way\)"):
        run.save_model(str(small))
    assert (small / PAGE_NAME).read_text() == "of the model before"


def test_a_dense_model_in_its_place_has_none(run: HessoTrainer, tmp_path: Path) -> None:
    run.save_model(str(tmp_path))
    assert (tmp_path / PAGE_NAME).exists()
    trainer(tmp_path / "other").save_model(str(tmp_path))
    assert not (tmp_path / PAGE_NAME).exists()


def test_the_page_needs_nothing_but_itself() -> None:
    assert {module for module in reachable("export.page.page") if not module.startswith("export.page")} == set()


def test_losses_are_thinned_to_their_end_and_what_is_no_number_is_counted() -> None:
    history: list[dict[str, float]] = [{"step": step, "loss": 1 / step} for step in range(1, 3 * MOST)]
    history += [{"step": 7, "eval_loss": 2.5}, {"step": 8, "eval_books_loss": 1.5}, {"step": 9, "loss": float("nan")}]
    history.append({"step": 9, "train_loss": 1.0, "hesso/replay_loss": 2.0})
    found = Losses.of(history)
    assert found is not None
    assert len(found.lines["loss"]) <= MOST
    assert found.lines["loss"][-1] == (3 * MOST - 1, 1 / (3 * MOST - 1))
    assert {name: line for name, line in found.lines.items() if name != "loss"} == {
        "eval_loss": [(7, 2.5)], "eval_books_loss": [(8, 1.5)],
    }  # fmt: skip
    assert found.skipped == 1
    assert Losses.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert Losses.of([{"step": 1, "loss": float("inf")}]) is None
