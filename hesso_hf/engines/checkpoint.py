"""What the checkpoints of all engines have in common: the folder of the pruning state, random states, snapshots."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..config.files import PRUNING_NAME
from ..distributed.collectives import rank
from ..pruning.optimizer import HessoOptimizer

logger = logging.get_logger(__name__)

FOLDER, SHARED_NAME = "hesso_shards", "pruning.pt"
_SNAPSHOTS = ("trial", "period_start")  # keys of the state that may hold one


def begin_checkpoint(folder: Path) -> None:
    """Make a checkpoint's folder; from one that is there already take what says that it is whole, and all parts.

    A run that was killed, or that goes on from an earlier checkpoint, comes by the same step again, perhaps with fewer
    processes: what they write mustn't be mixed with what more processes left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, PRUNING_NAME):
        (folder / name).unlink(missing_ok=True)
    for parts in (folder / FOLDER, *folder.glob("global_step*")):  # the second are DeepSpeed's
        if parts.is_dir():
            shutil.rmtree(parts)


def save_pruning_alone(optimizer: HessoOptimizer, folder: Path) -> None:
    """Write the pruning state where the optimizer's isn't saved (`save_only_model`)."""
    torch.save(optimizer.process.state_dict(), folder / PRUNING_NAME)


def load_pruning_alone(optimizer: HessoOptimizer, folder: Path) -> None:
    """Load what `save_pruning_alone` wrote, if it did."""
    if (folder / PRUNING_NAME).exists():
        logger.warning(
            f"{folder} was saved with `save_only_model`: pruning goes on where it was, the optimizer's own state and "
            "the learning rate's schedule begin anew"
        )
        state = torch.load(folder / PRUNING_NAME, map_location="cpu", weights_only=True)
        optimizer.load_pruning_state(state)


def save_random_states(optimizer: HessoOptimizer, folder: Path) -> None:
    """Write the random states of this process that a snapshot will return to, beside those of the other processes."""
    for kind, snapshot in optimizer.process.snapshots.items():
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        torch.save(snapshot.random, folder / FOLDER / _random_name(kind))


def load_random_states(optimizer: HessoOptimizer, folder: Path) -> None:
    """Give the snapshots this process' own random states; those of now, with a warning, where there were fewer."""
    for kind, snapshot in optimizer.process.snapshots.items():
        path = folder / FOLDER / _random_name(kind)
        if path.exists():
            snapshot.random = torch.load(path, map_location="cpu", weights_only=True)
        else:
            logger.warning(f"{path} is missing: this process goes on with the random state of now after the trial")


def _random_name(kind: str) -> str:
    return f"random-{kind}-{rank():05d}.pt"


def snapshots_in(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kinds and contents of the snapshots in a pruning state."""
    for kind in _SNAPSHOTS:
        held = state.get(kind)
        snapshot = held["snapshot"] if kind == "trial" and held else held
        if snapshot:
            yield kind, snapshot
