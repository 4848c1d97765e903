"""The progress line and the logged metrics."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hesso_hf.trainer.callbacks import ShortBar, ShortLines, phase_text
from tests.support.tiny import tiny_llama
from tests.support.training import hesso_config, logged, trainer


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


def test_what_is_printed_has_the_metrics_in_one_entry_and_what_is_logged_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, model=tiny_llama(), config=hesso_config(distillation_alpha=0.5))
    run.train()
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    said = [line["hesso"] for line in printed if "hesso" in line]
    ratio = run.hesso_plan.target.parameter_ratio
    assert said[0] == f"warm-up, 0.0% of {ratio:.1%} removed"
    assert said[3].startswith("pruning, ")
    assert said[-1] == f"recovery, {ratio:.1%} removed"
    assert not [key for line in printed for key in line if key.startswith("hesso/")]
    assert all("distillation_loss" in line for line in printed if "hesso" in line)
    assert len(logged(run, "hesso/pruned_mlp_channels")) == len(said) == 12


@pytest.mark.parametrize("quiet", [True, False])
def test_only_stock_callbacks_are_replaced_and_they_are_found_by_their_class(quiet: bool, tmp_path: Path) -> None:
    class Mine(ProgressCallback):
        """A user's own."""

    mine, stock = Mine(), PrinterCallback if quiet else ProgressCallback
    run = trainer(tmp_path, disable_tqdm=quiet, options={"callbacks": [mine]})
    assert mine in run.callback_handler.callbacks
    run.remove_callback(mine)
    assert isinstance(run.pop_callback(stock), ShortLines if quiet else ShortBar)
    assert not [found for found in run.callback_handler.callbacks if isinstance(found, stock)]
