"""The training log of a run: what Transformers' Trainer writes as `trainer_state.json` into its checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import HessoError

LOG_NAME = "trainer_state.json"
_LOSSES = {"loss": "training loss", "eval_loss": "loss on held-out examples"}


@dataclass(frozen=True)
class TrainingLog:
    """Losses over steps.

    Attributes:
        losses: (step, loss) by what the loss is of.
        skipped: number of losses that aren't finite, which no picture can show.
    """

    losses: dict[str, list[tuple[int, float]]]
    skipped: int


def log_of(model: Path, report: Mapping[str, Any]) -> TrainingLog | None:
    """Return the log in or beside a smaller model's folder, None where there is none of its run."""
    for folder in (model, model.absolute().parent):
        path = _newest(folder)
        if path is None:
            continue
        state, planned = _read(path), (report.get("schedule") or {}).get("total_steps")
        if planned is not None and planned == state.get("max_steps"):
            return _losses(state)
        print(
            f"hesso-hf: {path} is left out: it is of a run of {state.get('max_steps')} steps, and the report says "
            f"{planned}; name the run's folder by `--run` if it is the right one",
            file=sys.stderr,
        )
    return None


def log_in(run: str) -> TrainingLog:
    """Return the log of a run's folder.

    Raises:
        HessoError: naming the folder, where it has none, or one without a loss.
    """
    path = _newest(Path(run))
    if path is None:
        raise HessoError(f"`--run` ({run!r}): neither it nor a checkpoint-* in it has a {LOG_NAME}; name another")
    found = _losses(_read(path))
    if found is None:
        raise HessoError(f"`--run` ({run!r}): {path} has no loss in it; set `logging_steps` for the next run")
    return found


def _newest(folder: Path) -> Path | None:
    """Return the log of the whole run, or that of its last checkpoint."""
    if (folder / LOG_NAME).is_file():
        return folder / LOG_NAME
    found = {
        int(path.parent.name.removeprefix("checkpoint-")): path
        for path in folder.glob(f"checkpoint-*/{LOG_NAME}")
        if path.parent.name.removeprefix("checkpoint-").isdecimal()
    }
    return found[max(found)] if found else None


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(state["log_history"], list)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise HessoError(f"{path} isn't a log that Trainer wrote: {error!r}; name another folder by `--run`") from error
    return dict(state)


def _losses(state: Mapping[str, Any]) -> TrainingLog | None:
    """Return the losses of a log, None where it has no finite one."""
    entries = [(name, entry["step"], entry[key]) for entry in state["log_history"]
               for key, name in _LOSSES.items() if key in entry]  # fmt: skip
    losses: dict[str, list[tuple[int, float]]] = {}
    for name, step, loss in entries:
        if isfinite(loss):
            losses.setdefault(name, []).append((step, loss))
    shown = sum(map(len, losses.values()))
    return TrainingLog(losses, len(entries) - shown) if losses else None
