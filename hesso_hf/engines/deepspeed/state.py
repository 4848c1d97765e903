"""The pruning state of a run under ZeRO, beside DeepSpeed's own checkpoint.

What all processes share goes into one file, each process' ranges of a CRIC snapshot into one of its own; they are put
together for another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from ...distributed.collectives import barrier, is_main_process, world_size
from ...errors import CheckpointMismatchError
from ...pruning.weights.snapshot import random_state
from ..checkpoint import FOLDER, SHARED_NAME, snapshots_in
from .holdings import ZeroHoldings
from .ranges import Place
from .steps import ZeroSteps
from .universal import check_readable, repair_optimizer

logger = logging.get_logger(__name__)


def save_zero_state(steps: ZeroSteps, folder: Path, stage: int, writes_shared: bool | None = None) -> None:
    """Write the pruning state beside DeepSpeed's checkpoint; all processes call it.

    What all share goes into one file, each process' ranges of a CRIC snapshot into one of its own.

    Args:
        writes_shared: whether this process writes that one file, by default the main process alone.
    """
    target = folder / FOLDER
    state = steps.process.state_dict()  # collective: sums are added up
    own = {kind: dict(snapshot) for kind, snapshot in snapshots_in(state)}
    for _, snapshot in snapshots_in(state):
        snapshot |= dict.fromkeys(snapshot)
    target.mkdir(parents=True, exist_ok=True)
    if is_main_process() if writes_shared is None else writes_shared:
        torch.save(state | {"zero": {"processes": world_size(), "stage": stage}}, target / SHARED_NAME)
    if own:
        save_ranges(target, own, steps.holdings)
    barrier()


def load_zero_state(steps: ZeroSteps, folder: Path, stage: int, universal: bool = False) -> None:
    """Continue from what `save_zero_state` wrote.

    Args:
        universal: whether DeepSpeed has read a universal checkpoint, of any number of processes.

    Raises:
        CheckpointMismatchError: as `check_zero_state` does.
    """
    source = folder / FOLDER
    check_zero_state(folder, stage, universal)
    if universal:
        repair_optimizer(steps.base, folder)
    state = torch.load(source / SHARED_NAME, map_location="cpu", weights_only=True)
    kinds = list(snapshots_in(state))
    own = load_ranges(source, state["zero"]["processes"], steps.holdings) if kinds else {}
    for kind, snapshot in kinds:
        snapshot |= own[kind]
    steps.load_pruning_state(state)


def check_zero_state(folder: Path, stage: int, universal: bool = False) -> None:
    """Compare how a checkpoint was made with this run.

    Args:
        universal: whether DeepSpeed's config says that universal checkpoints are read.

    Raises:
        CheckpointMismatchError: where it was made by another engine or ZeRO stage, or by another number of processes
            and no universal checkpoint is read.
    """
    path = folder / FOLDER / SHARED_NAME
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    made, present = state.get("zero"), world_size()
    if not made or made["stage"] != stage:
        found = f"ZeRO-{made['stage']}" if made else "another engine than DeepSpeed"
        raise CheckpointMismatchError(
            f"`resume_from_checkpoint` ({str(folder)!r}) was written by {found}, this run is ZeRO-{stage}; resume with "
            "the same, since DeepSpeed's partitions can't be read otherwise"
        )
    check_readable(folder, made["processes"], present, universal)


# -- ranges of a CRIC snapshot -----------------------------------------------------------------------------------------


def save_ranges(folder: Path, snapshots: Mapping[str, Any], holdings: ZeroHoldings) -> None:
    """Write this process' snapshots, and where in their vectors which range of a parameter lies."""
    torch.save({"snapshots": snapshots, "places": holdings.places()}, folder / _name(dist.get_rank()))


def load_ranges(folder: Path, processes: int, holdings: ZeroHoldings) -> dict[str, Any]:
    """Return this process' snapshots by kind: its own file, or put together where others wrote them.

    Args:
        folder: with the files of all processes.
        processes: how many wrote them.

    Raises:
        CheckpointMismatchError: where elements are missing.
    """
    rank = dist.get_rank()
    if processes == world_size():
        return torch.load(folder / _name(rank), map_location="cpu", weights_only=True)["snapshots"]
    files = [
        torch.load(folder / _name(writer), map_location="cpu", weights_only=True, mmap=True)
        for writer in range(processes)
    ]
    found = {kind: _put_together(kind, files, holdings) for kind in files[0]["snapshots"]}
    for kind, snapshot in found.items():
        if rank < processes:
            snapshot["random"] = files[rank]["snapshots"][kind]["random"]
        else:
            logger.warning(f"process {rank} is new: it goes on with the random state of now after the trial")
            snapshot["random"] = random_state(holdings.vectors()[0].device)
    return found


def _put_together(kind: str, files: list[dict[str, Any]], holdings: ZeroHoldings) -> dict[str, Any]:
    """Return a snapshot of the vectors that this process has, from those that others had."""
    weights = [torch.zeros(vector.shape, dtype=vector.dtype) for vector in holdings.vectors()]
    states: list[dict[str, Any] | None] = [None] * len(weights)
    for name, place in holdings.places().items():
        filled = 0
        for file in files:
            held, snapshot = file["places"].get(name), file["snapshots"][kind]
            if held is None or _overlap(place, held) is None:
                continue
            stored = snapshot["weights"][held[0]]
            filled += _copy_range(weights[place[0]], place, stored, held)
            for key, value in (snapshot["state"][held[0]] or {}).items():
                own = states[place[0]] = states[place[0]] or {}
                if isinstance(value, torch.Tensor) and value.shape == stored.shape:
                    own.setdefault(key, torch.zeros(weights[place[0]].shape, dtype=value.dtype))
                    _copy_range(own[key], place, value, held)
                else:
                    own.setdefault(key, value)
        if filled < place[3]:
            raise CheckpointMismatchError(
                f"{name}: {place[3] - filled} elements of a CRIC snapshot are missing; is a file lost?"
            )
    return {"weights": weights, "state": states, "options": files[0]["snapshots"][kind]["options"]}


def _overlap(place: Place, held: Place) -> tuple[int, int] | None:
    """Return the range of the flattened parameter that lies in both places, None where nothing does."""
    low, high = max(place[2], held[2]), min(place[2] + place[3], held[2] + held[3])
    return (low, high) if low < high else None


def _copy_range(target: torch.Tensor, place: Place, source: torch.Tensor, held: Place) -> int:
    """Copy what lies in both places, and return how many elements that are."""
    overlap = _overlap(place, held)
    assert overlap is not None
    low, count = overlap[0], overlap[1] - overlap[0]
    values = source.flatten().narrow(0, held[1] + low - held[2], count)
    target.view(-1).narrow(0, place[1] + low - place[2], count).copy_(values)
    return count


def _name(rank: int) -> str:
    return f"ranges-{rank:05d}.pt"
