"""Interrupted equals uninterrupted, bit for bit, also after kill -9; checkpoints of other runs are refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.config.files import STATE_NAME
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.export.checkpoint_state import last_checkpoint
from tests.support import ROOT, forks
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import arguments, blocks, hesso_config, trainer

RATIO = {"pruning_ratio": 0.3, "warmup_steps": 3, "pruning_steps": 6, "pruning_periods": 2, "saliency_batches": 3}


def with_checkpoints(folder: Path, **changes: Any) -> HessoTrainer:
    """A run with a measured split, dropout-free but shuffled, that writes a checkpoint every step."""
    config = HessoConfig(**RATIO)
    return trainer(folder, config=config, save_strategy="steps", save_steps=1, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    run = with_checkpoints(tmp_path_factory.mktemp("undisturbed"))
    run.train()
    return run


def check_equal(run: HessoTrainer, expected: HessoTrainer) -> None:
    """Same weights, optimizer state and decisions, bit for bit."""
    for (name, ours), theirs in zip(run.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert run.hesso_optimizer.process.kept_units() == expected.hesso_optimizer.process.kept_units()
    assert run.hesso_run.record()["scores"] == expected.hesso_run.record()["scores"]
    ours, theirs = (item.hesso_optimizer.base.state_dict()["state"] for item in (run, expected))
    for index, state in theirs.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(ours[index][key]), torch.as_tensor(value)), (index, key)


# inside a scoring window, a period's middle and end, recovery; slow: before the window, more of both periods
@pytest.mark.parametrize("step", [2, 5, 6, 10, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 8))])
def test_interrupted_equals_uninterrupted(undisturbed: HessoTrainer, tmp_path: Path, step: int) -> None:
    shutil.copytree(Path(undisturbed.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run = with_checkpoints(tmp_path)
    run.train(resume_from_checkpoint=True)
    check_equal(run, undisturbed)


def test_resuming_does_not_measure_again(
    undisturbed: HessoTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hesso_hf.trainer.measure.measure_curves", lambda *_, **__: pytest.fail("calibrated on a resumed run")
    )
    run = with_checkpoints(tmp_path)
    run.train(resume_from_checkpoint=str(Path(undisturbed.args.output_dir) / "checkpoint-6"))
    assert run.hesso_plan.target == undisturbed.hesso_plan.target


def test_the_schedule_of_the_checkpoint_stays(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path, max_steps=16)
    run.train(resume_from_checkpoint=str(Path(undisturbed.args.output_dir) / "checkpoint-6"))
    assert run.hesso_optimizer.process.schedule.end == 9


def test_a_checkpoint_from_before_healing_goes_on_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = HessoConfig(**RATIO, healing="off", compact="never")
    whole = trainer(tmp_path / "whole", config=old, save_strategy="steps", save_steps=5)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    state = json.loads((checkpoint / STATE_NAME).read_text())
    for key in ("healing", "replay_share", "replay_dataset", "quality_examples", "compact"):
        del state["config"][key]
    (checkpoint / STATE_NAME).write_text(json.dumps(state))
    run = trainer(tmp_path / "resumed", config=HessoConfig(**RATIO))
    with propagated(caplog):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert "made with `healing` = 'off', and the run goes on so" in caplog.text
    assert "made with `quality_examples` = 0, and the run goes on so" in caplog.text
    check_equal(run, whole)


def test_checkpoints_are_dense_until_pruning_ends_and_export_after_it(
    undisturbed: HessoTrainer, tmp_path: Path
) -> None:
    folder = Path(undisturbed.args.output_dir)
    dense = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-8")
    assert dense.config.intermediate_size == 44
    report = export_pruned(folder / "checkpoint-12", tmp_path / "small")
    assert report.kept_units == undisturbed.hesso_optimizer.process.kept_units()
    assert report.to_dict()["schedule"]["warmup_steps"] == 3
    with pytest.raises(HessoError, match="step 5 of 9"):
        export_pruned(folder / "checkpoint-5", tmp_path / "early")
    assert not (tmp_path / "early").exists()


def test_checkpoints_of_other_runs_are_refused(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    checkpoint = str(Path(undisturbed.args.output_dir) / "checkpoint-6")
    other = trainer(tmp_path, config=HessoConfig(**(RATIO | {"pruning_ratio": 0.4})))
    with pytest.raises(CheckpointMismatchError, match=r"`pruning_ratio` = 0.3, this run has 0.4"):
        other.train(resume_from_checkpoint=checkpoint)
    plain = Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path / "plain", save_strategy="steps", save_steps=6),
        train_dataset=blocks(),
    )
    plain.train()
    with pytest.raises(CheckpointMismatchError, match="no pruning state"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))
    wider = trainer(tmp_path, model=tiny_llama(num_hidden_layers=3), config=HessoConfig(**RATIO))
    with pytest.raises((CheckpointMismatchError, ValueError)):
        wider.train(resume_from_checkpoint=checkpoint)


def test_checkpoints_that_cannot_be_resumed_are_refused(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    early = str(Path(undisturbed.args.output_dir) / "checkpoint-3")
    with pytest.raises(HessoError, match=r"`max_steps` \(5\) ends before pruning does \(step 9"):
        with_checkpoints(tmp_path, max_steps=5).train(resume_from_checkpoint=early)
    shutil.copytree(Path(undisturbed.args.output_dir) / "checkpoint-10", tmp_path / "weights")
    (tmp_path / "weights" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"neither optimizer.pt nor hesso_pruning.pt: save_only_model"):
        with_checkpoints(tmp_path).train(resume_from_checkpoint=str(tmp_path / "weights"))


class WithoutMemory(HessoTrainer):
    """Its optimizer keeps nothing from step to step, so that without its state a run goes on as it would with it."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        return super().create_optimizer(model)


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    run = of_weights_only(tmp_path_factory.mktemp("weights"), save_strategy="steps", save_steps=1)
    run.train()
    return run


def of_weights_only(folder: Path, **changes: Any) -> HessoTrainer:
    cric = {"cric": True, "cric_sampling_steps": 2, "cric_max_cycles": 1}
    config = hesso_config(**cric, warmup_steps=1, healing="auto", compact="auto")
    options = {"save_only_model": True, "lr_scheduler_type": "constant"}
    return trainer(folder, config=config, trainer_class=WithoutMemory, **(options | changes))


# within CRIC's cycle, within a period, recovery
@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_checkpoint_of_weights_only_goes_on_pruning_where_it_was(
    weights_only: HessoTrainer, tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(weights_only.args.output_dir) / f"checkpoint-{step}"
    assert not (folder / "optimizer.pt").exists()
    run = of_weights_only(tmp_path)
    with propagated(caplog):
        run.train(resume_from_checkpoint=str(folder))
    assert "pruning goes on where it was, the optimizer's own state and the learning rate" in caplog.text
    assert run._process.finished
    check_equal(run, weights_only)


def test_a_checkpoint_is_never_overwritten_by_an_export(undisturbed: HessoTrainer) -> None:
    checkpoint = Path(undisturbed.args.output_dir) / "checkpoint-12"
    with pytest.raises(HessoError, match="is a checkpoint of a run"):
        export_pruned(checkpoint, checkpoint)
    held = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(held[name], parameter) for name, parameter in undisturbed.model.named_parameters())


_TRAIN = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.test_resume import with_checkpoints
from hesso_hf.config.files import STATE_NAME
from hesso_hf.export.checkpoint_state import last_checkpoint
folder = Path(sys.argv[1])
run = with_checkpoints(folder)
print("START", flush=True)
run.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
run.save_model(str(folder / "small"))
torch.save({n: p.detach() for n, p in run.model.named_parameters()}, folder / "final.pt")
"""


def test_kill_at_random_moments(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    """A real kill -9 in training, while checkpoints are written and in the final save; then start again."""
    for pause in (0.3, 0.7, 0.2, 1.1):
        run = forks.start(_TRAIN, str(tmp_path), str(ROOT))
        while run.poll() is None and "START" not in run.output("stdout"):
            time.sleep(0.01)
        time.sleep(pause)
        run.kill()
    done = forks.run(_TRAIN, str(tmp_path), str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    for name, parameter in undisturbed.model.named_parameters():
        assert torch.equal(final[name], parameter), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size <= 60


def test_a_run_that_was_over_takes_no_step_more(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    """As after a kill in the final save."""
    last = f"checkpoint-{undisturbed.state.global_step}"
    shutil.copytree(Path(undisturbed.args.output_dir) / last, tmp_path / last)
    run = with_checkpoints(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == undisturbed.state.global_step
    check_equal(run, undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == [last]


def test_a_checkpoint_that_is_written_again_and_not_to_its_end_is_no_whole_one(
    undisturbed: HessoTrainer, tmp_path: Path
) -> None:
    """A run that goes on from an earlier checkpoint comes by the later ones again."""
    for step in (5, 6):
        shutil.copytree(Path(undisturbed.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    left = tmp_path / "checkpoint-6" / "hesso_shards"  # by more processes than there are now
    left.mkdir()
    (left / "parts-00007.safetensors").touch()
    run = with_checkpoints(tmp_path)

    def dying(output_dir: str) -> None:
        raise KeyboardInterrupt

    run._save_optimizer_and_scheduler = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert not left.exists()
    run = with_checkpoints(tmp_path)
    run.train(resume_from_checkpoint=True)
    check_equal(run, undisturbed)


def test_a_half_written_checkpoint_is_passed_over(undisturbed: HessoTrainer, tmp_path: Path) -> None:
    source = Path(undisturbed.args.output_dir)
    for step in (5, 9):
        shutil.copytree(source / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    shutil.copytree(source / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    run = with_checkpoints(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert run.hesso_run.resume_from == tmp_path / "checkpoint-5"
    check_equal(run, undisturbed)
    with pytest.raises(HessoError, match=r"^No valid checkpoint found in output directory .* no whole one"):
        with_checkpoints(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["none in the folder", "no folder", "an empty folder"])
def test_what_stops_a_resume_is_what_the_stock_trainer_raises_in_its_words(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    resume = {
        "none in the folder": True,
        "no folder": str(tmp_path / "none"),
        "an empty folder": str(tmp_path / "empty"),
    }
    stock = Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=blocks())
    found = []
    for run in (stock, with_checkpoints(tmp_path)):
        with pytest.raises(Exception, match=r"valid checkpoint") as caught:
            run.train(resume_from_checkpoint=resume[kind])
        found.append(caught.value)
    assert isinstance(found[1], type(found[0]))
    assert isinstance(found[1], HessoError)
    assert str(found[1]).startswith(str(found[0]))
