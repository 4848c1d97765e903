"""The training log of a run: what Transformers' Trainer writes as `trainer_state.json` into its checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HessoError
from ..export.page.losses import Losses

LOG_NAME = "trainer_state.json"


def losses_beside(model: Path, report: Mapping[str, Any]) -> Losses | None:
    """Return the losses logged in or beside a smaller model's folder, None where there are none of its run."""
    for folder in (model, model.absolute().parent):
        path = _newest(folder)
        if path is None:
            continue
        state, planned = _read(path), (report.get("schedule") or {}).get("total_steps")
        if planned is not None and planned == state.get("max_steps"):
            return Losses.of(state["log_history"])
        print(
            f"hesso-hf: {path} is left out: it is of a run of {state.get('max_steps')} steps, and the report says "
            f"{planned}; name the run's folder by `--run` if it is the right one",
            file=sys.stderr,
        )
    return None


def losses_in(run: str) -> Losses:
    """Return the losses logged in a run's folder.

    Raises:
        HessoError: naming the folder, where it has none, or one without a loss.
    """
    path = _newest(Path(run))
    if path is None:
        raise HessoError(f"`--run` ({run!r}): neither it nor a checkpoint-* in it has a {LOG_NAME}; name another")
    found = Losses.of(_read(path)["log_history"])
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
