"""The progress line and the logged metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import ProgressCallback

from hesso_hf.trainer.callbacks import phase_text
from tests.support.training import trainer


def test_the_progress_bar_says_which_phase_runs_and_when_pruning_ends(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    shown: list[str] = []
    written: list[str] = []

    class Bar:
        def write(self, text: str) -> None:
            written.append(text)

        def set_postfix_str(self, text: str) -> None:
            shown.append(text)

    class Progress(ProgressCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.training_bar = Bar()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None: ...

        def on_log(self, *args: Any, **kwargs: Any) -> None: ...

        def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...

    run.add_callback(Progress())
    run.train()
    assert shown == [
        "warm-up, pruning starts at step 2",
        "pruning period 1/2, ends at step 7",
        "pruning period 2/2, ends at step 7",
        "recovery, pruned since step 7",
    ]
    assert written == [run.hesso_plan.preview(run.hesso_optimizer.process.schedule)]
    assert "steps 3 to 7 of 12" in written[0]
    assert phase_text(run.hesso_optimizer.process) == shown[-1]
