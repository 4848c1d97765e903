"""Examples that are measured on: single ones, or batches of a trainer that makes them in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from transformers import default_data_collator

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.errors import HessoError
from hesso_hf.trainer import run as runs
from tests.support import fsdp_cpu
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import LENGTH, arguments, blocks, hesso_config, trainer
from tests.trainer.test_peeked import Once

CONFIG = HessoConfig(
    pruning_ratio=0.3, warmup_steps=1, pruning_steps=1, pruning_periods=1, calibration_examples=4, replay_share=0.0
)


class Pairs(HessoTrainer):
    """Learns of pairs, which its own data loader makes; it has no loss of a single example."""

    source: Any = None

    def get_train_dataloader(self) -> DataLoader:
        data = self.source.with_format("torch")
        sampler = RandomSampler(data)
        return DataLoader(data, batch_size=2, sampler=sampler, drop_last=True, collate_fn=default_data_collator)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = model(input_ids=inputs["input_ids"]).logits.mean((1, 2)).unbind()
        return (first - second).square() + super().compute_loss(model, inputs, *args, **kwargs)


def pairs(folder: Path, data: Any, **options: Any) -> Pairs:
    run = Pairs(tiny_llama(), arguments(folder, max_steps=3), hesso_config=CONFIG, **options)
    run.source = data
    return run


def test_units_are_judged_on_as_many_tokens_as_the_widest_matrix_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runs, "enough_tokens", lambda widest: asked.append(widest) or 17 * LENGTH)
    made = trainer(tmp_path, config=hesso_config(healing="auto"))
    made.create_optimizer()
    healer = made.hesso_run.process.run.judging.healer
    assert healer is not None
    assert (asked, healer.tokens) == ([60], 17 * LENGTH)


def test_a_loader_of_its_own_makes_what_is_measured_on(tmp_path: Path) -> None:
    run = pairs(tmp_path, blocks(24))
    before = torch.get_rng_state()
    first, others = (run.hesso_run.measurer.examples(4, between) for between in (False, True))
    assert torch.equal(torch.get_rng_state(), before), "the sampler has drawn from the run's own numbers"
    assert {tuple(batch["input_ids"].shape) for batch in (*first, *others)} == {(2, 10)}
    seen = [{tuple(row) for batch in batches for row in batch["input_ids"].tolist()} for batches in (first, others)]
    assert [len(rows) for rows in seen] == [8, 8]
    assert not seen[0] & seen[1]
    assert run.hesso_run.measurer.tokens_per_micro_batch() == 20
    run.train()
    assert run.hesso_plan.curves is not None
    assert run.hesso_run.process.run.judging.healer is not None


def test_what_rows_are_padded_with_isnt_counted_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = blocks(64)["input_ids"]
    long = [{"input_ids": [*row, *[0] * 90], "attention_mask": [1] * 10 + [0] * 90} for row in rows]
    measurer = trainer(tmp_path / "long", config=CONFIG, data=Dataset.from_list(long)).hesso_run.measurer
    assert measurer.tokens_per_example() == 10
    assert len(measurer.tokens(300)) == 30, "of a hundred tokens each they would be 16"
    assert len(measurer.tokens(300, longest=6)) == 50, "of each the model reads six"
    uneven = [{"input_ids": row[: 10 * (index % 2)]} for index, row in enumerate(rows)]

    def collated(given: list[Any]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in given]
        return {"input_ids": pad_sequence(ids, batch_first=True), "labels": pad_sequence(ids, batch_first=True)}

    options = {"data_collator": collated}
    run = trainer(tmp_path / "empty", config=CONFIG, data=Dataset.from_list(uneven), max_steps=2, options=options)
    measurer = run.hesso_run.measurer
    assert [len(example["input_ids"][0]) for example in measurer.examples(64)] == [10] * 32
    first, others = (measurer.examples(8, between) for between in (False, True))
    assert [example["input_ids"][0].tolist() for example in first] == rows[1::8]
    assert [example["input_ids"][0].tolist() for example in others] == rows[5::8]
    run.train()
    assert run.hesso_plan.curves is not None
    assert run.hesso_run.process.finished


def test_of_a_loader_that_may_be_read_once_nothing_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Known(Once):
        """A stream whose length is known, which still can't be indexed."""

        def __len__(self) -> int:
            return 6

    class Streaming(Pairs):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.source, batch_size=2)

    stream = Known(6)
    run = Streaming(tiny_llama(), arguments(tmp_path, max_steps=3), hesso_config=CONFIG)
    run.source = stream
    with propagated(caplog):
        run.train()
    assert stream.given == [0, 1, 2, 3, 4, 5]
    assert "nothing is measured before training, the structures share the cut evenly: there is neither" in caplog.text
    assert "`healing` ('auto'): nothing is healed: there is neither a `train_dataset`" in caplog.text


def test_a_trainer_that_generates_says_by_which_attribute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Writes(HessoTrainer):
        hesso_generated = (*HessoTrainer.hesso_generated, "rollouts")

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.rollouts: list[Any] = []
            super().__init__(*args, **kwargs)

    with propagated(caplog):
        run = trainer(tmp_path, trainer_class=Writes, config=CONFIG, max_steps=3)
        run.train()
    assert run.hesso_plan.curves is None
    assert "the structures share the cut evenly: what Writes learns from it generates while it trains" in caplog.text
    asked = HessoConfig(pruning_ratio=0.3, stream_basis="principal")
    with pytest.raises(HessoError, match=r"`stream_basis` \('principal'\): what Writes .*; leave `stream_basis` out"):
        trainer(tmp_path, trainer_class=Writes, config=asked)


def test_replay_of_a_share_of_no_data_is_refused(tmp_path: Path) -> None:
    config = HessoConfig(pruning_ratio=0.3, replay_share=0.5)
    run = trainer(tmp_path, config=config)
    run.train_dataset = None
    with pytest.raises(HessoError, match=r"`replay_share` \(0.5\): there is neither a `train_dataset`"):
        run.create_optimizer()


def loader_job(folder: str, processes: int) -> None:
    """Leave the rows that are measured on where each process has batches of its own."""

    class Shards(Pairs):
        def get_train_dataloader(self) -> DataLoader:
            rank = self.args.process_index
            return DataLoader(self.source.select(range(12 * rank, 12 * rank + 12)).with_format("torch"), batch_size=2)

    run = Shards(tiny_llama(), arguments(Path(folder), max_steps=3), hesso_config=CONFIG)
    run.source = blocks(24)
    rows = [batch["input_ids"] for batch in run.hesso_run.measurer.examples(3)]
    torch.save(rows, f"{folder}/rank{run.args.process_index}.pt")


@pytest.mark.slow
def test_all_processes_measure_on_the_same_batches(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path, __name__, "loader_job", sharded=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == len(second) == 3
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
