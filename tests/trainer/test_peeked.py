"""Streams that may be read once: what is looked at before training, training reads too."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hesso_hf import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.trainer.peeked import peeked
from tests.support import fsdp_cpu
from tests.support.training import blocks, trainer


class Once(IterableDataset):
    """Gives its examples to whoever comes first."""

    epochs = 7

    def __init__(self, count: int, seed: int = 3) -> None:
        self.given: list[int] = []
        self._source = iter([dict(row, number=index) for index, row in enumerate(blocks(count, seed))])

    def __iter__(self) -> Iterator[Any]:
        for row in self._source:
            self.given.append(row["number"])
            yield {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}


class Counting(IterableDataset):
    """Begins anew; workers share it out among them, as the documentation of torch has it."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        yield from range(20) if worker is None else range(worker.id, 20, worker.num_workers)


class Rewinding(IterableDataset):
    """Is its own iterator, which `iter` rewinds."""

    def __iter__(self) -> Rewinding:
        self._numbers = iter(range(20))
        return self

    def __next__(self) -> int:
        return next(self._numbers)


class Closing(IterableDataset):
    """Can be read once, and closes what it reads from when one that reads it goes."""

    def __init__(self) -> None:
        self._numbers = iter(range(20))

    def __iter__(self) -> Iterator[int]:
        try:
            yield from self._numbers
        finally:
            self._numbers = iter(())


@pytest.mark.parametrize("kind", [Counting, Rewinding, Closing])
def test_what_was_looked_at_comes_again_once(kind: type) -> None:
    stream = peeked(kind(), "train_dataset")
    assert stream.peek(2) == [0, 1]
    assert stream.peek(10) == list(range(10))
    assert list(stream) == list(range(20))
    assert stream.peek(2) == [0, 1]
    assert 10 <= len(stream.peek(20)) < 20, "training has begun: no more is taken from it"
    assert list(stream) == ([] if kind is Closing else list(range(20))), "a later pass begins anew where it can"


def test_workers_share_out_a_stream_that_was_looked_at() -> None:
    stream = peeked(Counting(), "train_dataset")
    assert stream.peek(3) == [0, 1, 2]
    assert len(stream) == len(Counting())  # type: ignore[arg-type]
    loaded = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(loaded) == list(range(20))
    assert list(pickle.loads(pickle.dumps(stream))) == list(range(20)), "as for workers that are started anew"


def test_what_is_left_of_a_stream_goes_to_a_worker_that_starts_as_a_copy_and_to_no_other() -> None:
    stream = peeked(Closing(), "train_dataset")
    stream.peek(3)
    assert list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork")) == list(range(20))
    with pytest.raises(HessoError, match=r"`train_dataset` \(Closing\) can be read once.*dataloader_num_workers=0"):
        pickle.dumps(stream)


def test_nothing_that_a_stream_has_is_lost() -> None:
    assert peeked(Once(3), "train_dataset").epochs == 7
    with pytest.raises(AttributeError, match="no_such_thing"):
        peeked(Once(3), "train_dataset").no_such_thing  # noqa: B018


def trained_on(folder: Path, stream: IterableDataset, rows: int, **changes: Any) -> tuple[list[list[int]], Any]:
    """Train with a probe on a stream; return the examples that this process trained on, and the run."""
    seen: list[list[int]] = []
    config = HessoConfig(pruning_ratio=0.3, round_to=1, cric=True, cric_mode="probe", warmup_steps=2, pruning_steps=4)
    run: Any = trainer(
        folder, data=stream, config=config, max_steps=12, per_device_train_batch_size=rows, **changes  # type: ignore[arg-type]
    )  # fmt: skip
    plain = run.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and len(inputs["input_ids"]) == rows:  # the probe takes single examples
            seen.extend(inputs["input_ids"].tolist())
        return plain(model, inputs, *args, **kwargs)

    run.compute_loss = compute_loss
    run.train()
    return seen, run


def test_training_sees_every_example_of_a_stream_that_calibration_looked_at(tmp_path: Path) -> None:
    seen, run = trained_on(tmp_path, Once(48), 4)
    assert seen == blocks(48)["input_ids"]
    assert run.hesso_plan.curves is not None


def ranks_job(folder: str, processes: int, dispatch: bool, seeds: list[int]) -> None:
    """Train on a stream of each process' own, and leave what was trained and measured on."""
    stream = Once(48, seeds[int(os.environ["RANK"])])
    options = {"accelerator_config": {"dispatch_batches": dispatch}}
    seen, run = trained_on(Path(folder), stream, 2, **options)
    measured = [example["input_ids"].tolist() for example in run.hesso_run.measurer.examples(4)]
    found = {"seen": seen, "measured": measured, "target": run.hesso_plan.target.to_dict()}
    Path(folder, f"rank{run.args.process_index}.json").write_text(json.dumps(found))


def test_two_processes_train_on_all_that_was_looked_at_and_measure_on_the_same(tmp_path: Path) -> None:
    ways = {"dispatched": (True, [3, 3]), "read": (False, [3, 3]), "own": (False, [3, 4])}
    jobs = [
        fsdp_cpu.Job(__name__, "ranks_job", tmp_path / name, {"dispatch": dispatch, "seeds": seeds})
        for name, (dispatch, seeds) in ways.items()
    ]
    done = fsdp_cpu.run_jobs(tmp_path, jobs, sharded=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (_, seeds) in ways.items():
        first, other = (json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert first["measured"] == other["measured"] == [[row] for row in blocks(4)["input_ids"]]
        assert first["target"] == other["target"]
        for rank, found in enumerate((first, other)):  # of each four rows a process has two
            rows = blocks(48, seeds[rank])["input_ids"]
            assert found["seen"] == [row for index, row in enumerate(rows) if index % 4 // 2 == rank], (name, rank)
