"""The progress line and the logged metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hesso_hf.export.storage import shown
from hesso_hf.pruning import phases
from hesso_hf.trainer.forecast import Forecast, Pace, _as_if_alone, duration
from hesso_hf.trainer.progress import ShortBar, ShortLines, phase_text
from tests.support.tiny import tiny_llama
from tests.support.training import LENGTH, hesso_config, logged, trainer


class _After(TrainerCallback):
    """Does something after each step."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._work()


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
    phases = list(dict.fromkeys(text.split(", units")[0] for text in shown))
    assert phases == ["warm-up, pruning starts with step 3", "pruning 1 of 2", "pruning 2 of 2", "recovery"]
    total = 2 * (3 - 2) + 2 * (44 - 28) + (60 - 48)
    assert shown[0].endswith(f", units 0 of {total}")
    assert re.fullmatch(rf"recovery, units {total} of {total}, loss [\d.]+", shown[-1])
    plan, first_steps = written
    assert plan.startswith(run.hesso_plan.preview(run.hesso_optimizer.process.schedule))
    assert f"tokens: about {4 * LENGTH} a step, {12 * 4 * LENGTH} in 12 steps" in plan
    assert "memory: about " in plan
    assert plan.endswith("\n  time: known after 3 steps")
    assert re.fullmatch(
        r"time: .* s a step, \d+ s in all.*, plus evaluations and saving\nmemory: [\d.]+ [MG]B of main memory",
        first_steps,
    )
    assert phase_text(run.hesso_optimizer.process) == "recovery"
    written.clear()
    run.train()
    dense = f"the model with pruned units at zero ({run.model.num_parameters():,} parameters)"
    assert written[0].startswith(f"HESSO: pruning is over, training goes on with {dense}\n")


def test_a_run_of_one_step_has_no_plural(tmp_path: Path) -> None:
    config = hesso_config(warmup_steps=0, pruning_steps=1, pruning_periods=1)
    run = trainer(tmp_path, config=config, max_steps=1)
    run.create_optimizer()
    assert f"tokens: about {4 * LENGTH} a step, {4 * LENGTH} in 1 step" in Forecast(run).before()


@pytest.mark.parametrize(
    ("optim", "copies", "told"),
    [
        ("adamw_torch", 4, " for weights, gradients and Adam's two moments, plus activations"),
        ("sgd", 2, " for weights and gradients, plus activations"),
        ("adagrad", 3, " for weights, gradients and the squares that Adagrad sums up, plus activations"),
        ("adafactor", 2, " for weights and gradients, plus Adafactor's state and activations"),
    ],
)
def test_the_memory_is_that_of_the_optimizer(optim: str, copies: int, told: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, optim=optim)
    run.create_optimizer()
    (line,) = [line for line in Forecast(run).before() if line.startswith("memory: ")]
    assert line == f"memory: about {shown(copies * 4 * run.model.num_parameters())}{told}"


def test_the_memory_has_the_model_that_teaches(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=tiny_llama(), config=hesso_config(distillation_alpha=0.5))
    run.create_optimizer()
    (line,) = [line for line in Forecast(run).before() if line.startswith("memory: ")]
    assert f"moments, {shown(4 * run.model.num_parameters())} for the model that it is taught by, plus act" in line


def test_what_is_printed_is_a_line_of_progress_and_what_is_logged_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, model=tiny_llama(), config=hesso_config(distillation_alpha=0.5))
    run.train()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("HESSO: ")  # the plan, once
    assert sum(line.startswith("HESSO: ") for line in printed) == 1
    lines = [line for line in printed if ", units " in line]
    total = int(logged(run, "hesso/target_units")[0])
    assert re.match(rf"step 1 of 12, warm-up, pruning starts with step 3, units 0 of {total}, loss [\d.]+, ", lines[0])
    assert lines[2].startswith(f"step 3 of 12, pruning 1 of 2, units 0 of {total}, loss ")
    assert " lr 0.008333, " in lines[2]
    assert "epoch" not in lines[2]
    assert lines[-1].startswith(f"step 12 of 12, recovery, units {total} of {total}, loss ")
    assert all(re.search(r", ETA \d+ s$", line) for line in lines[1:-1])
    assert all(line.count("loss ") == 2 and "distillation_loss" in line for line in lines)
    assert "hesso/" not in "".join(printed)
    assert len(lines) == len(logged(run, "hesso/pruned_mlp_channels")) == 12
    parts = [logged(run, f"hesso/pruned_{name}") for name in run.hesso_plan.target.num_units]
    assert logged(run, "hesso/pruned_units") == [sum(step) for step in zip(*parts, strict=True)]
    assert logged(run, "hesso/pruned_units")[-1] == total


def test_the_pace_leaves_out_what_pruning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 19.0])
    monkeypatch.setattr("hesso_hf.trainer.forecast.time.perf_counter", lambda: next(clock))
    pace = Pace()
    for pruning in (1.0, 1.0, 6.0):
        pace.step_ended(torch.device("cpu"), pruning)
    assert pace.seconds == 2.0
    assert [duration(seconds) for seconds in (89, 600, 7200)] == ["89 s", "10 min", "2.0 h"]


@pytest.mark.parametrize("cric", ["auto", False])
def test_what_judging_takes_is_told_by_its_passes_and_then_by_those_that_were_made(
    cric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hesso_config(warmup_steps=4, pruning_steps=4, healing="auto", cric=cric, saliency="reconstruction")
    run = trainer(tmp_path, config=config)
    told = next(each for each in run.callback_handler.callbacks if hasattr(each, "_forecast"))._forecast
    read, judged, left, took = {"forward": 0, "backward": 0}, [], [], []
    base, forward, backward = type(run.model.model), type(run.model.model).forward, torch.autograd.grad
    mark = phases.PruningPeriod.mark

    def reads(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        read["forward"] += input_ids.numel() if mask is None else int(mask.sum())
        return forward(self, input_ids, **kwargs)

    def returns(logits: Any, *args: Any, **kwargs: Any) -> Any:
        read["backward"] += logits[..., 0].numel()
        return backward(logits, *args, **kwargs)

    def counted(self: Any, optimizer: Any) -> None:
        read.update(forward=0, backward=0)
        with monkeypatch.context() as during:
            during.setattr(base, "forward", reads)
            during.setattr(torch.autograd, "grad", returns)
            mark(self, optimizer)
        judged.append((read["forward"] + 2 * read["backward"]) / 3)  # tokens of training that take as long

    def note() -> None:
        left.append(told._seconds_of_periods(run.hesso_optimizer.process.step))
        took.append(told.pace.seconds)

    monkeypatch.setattr(phases.PruningPeriod, "mark", counted)
    run.add_callback(_After(note))
    run.train()
    a_period = told._steps_of_a_period()
    assert judged == pytest.approx([a_period * 4 * LENGTH] * 2)
    assert left[0] == 0  # no step is timed yet
    assert left[1:4] == pytest.approx([2 * a_period * seconds for seconds in took[1:4]])
    assert left[5] >= left[4] > 0  # one of two is over
    assert left[6:] == [0.0] * 6


def test_what_was_done_before_the_first_period_is_not_counted_for_each(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(warmup_steps=1, pruning_steps=6, pruning_periods=3))
    run.create_optimizer()
    told, optimizer = Forecast(run), run.hesso_optimizer
    optimizer.seconds = 5.0  # of an earlier run of the same optimizer
    told.before()
    for step, seconds in ((1, 65.0), (2, 75.0), (4, 85.0)):  # CRIC's probe, and two periods
        optimizer.process.state.step, optimizer.seconds = step, seconds
        told.step_ended()
    assert told._seconds_of_periods(0) == 30.0
    assert told._seconds_of_periods(4) == 10.0


def test_a_step_with_teacher_and_replay_takes_as_long_as_more_tokens() -> None:
    alone = SimpleNamespace(distillation=None, replay=None)
    taught = SimpleNamespace(distillation=object(), replay=SimpleNamespace(sizes=SimpleNamespace(share=0.25)))
    assert _as_if_alone(alone) == 1
    assert _as_if_alone(taught) == pytest.approx(4 / 3 * (1 + 1 / 3))


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
