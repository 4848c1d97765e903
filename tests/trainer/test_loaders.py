"""Trainers that bring their own loader, or no data at all: what the stock `Trainer` does with them works here too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.errors import HessoError
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import ALONE, LENGTH, arguments, blocks

MEASURED: dict[str, Any] = {"pruning_ratio": 0.3, "round_to": 1, "warmup_steps": 1, "pruning_steps": 2}


class OwnLoader(HessoTrainer):
    """Makes its loader itself, of what it knows from elsewhere."""

    def get_train_dataloader(self) -> DataLoader:
        rows = blocks(24).with_format("torch")
        return DataLoader(rows, batch_size=5, shuffle=True, drop_last=True, collate_fn=default_data_collator)


def without_data(folder: Path, kind: type = HessoTrainer, **config: Any) -> HessoTrainer:
    return kind(tiny_llama(), arguments(folder, max_steps=4), hesso_config=HessoConfig(**(ALONE | MEASURED | config)))


def test_a_loader_of_ones_own_gives_the_examples_that_are_measured_and_healed_on(tmp_path: Path) -> None:
    config = {"healing": "auto", "replay_share": 0.25, "stream_basis": "principal", "calibration_examples": 4}
    run = without_data(tmp_path, OwnLoader, cric=True, cric_mode="probe", cric_sampling_steps=2, **config)
    before = torch.get_rng_state()
    examples = run.hesso_run.measurer.examples(12)
    assert run.hesso_run.measurer.tokens_per_micro_batch() == 5 * LENGTH
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers are drawn"
    rows = [tuple(row) for row in blocks(24)["input_ids"]]
    assert {tuple(example["input_ids"][0].tolist()) for example in examples} < set(rows)
    assert all(example["labels"].shape == (5, LENGTH) for example in examples)
    run.train()
    assert run._process.finished
    assert run.hesso_plan.curves is not None
    assert run._process.run.judging.healer is not None
    assert run.hesso_run.basis is not None
    assert run.replay.sizes.rows * run.replay.sizes.length == pytest.approx(5 * LENGTH / 3, abs=1)
    assert run._process.cric_report() is not None


def test_without_any_data_what_needs_none_works_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = HessoTrainer(
        tiny_llama(), arguments(tmp_path, max_steps=-1), hesso_config=HessoConfig(**MEASURED, stream_basis="auto")
    )
    with propagated(caplog):
        run.create_optimizer_and_scheduler(3)
    for word in ("share the cut evenly", "nothing is healed", "no replay", "stays in its given basis"):
        assert any("neither a `train_dataset`" in text and word in text for text in caplog.messages), word
    run.model.train()
    batch = default_data_collator(list(blocks(4)))
    items = int(batch["labels"].numel())  # without which the stock one needs more than itself
    expected = run.compute_loss(run.model, dict(batch), num_items_in_batch=items).item()
    for step in range(3):
        loss = run.training_step(run.model, dict(batch), num_items_in_batch=items).item()
        assert step > 0 or loss == expected
        run.optimizer.step()
        run.lr_scheduler.step()
        run.optimizer.zero_grad()
    assert run._process.finished
    run.save_model(str(tmp_path / "small"))
    assert run.pruning_report.parameters_after < run.pruning_report.parameters_before


@pytest.mark.parametrize(
    ("asked", "value"),
    [("stream_basis", "principal"), ("replay_share", 0.25), ("cric_mode", "probe")],
)
def test_what_cannot_be_had_without_data_is_refused_before_any_work(tmp_path: Path, asked: str, value: Any) -> None:
    run = without_data(tmp_path, cric=asked == "cric_mode", **{asked: value})
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(HessoError, match=rf"`{asked}` \({value!r}\): there is neither .*give the trainer one, or"):
        run.create_optimizer_and_scheduler(40)
    for now, then in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(now, then)
