"""What a run shows: its plan before the first step, one line of progress, and what its first steps took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_in_notebook, logging

from ..pruning.process import PruningProcess
from ..structures.lora import num_parameters
from .forecast import STEPS, Forecast

logger = logging.get_logger(__name__)

SHORT = {"learning_rate": "lr"}
LEFT_OUT = ("epoch", "total_flos")  # which the steps tell, or nobody watches


def phase_text(process: PruningProcess) -> str:
    """Describe where a run is, for people; steps are counted from 1."""
    schedule, step = process.schedule, process.step
    phase = schedule.phase(step)
    if phase == "warmup":
        return f"warm-up, {'CRIC' if schedule.cycles else 'pruning'} starts with step {schedule.warmup_steps + 1}"
    if (sampling := schedule.sampling_step(step)) is not None:
        return f"CRIC cycle {sampling.index + 1} of at most {schedule.cycles}"
    if (position := schedule.period_step(step)) is not None:
        return f"pruning {position.index + 1} of {len(schedule.periods)}"
    for saved in schedule.rung_saves:
        if saved - schedule.rung_steps <= step <= saved:
            return f"recovery, a model is saved on the way at step {saved}"
    return "recovery"


def units_pruned(process: PruningProcess) -> tuple[dict[str, int], int]:
    """Return the units at zero, over all layers of each structure, and how many there will be at the end in all."""
    counts = torch.stack([(scales == 0).sum() for scales in process.scales.values()]).cpu().tolist()
    target = sum(
        round((process.groups.structures[name].num_units - process.target.kept_units[name]) * scales.shape[0])
        for name, scales in process.scales.items()
    )
    return dict(zip(process.scales, counts, strict=True)), target


class Progress:
    """The parts of the line of progress, which two callbacks show: the phase, the units, the loss, the time left."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast, self._phase, self._units, self._loss = forecast, "", "", ""

    def enter(self, process: PruningProcess) -> bool:
        """Take the phase, and tell whether it is another one; the units are counted where it is."""
        if (phase := phase_text(process)) == self._phase:
            return False
        pruned, target = units_pruned(process)
        self._phase, self._units = phase, _units(sum(pruned.values()), target)
        return True

    @property
    def now(self) -> str:
        """The phase, the units, and the loss that was logged last."""
        return ", ".join(filter(None, (self._phase, self._units, self._loss)))

    def line(self, state: Any, logs: Mapping[str, Any]) -> str:
        """Return what is printed of logs, HESSO's metrics in short; trackers and `log_history` have the rest."""
        shown = [f"step {state.global_step:,} of {state.max_steps:,}"]
        if "hesso/pruned_units" in logs:
            self._units = _units(*(int(logs[f"hesso/{name}_units"]) for name in ("pruned", "target")))
            self._loss = f"loss {_value(logs['loss'])}"
            shown += [self._phase, self._units]
        shown += [
            f"{SHORT.get(key, key.removeprefix('hesso/'))} {_value(value)}"
            for key, value in logs.items()
            if key.endswith("_loss") or not key.startswith("hesso/")
            if key not in LEFT_OUT and not key.endswith("_per_second")
        ]
        return ", ".join(shown)

    def left(self, state: Any) -> str:
        """Return the time that the steps to come will take, as those before did; "" where that can't be told yet."""
        return self._forecast.left(state.max_steps - state.global_step)


def _units(pruned: int, target: int) -> str:
    return f"units {pruned:,} of {target:,}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:100]


class ShortBar(ProgressCallback):
    """Transformers' progress bar, with the line of progress in it and metrics in short above it."""

    def __init__(self, max_str_len: int, progress: Progress) -> None:
        super().__init__(max_str_len)
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write them; the bar itself has the time that is left, where it is shown."""
        bar: Any = self.training_bar
        if state.is_world_process_zero and bar is not None:
            left = self._progress.left(state) if getattr(bar, "disable", False) and "loss" in logs else ""
            bar.write(self._progress.line(state, logs) + left)
            bar.set_postfix_str(self._progress.now)


class ShortLines(PrinterCallback):
    """Transformers' printed lines, with metrics in short."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print them."""
        if state.is_local_process_zero and logs is not None:
            left = self._progress.left(state) if "loss" in logs else ""
            print(self._progress.line(state, logs) + left)


class HessoProgressCallback(TrainerCallback):
    """Shows the plan, the phases and what the first steps took, where Transformers shows its progress.

    That is above its bar, printed in a notebook and where it prints lines, and logged where it shows nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._forecast, self._begun = trainer, Forecast(trainer), False
        self._progress = Progress(self._forecast)
        callbacks = trainer.callback_handler.callbacks
        for index, callback in enumerate(callbacks):
            if type(callback) is ProgressCallback:
                callbacks[index] = ShortBar(callback.max_str_len, self._progress)
            elif type(callback) is PrinterCallback:
                callbacks[index] = ShortLines(self._progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the plan again: with a smaller batch it has more steps."""
        self._begun = False
        self._forecast.restart()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say before the first step what goes and when."""
        if self._begun:
            return
        self._begun = True
        takes = self._forecast.before()  # of a stream all processes take the main one's rows
        if not state.is_world_process_zero:
            return
        process = self._trainer.hesso_optimizer.process
        if process.step and process.finished:  # of a checkpoint, or an earlier `train`
            what = "smaller model" if process.state.compaction is not None else "model with pruned units at zero"
            count = num_parameters(self._trainer.hesso_run.model)
            plan = f"HESSO: pruning is over, training goes on with the {what} ({count:,} parameters)"
        else:
            plan = self._trainer.hesso_plan.preview(process.schedule)
        self._say("\n  ".join([plan, *takes]))
        self._enter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step, and say where the phase of the next one is another."""
        self._forecast.step_ended()
        if state.is_world_process_zero:
            if self._forecast.pace.steps == STEPS:
                self._say("\n".join(self._forecast.by_first_steps()))
            self._enter()

    def _enter(self) -> None:
        if not self._progress.enter(self._trainer.hesso_optimizer.process):
            return
        if (bar := self._bar()) is not None:
            bar.set_postfix_str(self._progress.now)
        else:
            logger.info(f"HESSO: {self._progress.now}")

    def _say(self, text: str) -> None:
        callbacks = self._trainer.callback_handler.callbacks
        if (bar := self._bar()) is not None:
            bar.write(text)
        elif any(isinstance(found, PrinterCallback) for found in callbacks) or (
            is_in_notebook() and not self._trainer.args.disable_tqdm
        ):
            print(text)
        else:
            logger.info(text)

    def _bar(self) -> Any:
        found = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
        return found[0].training_bar if found else None
