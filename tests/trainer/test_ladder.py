"""Models that are saved on the way to the smallest one: sizes, nesting, resume, several processes, what fails."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoError, HessoTrainer, export_pruned
from hesso_hf.budget.target_sizes import TargetSizes
from hesso_hf.config.files import STATE_NAME
from hesso_hf.errors import StorageError
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.trainer.ladder import Ladder
from tests.support import fsdp_cpu
from tests.support.checks import propagated
from tests.support.lora import tiny_lora
from tests.support.tiny import tiny_llama
from tests.support.training import ALONE, blocks, trainer
from tests.trainer.test_resume import check_equal

SHARES = [0.15, 0.3]
SAVED = (7, 12)  # after two periods each of two steps, and a step of recovery
CONFIG: dict[str, Any] = {
    "pruning_ratio": 0.4, "export_at": SHARES, "ladder_recovery": 1, "warmup_steps": 2, "pruning_steps": 12,
    "pruning_periods": 6, "saliency_batches": 2, "calibration_examples": 4, **ALONE,
}  # fmt: skip


def ladder(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> HessoTrainer:
    options = {"max_steps": 18, "learning_rate": 2e-3, "options": {"eval_dataset": blocks(4, seed=9)}}
    return trainer(folder, config=HessoConfig(**(CONFIG | (config or {}))), **(options | changes))


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pruning_report.json").read_text())


def rungs(folder: Path) -> list[Path]:
    return [folder / f"rung-{share}" for share in SHARES]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    """A run that has saved its models, with a checkpoint every step."""
    run = ladder(tmp_path_factory.mktemp("climbed"), {"compact": "auto"}, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(Path(run.args.output_dir) / "small"))
    return run


def test_every_model_has_its_share_of_the_parameters_and_is_a_stock_model(climbed: HessoTrainer) -> None:
    folder = Path(climbed.args.output_dir)
    for path, share, step, sizes in zip(rungs(folder), SHARES, SAVED, climbed.hesso_plan.rungs, strict=True):
        model, told = AutoModelForCausalLM.from_pretrained(path), report(path)
        assert abs(told["pruning_ratio"] - share) <= 0.01
        assert model.num_parameters() == told["parameters"]["after"] == sizes.parameters_after
        assert told["target"] == sizes.to_dict()
        assert told["removed_by_step"][-1][1] == pytest.approx(told["pruning_ratio"])
        assert told["steps"] == step
        assert told["verification"]["fold_error"] <= 1e-5
    assert abs(report(folder / "small")["pruning_ratio"] - 0.4) <= 0.01
    assert climbed.hesso_run.ladder.folders == dict(zip(SHARES, rungs(folder), strict=True))


def test_what_one_model_keeps_the_larger_ones_keep(climbed: HessoTrainer) -> None:
    folder = Path(climbed.args.output_dir)
    kept = [KeptUnits.from_dict(report(path)["kept_units"]) for path in (*rungs(folder), folder / "small")]
    for larger, smaller in pairwise(kept):
        fewer = 0
        for name, layers in smaller.kept.items():
            for few, many in zip(layers, larger.kept[name], strict=True):
                assert set(few) <= set(many)
                fewer += len(many) - len(few)
        assert fewer > 0


def test_each_models_own_loss_is_measured(climbed: HessoTrainer) -> None:
    folder = Path(climbed.args.output_dir)
    losses = [report(path)["quality"]["eval_loss"] for path in (*rungs(folder), folder / "small")]
    assert len({one["before"]["loss"] for one in losses}) == 1
    assert len({one["after"]["loss"] for one in losses}) == 3


def test_a_checkpoint_from_after_a_models_save_does_not_have_its_loss(climbed: HessoTrainer, tmp_path: Path) -> None:
    told = export_pruned(Path(climbed.args.output_dir) / "checkpoint-18", tmp_path / "small").to_dict()["quality"]
    assert "before" in told["eval_loss"]
    assert "after" not in told["eval_loss"]


def test_a_models_report_has_the_phases_that_it_went_through(climbed: HessoTrainer) -> None:
    folder = Path(climbed.args.output_dir)
    phases = [report(path)["phases"] for path in (*rungs(folder), folder / "small")]
    assert [found["pruning"] for found in phases] == [[2, 6], [2, 11], [2, 16]]
    assert [found["recovery"] for found in phases] == [[6, 7], [11, 12], [16, 18]]


def test_the_base_model_is_not_replaced_on_the_way(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "rung-0.3")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "rung-0.3")
    with pytest.raises(HessoError, match=r"rung-0.3' is the folder that the base model was read from"):
        ladder(tmp_path, model=base)


def test_a_collapse_after_the_cut_to_a_model_on_the_way_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick = {"pruning_steps": 3, "pruning_periods": 3, "ladder_recovery": 4, "collapse_threshold": 1e-3}
    run = ladder(tmp_path, {**quick, "calibration_examples": 0}, learning_rate=1e-6)
    with propagated(caplog):
        run.train()
    assert run.hesso_optimizer.process.schedule.rung_saves == (7, 12)
    assert "step 4: the loss is" in caplog.text, "no period goes on then"


def test_one_page_compares_them(climbed: HessoTrainer) -> None:
    page = (Path(climbed.args.output_dir) / "ladder.html").read_text()
    for name in ("rung-0.15", "rung-0.3", "small"):
        assert f"<summary>{name}</summary>" in page


def test_saving_on_the_way_leaves_training_as_it_is(
    climbed: HessoTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ladder, "after_step", lambda self: None)
    unsaved = ladder(tmp_path, {"compact": "auto"})
    unsaved.train()
    check_equal(unsaved, climbed)
    assert not any(path.exists() for path in rungs(tmp_path))


# the first rung's cut, its save, the period after it, recovery before the second save
@pytest.mark.parametrize("step", [6, 7, 8, 11])
def test_an_interrupted_run_saves_the_same_models(climbed: HessoTrainer, tmp_path: Path, step: int) -> None:
    whole = Path(climbed.args.output_dir)
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run = ladder(tmp_path, {"compact": "auto"})
    run.train(resume_from_checkpoint=True)
    check_equal(run, climbed)
    for path, original, saved in zip(rungs(tmp_path), rungs(whole), SAVED, strict=True):
        assert path.exists() == (saved > step), "those from before the checkpoint are where the run was interrupted"
        if path.exists():
            ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (path, original))
            for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert torch.equal(mine, other), name
            assert report(path)["kept_units"] == report(original)["kept_units"]


def test_a_checkpoint_from_before_there_were_models_on_the_way_goes_on(tmp_path: Path) -> None:
    plain = {"export_at": None, "ladder_recovery": 0.0}
    whole = ladder(tmp_path, plain, save_strategy="steps", save_steps=5)
    whole.train()
    path = tmp_path / "checkpoint-5" / STATE_NAME
    state = json.loads(path.read_text())
    del state["rungs"], state["config"]["export_at"], state["config"]["ladder_recovery"]
    assert "rungs" not in state["schedule"]
    path.write_text(json.dumps(state))
    run = ladder(tmp_path / "resumed", plain)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    check_equal(run, whole)


@pytest.mark.parametrize("failure", [StorageError, torch.OutOfMemoryError])
def test_a_model_that_cannot_be_saved_on_the_way_costs_nothing_but_itself(
    failure: type[Exception], climbed: HessoTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = ladder(tmp_path)
    plain = type(run.hesso_engine).export

    def full(self: Any, run: Any, target: Path) -> Any:
        if target.name == "rung-0.15":
            raise failure(f"{target}: no room")
        return plain(self, run, target)

    monkeypatch.setattr(type(run.hesso_engine), "export", full)
    shutil.copytree(climbed.args.output_dir + "/rung-0.3", tmp_path / "rung-0.15")  # of another run, with other sizes
    with propagated(caplog):
        run.train()
        run.save_model(str(tmp_path / "small"))
    assert "`export_at` (0.15): no model is saved on the way" in caplog.text
    assert "rung-0.15: no room" in caplog.text
    assert list(run.hesso_run.ladder.folders) == [0.3]
    assert (tmp_path / "small").exists()
    page = (tmp_path / "ladder.html").read_text()
    assert "rung-0.3" in page
    assert "rung-0.15" not in page


def test_a_step_that_is_skipped_saves_nothing_again_and_a_run_that_begins_again_does(
    climbed: HessoTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    process, ladder = climbed.hesso_run.process, climbed.hesso_run.ladder
    monkeypatch.setattr(type(climbed.hesso_engine), "export", lambda self, run, target: saved.append(process.step))
    for step in (6, 7, 7):
        monkeypatch.setattr(process.state, "step", step)
        ladder.after_step()
    assert saved == [7]
    ladder.begin()
    ladder.after_step()
    assert saved == [7, 7]


def test_the_preview_and_the_bar_say_what_is_saved_and_when(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ladder(tmp_path, {"calibration_examples": 0})
    caplog.set_level(logging.INFO, logger="hesso_hf")
    with propagated(caplog):
        run.train()
    assert " parameters after step 7, in rung-0.15" in capsys.readouterr().out
    assert "recovery, a model is saved on the way at step 7" in caplog.text
    assert "HESSO: recovery, units" in caplog.text


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "adapters": (tiny_lora, {}),
    "a period given up": (tiny_llama, {"on_collapse": "pause", "collapse_threshold": 1e-3}),
    "whole layers": (lambda: tiny_llama(num_hidden_layers=6), {"structures": ["layers", "mlp_channels"]}),
    "layers that compete": (tiny_llama, {"layer_widths": "per_layer"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_on_the_way_hold_what_was_trained(kind: str, tmp_path: Path) -> None:
    model, changes = KINDS[kind]
    run = ladder(tmp_path, {"export_at": [0.2], **changes}, model=model(), max_steps=50, options={})
    run.train()
    run.save_model(str(tmp_path / "small"))
    process, told = run.hesso_optimizer.process, report(tmp_path / "rung-0.2")
    assert told["verification"]["fold_error"] <= 1e-5
    assert abs(told["pruning_ratio"] - 0.2) <= 0.01
    assert told["steps"] == process.schedule.rung_saves[0]
    assert bool(process.schedule.pauses) == (kind == "a period given up")


def two_job(folder: str, processes: int) -> None:
    """Climb with two processes."""
    run = ladder(Path(folder) / "out", per_device_train_batch_size=4 // processes, adam_epsilon=1e-4)
    run.train()
    run.save_model(str(Path(folder) / "small"))


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_save_the_same_models_as_one(sharded: bool, tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path / "two", "tests.trainer.test_ladder", "two_job", sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = ladder(tmp_path / "one", per_device_train_batch_size=4, adam_epsilon=1e-4)
    alone.train()
    for shared, own in zip(rungs(tmp_path / "two" / "out"), rungs(tmp_path / "one"), strict=True):
        assert report(shared)["kept_units"] == report(own)["kept_units"]
        assert TargetSizes.from_dict(report(shared)["target"]) == TargetSizes.from_dict(report(own)["target"])
        ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (shared, own))
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (mine - other).abs().max() <= 1e-5, name
    assert (tmp_path / "two" / "out" / "ladder.html").exists()
