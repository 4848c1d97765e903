"""The pruning state of a run under ZeRO, beside DeepSpeed's own checkpoint.

What all processes share goes into one file, each process' ranges of a CRIC snapshot and of healing into one of its own;
they are put together for another number of processes.

DeepSpeed's own checkpoint holds each process' flat vectors and is read by as many processes only. Its tool
`ds_to_universal` takes them apart by parameter into a second folder beside the first, and a run whose config says
`"checkpoint": {"load_universal": true}` reads that universal one, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from ...compat import engine_options
from ...distributed.collectives import barrier, world_size
from ...errors import CheckpointMismatchError
from ...pruning.weights.holdings import Held
from ...pruning.weights.snapshot import random_state
from ..checkpoint import FOLDER, SHARED_NAME, snapshots_in
from .holdings import ZeroHoldings
from .ranges import Place
from .steps import ZeroSteps

logger = logging.get_logger(__name__)

LATEST = "latest_universal"  # the file that names the folder of the universal checkpoint


def save_zero_state(steps: ZeroSteps, folder: Path, stage: int, writes_shared: bool) -> None:
    """Write the pruning state beside DeepSpeed's checkpoint; all processes call it.

    Args:
        writes_shared: whether this process writes what all share.
    """
    target = folder / FOLDER
    state = steps.process.state_dict()  # collective: sums are added up
    own = {kind: dict(snapshot) for kind, snapshot in snapshots_in(state)}
    healing = state.pop("healing", {})
    for _, snapshot in snapshots_in(state):
        snapshot |= dict.fromkeys(snapshot)
    target.mkdir(parents=True, exist_ok=True)
    if writes_shared:
        shared = {"healing": dict.fromkeys(healing), "zero": {"processes": world_size(), "stage": stage}}
        torch.save(state | shared, target / SHARED_NAME)
    if own or healing:
        save_ranges(target, own, steps.holdings, healing)
    barrier()


def load_zero_state(steps: ZeroSteps, folder: Path, stage: int, universal: bool) -> None:
    """Continue from what `save_zero_state` wrote.

    Args:
        universal: whether DeepSpeed has read a universal checkpoint, of any number of processes.

    Raises:
        CheckpointMismatchError: as `check_zero_state` does.
    """
    state = check_zero_state(folder, stage, universal)
    if universal:
        repair_optimizer(steps.base, folder)
    kinds = list(snapshots_in(state))
    own = load_ranges(folder / FOLDER, state["zero"]["processes"], steps.holdings) if kinds else {}
    for kind, snapshot in kinds:
        snapshot |= own[kind]
    if state.get("healing"):  # which earlier code doesn't know
        held = {name: steps.process.bound.held[name] for name in state["healing"]}
        state["healing"] = load_healing(folder / FOLDER, state["zero"]["processes"], held)
    steps.load_pruning_state(state)


def check_zero_state(folder: Path, stage: int, universal: bool = False) -> dict[str, Any]:
    """Return what all processes share of a saved state, if it was made as this run reads it.

    Args:
        universal: whether DeepSpeed's config says that universal checkpoints are read.

    Raises:
        CheckpointMismatchError: where it was made by another engine or ZeRO stage, or by another number of processes
            and no universal checkpoint is read, or there is none to read.
    """
    path = folder / FOLDER / SHARED_NAME
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    made = state.get("zero")
    found = f"`resume_from_checkpoint` ({str(folder)!r})"
    if not made or made["stage"] != stage:
        other = f"ZeRO-{made['stage']}" if made else "another engine than DeepSpeed"
        raise CheckpointMismatchError(
            f"{found} was written by {other}, this run is ZeRO-{stage}; resume with the same, since DeepSpeed's "
            "partitions can't be read otherwise"
        )
    processes = made["processes"]
    several = f"{processes} process{'es' * (processes > 1)}"
    if universal and not (folder / LATEST).exists():
        raise CheckpointMismatchError(
            f"`checkpoint.load_universal` (True) of DeepSpeed's config, but {found} has no universal checkpoint: make "
            f"it with `{_command(folder)}`, or leave the setting out to resume on {several}"
        )
    if not universal and processes != world_size():
        first = "" if (folder / LATEST).exists() else f"run `{_command(folder)}` and "
        raise CheckpointMismatchError(
            f"{found} was written by {several}, this run has {world_size()}; {first}set "
            f'`"checkpoint": {{"load_universal": true}}` in DeepSpeed\'s config, or resume on {processes}'
        )
    return state


def _command(folder: Path) -> str:
    latest = folder / "latest"
    tag = folder / (latest.read_text(encoding="utf-8").strip() if latest.exists() else "global_step*")
    return (
        f"python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tag} "
        f"--output_folder {tag}_universal"
    )


# -- universal checkpoints ---------------------------------------------------------------------------------------------


def reads_universal(engine_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's config says that universal checkpoints are read."""
    return bool((engine_config.get("checkpoint") or {}).get("load_universal"))


def check_trained(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Refuse parameters that pruning acts on and DeepSpeed leaves out of universal checkpoints.

    Raises:
        CheckpointMismatchError: where one of them is frozen.
    """
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise CheckpointMismatchError(
            "`checkpoint.load_universal` (True) of DeepSpeed's config: it doesn't read frozen parameters such as "
            f"{frozen[0]} from a universal checkpoint ({str(folder)!r}), and pruning had changed them; leave it out "
            "and resume on as many processes as wrote it"
        )


@contextlib.contextmanager
def reading_what_is_there(engine: Any, folder: Path) -> Iterator[None]:
    """Let DeepSpeed's engine read its own checkpoint where a folder has no universal one, as this run writes them."""
    options = engine_options(engine)
    before = options.load_universal_checkpoint
    options.load_universal_checkpoint = before and (folder / LATEST).exists()
    try:
        yield
    finally:
        options.load_universal_checkpoint = before


def repair_optimizer(base: Optimizer, folder: Path) -> None:
    """Undo what DeepSpeed 0.19 does to the base optimizer while it reads a universal checkpoint of ZeRO-3.

    It gives all parameter groups the first one's options, and all flat vectors one tensor that counts steps, so that
    each of them counts a step of all.
    """
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    # a pickle with DeepSpeed's classes, which DeepSpeed itself has just opened
    stored = torch.load(folder / tag / "zero" / "optimizer_state.pt", map_location="cpu", mmap=True, weights_only=False)
    for group, saved in zip(base.param_groups, stored["param_groups"], strict=True):
        group |= {key: value for key, value in saved.items() if key != "params"}
    for state in base.state.values():
        scalars = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and not value.dim()}
        state |= {key: value.clone() for key, value in scalars.items()}


# -- ranges of a CRIC snapshot and of healing --------------------------------------------------------------------------


def save_ranges(
    folder: Path,
    snapshots: Mapping[str, Any],
    holdings: ZeroHoldings,
    healing: Mapping[str, list[torch.Tensor]] = MappingProxyType({}),
) -> None:
    """Write this process' snapshots, and where in their vectors which range of a parameter lies; and of healing.

    Args:
        healing: by parameter, what belongs to each piece that this process holds.
    """
    places = {name: tuple(place) for name, place in holdings.places().items()}
    ranges = {name: torch.cat([piece.flatten() for piece in pieces]) for name, pieces in healing.items() if pieces}
    torch.save({"snapshots": snapshots, "places": places, "healing": ranges}, folder / _name(dist.get_rank()))


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


def load_healing(folder: Path, processes: int, held: Mapping[str, Held]) -> dict[str, list[torch.Tensor]]:
    """Return what belongs to each piece that this process holds of some parameters.

    Args:
        processes: how many wrote the files of the folder.

    Raises:
        CheckpointMismatchError: where elements are missing.
    """
    writers = [dist.get_rank()] if processes == world_size() else range(processes)
    files = [torch.load(folder / _name(writer), map_location="cpu", weights_only=True, mmap=True) for writer in writers]
    found: dict[str, list[torch.Tensor]] = {}
    for name, of_name in held.items():
        weights, filled = of_name.weights(), 0
        target = torch.zeros(sum(piece.numel() for piece in weights))
        place = Place(0, 0, of_name.parts[0].first if weights else 0, len(target))
        for file in files:
            if name in file["healing"]:
                values = file["healing"][name]
                start = file["places"][name][2] if name in file["places"] else 0
                filled += _copy_range(target, place, values, Place(0, 0, start, len(values)))
        if filled < place.length:
            raise CheckpointMismatchError(
                f"{name}: {place.length - filled} elements of what heals it are missing; is a file lost?"
            )
        pieces = target.split([piece.numel() for piece in weights])
        found[name] = [piece.view_as(like).to(like.device) for piece, like in zip(pieces, weights, strict=True)]
    return found


def _put_together(kind: str, files: list[dict[str, Any]], holdings: ZeroHoldings) -> dict[str, Any]:
    """Return a snapshot of the vectors that this process has, from those that others had."""
    weights = [torch.zeros(vector.shape, dtype=vector.dtype) for vector in holdings.vectors()]
    states: list[dict[str, Any]] = [{} for _ in weights]
    for name, place in holdings.places().items():
        filled, target, own = 0, weights[place.vector], states[place.vector]
        for file in files:
            if name not in file["places"]:
                continue
            held, snapshot = Place(*file["places"][name]), file["snapshots"][kind]
            stored = snapshot["weights"][held.vector]
            count = _copy_range(target, place, stored, held)
            if not count:
                continue
            filled += count
            for key, value in (snapshot["state"][held.vector] or {}).items():
                if isinstance(value, torch.Tensor) and value.shape == stored.shape:
                    own.setdefault(key, torch.zeros(target.shape, dtype=value.dtype))
                    _copy_range(own[key], place, value, held)
                else:
                    own.setdefault(key, value)
        if filled < place.length:
            raise CheckpointMismatchError(
                f"{name}: {place.length - filled} elements of a CRIC snapshot are missing; is a file lost?"
            )
    options = files[0]["snapshots"][kind]["options"]
    return {"weights": weights, "state": [own or None for own in states], "options": options}


def _copy_range(target: torch.Tensor, place: Place, source: torch.Tensor, held: Place) -> int:
    """Copy what of the parameter lies in both places, and return how many elements that are."""
    start = max(place.start, held.start)
    count = min(place.start + place.length, held.start + held.length) - start
    if count <= 0:
        return 0
    values = source.flatten().narrow(0, held.offset + start - held.start, count)
    target.view(-1).narrow(0, place.offset + start - place.start, count).copy_(values)
    return count


def _name(rank: int) -> str:
    return f"ranges-{rank:05d}.pt"
