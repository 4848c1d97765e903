"""`hesso-hf prune --dry_run`: what a run would do and take, told by its first steps; no model is saved."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..export.storage import shown
from ..trainer.forecast import STEPS
from ..trainer.replay import FOLDER
from .recipe import Recipe


class Tried(Exception):
    """The first steps are taken."""


class TrySteps(TrainerCallback):
    """Ends the run when its first steps have shown what they take."""

    def __init__(self) -> None:
        self.taken = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count it."""
        self.taken += 1
        if self.taken == STEPS:
            raise Tried


def quiet(recipe: Recipe) -> Recipe:
    """Return the recipe of a run in which nothing is saved, evaluated, logged or published."""
    training = copy.copy(recipe.training)
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.logging_strategy, training.report_to = IntervalStrategy.NO, []
    training.push_to_hub = training.eval_on_start = training.enable_jit_checkpoint = False
    training.disable_tqdm = True
    return replace(recipe, training=training)


def dry_run(trainer: Any, disk: list[tuple[str, Path, int]]) -> None:
    """Take the first steps, which show what the whole run would take, and print what it would write.

    Args:
        disk: what it would write: what, where, bytes.
    """
    tried = TrySteps()
    trainer.add_callback(tried)
    with contextlib.suppress(Tried):
        trainer.train()
    if not trainer.is_world_process_zero():
        return
    if tried.taken < STEPS:
        print("time: the run is too short to tell")
    if trainer.replay is not None:
        print(f"replay: written in {Path(trainer.args.output_dir) / FOLDER}, where the run takes it from")
    print(*[f"disk: about {shown(size)} for {what} in {folder}" for what, folder, size in disk], sep="\n")
    print("dry run: no model was saved")
