"""What a run shows, logs and does when it is told to stop: the progress line, the metrics, a checkpoint of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import Store
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.utils import logging

from ..compat import default_store
from ..distributed.collectives import barrier, world_size
from ..engines.engine import Steps
from ..export.page.words import named
from ..pruning.process import PruningProcess
from ..pruning.schedule import PHASES

logger = logging.get_logger(__name__)

KEY = "hesso_stops_after_step"
EXIT_CODE = 128 + 15  # what a shell says of a process that SIGTERM ended: the work isn't done


def phase_text(process: PruningProcess) -> str:
    """Describe where a run is, for people."""
    schedule, step = process.schedule, process.step
    phase = schedule.phase(step)
    if phase == "warmup":
        next_phase = "CRIC" if schedule.cycles else "pruning"
        return f"warm-up, {next_phase} starts at step {schedule.warmup_steps}"
    sampling = schedule.sampling_step(step)
    if sampling is not None:
        return f"CRIC cycle {sampling.index + 1} of at most {schedule.cycles}"
    position = schedule.period_step(step)
    if position is not None:
        return f"pruning period {position.index + 1}/{len(schedule.periods)}, ends at step {schedule.end}"
    for saved in schedule.rung_saves:
        if saved - schedule.rung_steps <= step <= saved:
            return f"recovery, a model is saved on the way at step {saved}"
    return f"recovery, pruned since step {schedule.end}"


def metrics(steps: Steps, parameters: Any) -> dict[str, float]:
    """Return what is logged: phase (0 warm-up, 1 sampling, 2 pruning, 3 recovery), units, ratios, norm."""
    process = steps.process
    found = {"hesso/phase": float(PHASES.index(process.schedule.phase(process.step)))}
    kept = {}
    counts = torch.stack([(scales == 0).sum() for scales in process.scales.values()]).cpu().tolist()
    for (name, scales), pruned in zip(process.scales.items(), counts, strict=True):
        found[f"hesso/pruned_{name}"] = float(pruned)
        kept[name] = process.groups.structures[name].num_units - pruned / max(1, scales.shape[0])
    found["hesso/pruned_ratio"] = 1 - float(parameters(kept)) / parameters.full
    found["hesso/target_ratio"] = process.target.parameter_ratio
    found["hesso/redundant_norm"] = process.redundant_norm()
    if process.trial is not None:
        found["hesso/cric_cycle"] = float(process.trial.cric.cycles)
        found["hesso/cric_units_on_trial"] = float(process.trial.units_on_trial())
    return found


def in_short(logs: dict[str, Any]) -> dict[str, Any]:
    """Return what is printed of logs: HESSO's metrics in one entry, `recovery, 50.4% removed`."""
    own = {key: value for key, value in logs.items() if key.startswith("hesso/")}
    if "hesso/phase" not in own:
        return dict(logs)
    gone, target = own["hesso/pruned_ratio"], own["hesso/target_ratio"]
    phase = named(PHASES[int(own["hesso/phase"])])
    of = "" if gone >= target else f" of {target:.1%}"
    kept = {key.removeprefix("hesso/"): value for key, value in own.items() if key.endswith("_loss")}
    return (
        {key: value for key, value in logs.items() if key not in own}
        | kept
        | {"hesso": f"{phase}, {gone:.1%}{of} removed"}
    )


class ShortBar(ProgressCallback):
    """Transformers' progress bar, with metrics in short."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write them above the bar."""
        super().on_log(args, state, control, in_short(logs), **kwargs)


class ShortLines(PrinterCallback):
    """Transformers' printed lines, with metrics in short."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print them."""
        super().on_log(args, state, control, in_short(logs), **kwargs)


class HessoProgressCallback(TrainerCallback):
    """Shows the phase on the progress bar and logs its changes; what the stock callbacks print is shortened."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._shown = ""
        callbacks = trainer.callback_handler.callbacks
        for index, callback in enumerate(callbacks):
            if type(callback) is ProgressCallback:
                callbacks[index] = ShortBar(callback.max_str_len)
            elif type(callback) is PrinterCallback:
                callbacks[index] = ShortLines()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the plan again: with a smaller batch it has more steps."""
        self._shown = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say before the first step what goes and when, above the progress bar; update it where the phase changes."""
        process, bar = self._trainer.hesso_optimizer.process, self._bar()
        if not self._shown:
            preview = self._trainer.hesso_plan.preview(process.schedule)
            logger.info(preview)
            if bar is not None:
                bar.write(preview)
        text = phase_text(process)
        if text == self._shown:
            return
        self._shown = text
        logger.info(f"HESSO: {text}")
        if bar is not None:
            bar.set_postfix_str(text)

    def _bar(self) -> Any:
        found = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
        return found[0].training_bar if found else None


class SaveOnTheWay(TrainerCallback):
    """Has smaller models saved where pruning has come as far as they are small."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With a smaller batch it begins again."""
        self._trainer.hesso_run.ladder.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are gone by now."""
        self._trainer.hesso_run.ladder.after_step()


class CompactAtEnd(TrainerCallback):
    """Has the model become the smaller one when pruning ends, before that step is logged, evaluated or saved."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are gone by now."""
        self._trainer.hesso_run.compacting.at_the_end()


class StopTogether(TrainerCallback):
    """Agrees on the step after which `enable_jit_checkpoint` saves: each process has a signal and a clock of its own.

    A process that was told names the next step when it is at the end of one. No other can be past that by then, since
    every step waits for the gradients of all.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._store: Store | None = None
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place of what saves, and among several processes of what sets the request to save."""
        found = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
        if not found or found[0].jit_manager is None:
            return
        manager: CheckpointManager = found[0].jit_manager
        if world_size() == 1:
            plain = manager.execute_jit_checkpoint
            manager.execute_jit_checkpoint = lambda: self._save(plain)  # type: ignore[method-assign]
        else:
            self._store = default_store()
            manager._enable_checkpoint = self._ask  # type: ignore[method-assign]

    def _ask(self) -> None:
        self._told = True  # in a thread of its own, which can't tell how far the step is

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name a step, or save after the one that was named."""
        if self._store is None:
            return
        if self._told:
            self._store.compare_set(KEY, "", str(state.global_step + 1))
        if not self._store.check([KEY]) or state.global_step < int(self._store.get(KEY)):
            return
        control.should_save, control.should_training_stop = False, True
        # Transformers' own way has all processes make and remove one file, which fails where two are at it at once
        self._save(lambda: self._trainer._save_checkpoint(self._trainer.model, trial=None))
        barrier()  # a process that ends early may have the launcher end the one that still writes

    def _save(self, save: Callable[[], None]) -> None:
        save()
        self._trainer.told_to_stop = True


# in their order: what is saved on the way and in checkpoints is what was cut before
OWN_CALLBACKS = (HessoProgressCallback, SaveOnTheWay, CompactAtEnd, StopTogether)
