"""`auto_find_batch_size`: a run that ran out of memory is in the end the run with the smaller batch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import get_constant_schedule_with_warmup

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.errors import HessoError
from hesso_hf.trainer import run as run_module
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import ALONE, blocks, trainer

FITS = 2  # rows of a batch
SHARES = {"pruning_ratio": 0.3, "round_to": 1, "warmup_steps": 0.25, "pruning_steps": 0.4, "calibration_examples": 2}


class LittleMemory(HessoTrainer):
    """Runs out of memory at a step, unless batches are small."""

    fails_at = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > FITS and self.state.global_step == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def begun(folder: Path, batch: int, options: Any = None, config: Any = None, **changes: Any) -> LittleMemory:
    return trainer(
        folder, trainer_class=LittleMemory, config=HessoConfig(**(ALONE | SHARES | (config or {}))), data=blocks(16),
        options=options, per_device_train_batch_size=batch,
        **({"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 1} | changes),
    )  # fmt: skip


def check_same_run(found: HessoTrainer, expected: HessoTrainer) -> None:
    assert found._process.finished
    assert found._process.schedule == expected._process.schedule
    assert found._process.kept_units() == expected._process.kept_units()
    assert found._process.state.watch.state_dict() == expected._process.state.watch.state_dict()
    for (name, ours), theirs in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (found, expected)]
    assert losses[0] == losses[1]


# in the first step and, batches of four being four, in the middle of pruning
@pytest.mark.parametrize(
    ("kind", "fails_at"),
    [
        ("plain", 0),
        ("plain", 2),
        ("with replay", 2),
        ("adapter", 2),
        ("own optimizer", 2),
        pytest.param("turned", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ran_out_of_memory_is_that_with_the_smaller_batch(
    kind: str, fails_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made(folder: Path, batch: int) -> LittleMemory:
        torch.manual_seed(7)
        if kind == "adapter":
            options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}
            return begun(folder, batch, options, {"healing": "auto"})
        if kind == "own optimizer":
            model = tiny_llama()
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            own = {"optimizers": (optimizer, get_constant_schedule_with_warmup(optimizer, 3))}
            return begun(folder, batch, own, model=model)
        options = {"with replay": {"healing": "auto", "replay_share": 0.25}, "turned": {"stream_basis": "principal"}}
        return begun(folder, batch, config=options.get(kind))

    run = made(tmp_path / "found", 4)
    run.fails_at = fails_at
    plain, settled = run.hesso_run.settle, []
    run.hesso_run.settle = lambda: settled.append(plain())  # type: ignore[method-assign]
    with propagated(caplog):
        run.train()
    assert run._train_batch_size == FITS
    assert len(settled) == 1, "sizes are measured again"
    again = [text for text in caplog.messages if text.startswith(f"out of memory after step {fails_at}")]
    assert again
    expected = made(tmp_path / "expected", FITS)
    expected.train()
    check_same_run(run, expected)


def test_a_resumed_run_begins_again_from_its_checkpoint(tmp_path: Path) -> None:
    first = begun(tmp_path / "first", FITS, save_strategy="steps", save_steps=3)
    first.train()
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    assert first._process.schedule.phase(3) == "pruning"
    run = begun(tmp_path / "resumed", FITS)
    plain, failed = run.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(*args, **kwargs)
        if run.state.global_step == 5 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    run.training_step = training_step  # type: ignore[method-assign]
    run.train(resume_from_checkpoint=checkpoint)
    assert failed
    assert run._train_batch_size == 1
    expected = begun(tmp_path / "expected", 1, auto_find_batch_size=False)
    expected.train(resume_from_checkpoint=checkpoint)
    check_same_run(run, expected)


def test_a_second_training_begins_again_with_what_the_first_one_pruned(tmp_path: Path) -> None:
    run = begun(tmp_path, 4)
    run.fails_at = -1
    run.train()
    kept = run._process.kept_units()
    run.fails_at = 2
    run.train()
    assert run._train_batch_size == FITS
    assert run.state.global_step == 8
    assert run._process.step == 4 + 8
    assert run._process.kept_units() == kept


def test_memory_that_runs_out_before_the_first_step_is_no_matter_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run_module, "settle_in_basis", fails)
    with pytest.raises(HessoError, match=r"`auto_find_batch_size` \(True\): memory ran out before the first step"):
        begun(tmp_path, 4).train()
