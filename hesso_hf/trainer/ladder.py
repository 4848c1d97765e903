"""The models that are saved on the way to the smallest one, where pruning has come so far (`export_at`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import logging

from ..budget.ladder import rung_folder
from ..config import HessoConfig
from ..config.files import REPORT_NAME
from ..engines.engine import Engine
from ..export.page.page import Model, report_page
from ..export.storage import check_not_base

if TYPE_CHECKING:
    from .run import PruningRun

logger = logging.get_logger(__name__)

LADDER_NAME = "ladder.html"


class Ladder:
    """Saves each model on the way.

    Args:
        trainer: whose `output_dir` takes the models.
        config: of the run.
        engine: returns the trainer's engine of now.
        run: what is pruned.

    Attributes:
        on: number of the model that is being saved, None between.
    """

    def __init__(self, trainer: Trainer, config: HessoConfig, engine: Callable[[], Engine], run: PruningRun) -> None:
        self._trainer, self._config, self._engine, self._run = trainer, config, engine, run
        self._seen = -1  # step of pruning after the last step of training, which may have been skipped
        self.on: int | None = None

    @property
    def folders(self) -> dict[float, Path]:
        """The folders of the models of this run's sizes that were saved, by the share removed."""
        named = {share: self._folder(share) for share in self._config.rungs}
        sizes = dict(zip(named, self._run.plan.rungs, strict=True))
        return {share: folder for share, folder in named.items() if _target_of(folder) == sizes[share].to_dict()}

    def _folder(self, share: float) -> Path:
        return Path(self._trainer.args.output_dir or "") / rung_folder(share)

    def check(self, base: Path | None) -> None:
        """Refuse to replace the base model.

        Args:
            base: the folder that it was read from, None where that is no folder.

        Raises:
            HessoError: naming the folder.
        """
        for share in self._config.rungs:
            check_not_base(self._folder(share), base, self._config.overwrite_base)

    def begin(self) -> None:
        """Training begins, or begins again."""
        self._seen = -1

    def after_step(self) -> None:
        """Save a model where it is due; where that fails training goes on, with a warning."""
        process, seen = self._run.process, self._seen
        self._seen = process.step
        if not process.rungs or process.step == seen or process.step not in process.schedule.rung_saves:
            return
        self.on = process.schedule.rung_saves.index(process.step)
        share = self._config.rungs[self.on]
        target = self._folder(share)
        try:
            with self._run.quality.meanwhile():
                self._engine().export(self._run, target)
        except Exception as error:  # all processes have one, of whatever type
            logger.warning(f"`export_at` ({share:g}): no model is saved on the way to the smaller one: {error}")
        else:
            logger.info(f"`export_at` ({share:g}): {process.rungs[self.on].parameters_after:,} parameters in {target}")
        finally:
            self.on = None

    def compare(self, target: Path) -> None:
        """Write a page that compares the models on the way with the last one.

        Args:
            target: folder of the last one.
        """
        if not self._config.rungs or not self._trainer.args.should_save:
            return
        path = Path(self._trainer.args.output_dir or "") / LADDER_NAME
        try:
            folders = (*self.folders.values(), target)
            reports = [json.loads((folder / REPORT_NAME).read_text(encoding="utf-8")) for folder in folders]
            models = [Model.of(folder.name, report) for folder, report in zip(folders, reports, strict=True)]
            path.write_text(report_page(models), encoding="utf-8")
        except Exception as error:  # a page must not cost the model
            logger.warning(f"`export_at`: the page that compares the models isn't written: {error}")


def _target_of(folder: Path) -> Any:
    """Return what the model in a folder was to be, None where there is none."""
    path = folder / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8")).get("target") if path.is_file() else None
