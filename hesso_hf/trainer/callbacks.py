"""What is shown and logged: a progress line that says which phase runs and when pruning ends, and the metrics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..engines.deepspeed.steps import ZeroSteps
from ..pruning.optimizer import HessoOptimizer
from ..pruning.process import PruningProcess
from ..pruning.schedule import PHASES

logger = logging.get_logger(__name__)


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
    return f"recovery, pruned since step {schedule.end}"


def metrics(optimizer: HessoOptimizer | ZeroSteps, parameters: Any) -> dict[str, float]:
    """Return what is logged: phase (0 warm-up, 1 sampling, 2 pruning, 3 recovery), units, ratios, norm, seconds."""
    process = optimizer.process
    found = {"hesso/phase": float(PHASES.index(process.schedule.phase(process.step)))}
    kept = {}
    for name, scales in process.scales.items():
        pruned = int((scales == 0).sum())
        found[f"hesso/pruned_{name}"] = float(pruned)
        kept[name] = process.groups.structures[name].num_units - pruned / max(1, scales.shape[0])
    found["hesso/pruned_ratio"] = 1 - float(parameters(kept)) / parameters.full
    found["hesso/target_ratio"] = process.target.parameter_ratio
    found["hesso/redundant_norm"] = process.redundant_norm()
    found["hesso/seconds"] = optimizer.seconds
    if process.trial is not None:
        found["hesso/cric_cycle"] = float(process.trial.cric.cycles)
        found["hesso/cric_units_on_trial"] = float(process.trial.units_on_trial())
    return found


@contextlib.contextmanager
def uncounted(trainer: Any) -> Iterator[None]:
    """Put back what a trainer counts for its log: the attributes that are numbers, or hold nothing but numbers.

    Some trainers count tokens and collect metrics where they compute a loss, also one that is only measured.
    """
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _holds_numbers(value)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_holds_numbers(each) for each in value.values())
    if isinstance(value, list):
        return all(_holds_numbers(each) for each in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


class HessoProgressCallback(TrainerCallback):
    """Shows the phase on the progress bar and logs its changes."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._shown = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the line where the phase changed."""
        text = phase_text(self._trainer.hesso_optimizer.process)
        if text == self._shown:
            return
        self._shown = text
        logger.info(f"HESSO: {text}")
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
            if bar is not None:
                bar.set_postfix_str(text)
