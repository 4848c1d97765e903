"""The pruning state beside a checkpoint: what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from hesso_hf.errors import CheckpointMismatchError
from hesso_hf.export.checkpoint_state import check_resumable
from tests.support.tiny import tiny_llama


def test_a_checkpoint_that_is_not_there_is_told_from_one_of_another_trainer(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(
        CheckpointMismatchError,
        match=r"^Can't find a valid checkpoint at .*checkpoint-8'\) doesn't exist; there are: \['checkpoint-4'\]",
    ):
        check_resumable(tmp_path / "checkpoint-8", tiny_llama())
    with pytest.raises(
        CheckpointMismatchError, match=rf"doesn't exist; nor is there another .* in {tmp_path}/elsewhere$"
    ):
        check_resumable(tmp_path / "elsewhere" / "checkpoint-8", tiny_llama())
    with pytest.raises(CheckpointMismatchError, match="not written by HessoTrainer"):
        check_resumable(tmp_path / "checkpoint-4", tiny_llama())
