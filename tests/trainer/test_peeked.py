"""Streams that may be read once: what is looked at before training, training reads too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from hesso_hf import HessoConfig
from hesso_hf.trainer.peeked import PeekedStream
from tests.support.training import blocks, trainer


class Once(IterableDataset):
    """Gives its examples to whoever comes first."""

    epochs = 7

    def __init__(self, count: int) -> None:
        self.given: list[int] = []
        self._source = iter([dict(row, number=index) for index, row in enumerate(blocks(count))])

    def __iter__(self) -> Iterator[Any]:
        for row in self._source:
            self.given.append(row["number"])
            yield {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}


def test_what_was_looked_at_comes_again_once() -> None:
    stream = PeekedStream(range(5))  # type: ignore[arg-type]
    assert stream.peek(2) == [0, 1]
    assert stream.peek(3) == [0, 1, 2]
    assert list(stream) == [0, 1, 2, 3, 4]
    assert stream.peek(2) == [0, 1]
    assert stream.peek(9) == [0, 1, 2], "training has begun: no more is taken from it"
    assert list(stream) == [0, 1, 2, 3, 4], "a later pass begins anew where that is possible"


def test_nothing_that_a_stream_has_is_lost() -> None:
    assert PeekedStream(Once(3)).epochs == 7
    with pytest.raises(AttributeError, match="no_such_thing"):
        PeekedStream(Once(3)).no_such_thing  # noqa: B018


def test_training_sees_every_example_of_a_stream_that_calibration_looked_at(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    stream = Once(48)
    config = HessoConfig(pruning_ratio=0.3, round_to=1, cric=True, cric_mode="probe", warmup_steps=2, pruning_steps=4)
    run = trainer(tmp_path, data=stream, config=config, max_steps=12)  # type: ignore[arg-type]
    plain = run.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and len(inputs["input_ids"]) == 4:  # the probe takes single examples
            seen.extend(inputs["input_ids"].tolist())
        return plain(model, inputs, *args, **kwargs)

    run.compute_loss = compute_loss  # type: ignore[method-assign]
    run.train()
    assert seen == blocks(48)["input_ids"]
    assert run.hesso_plan.curves is not None
