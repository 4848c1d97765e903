"""The pruning state of a sharded run in files of its own: every process writes what it holds, any number reads it.

torch's distributed checkpoints keep what they know of an optimizer's state and silently drop the rest. So what all
processes share goes into one small file, and the parts of snapshots and of healing into one safetensors file a process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...distributed.collectives import barrier, is_main_process, rank
from ...distributed.parts import Part, named_parameters, part_of
from ...errors import CheckpointMismatchError, HessoError
from ...pruning.optimizer import HessoOptimizer
from ...pruning.weights.snapshot import random_state, snapshotted
from ..checkpoint import FOLDER, SHARED_NAME, load_random_states, save_random_states, snapshots_in


def save_pruning_state(
    optimizer: HessoOptimizer, model: nn.Module, folder: Path, writes_shared: bool | None = None
) -> None:
    """Write the pruning state of a run whose parameters are sharded; all processes call it.

    Args:
        model: whose parameters' names the parts are stored under.
        folder: of the checkpoint; `hesso_shards` is made in it.
        writes_shared: whether this process writes what all share: by default the main one, one of each node where nodes
            have disks of their own.

    Raises:
        HessoError: where a CRIC snapshot holds optimizer state of a form that can't be told apart by elements.
    """
    target = folder / FOLDER
    state = optimizer.process.state_dict()  # collective: sums are added up
    copied, held = _copied_parts(optimizer, model), optimizer.process.bound.held
    parts: dict[str, tuple[torch.Tensor, Part]] = {}
    for name, (piece,) in state.get("healing", {}).items():  # of a DTensor there is one
        parts[f"healing/weights/{name}"] = (piece, held[name].parts[0])
    state |= {"healing": dict.fromkeys(state.get("healing", {}))}
    for kind, snapshot in snapshots_in(state):
        shared: list[dict[str, Any]] = []
        for (name, part), weights, own in zip(copied, snapshot["weights"], snapshot["state"], strict=True):
            parts[f"{kind}/weights/{name}"] = (weights, part)
            shared.append({})
            for key, value in (own or {}).items():
                if isinstance(value, torch.Tensor) and tuple(value.shape) == part.sizes:
                    parts[f"{kind}/{key}/{name}"] = (value, part)
                else:
                    shared[-1][key] = _checked(value, name, key, part)
        snapshot |= {"weights": None, "state": shared, "random": None}
    target.mkdir(parents=True, exist_ok=True)
    if is_main_process() if writes_shared is None else writes_shared:
        torch.save(state, target / SHARED_NAME)
    kept = {key: (value, part) for key, (value, part) in parts.items() if part.counted and value.numel()}
    places = {key: {"starts": part.starts, "shape": part.shape} for key, (_, part) in kept.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, (value, _) in kept.items()}
    name = f"parts-{rank():05d}.safetensors"
    save_file(tensors, target / name, metadata={"places": json.dumps(places)})
    save_random_states(optimizer, folder)
    barrier()


def load_pruning_state(optimizer: HessoOptimizer, model: nn.Module, folder: Path) -> None:
    """Continue from what `save_pruning_state` wrote, on any number of processes.

    Raises:
        CheckpointMismatchError: where there is no such state, or one of another model, budget or config.
    """
    source = folder / FOLDER
    if not (source / SHARED_NAME).exists():
        raise CheckpointMismatchError(
            f"`resume_from_checkpoint` ({str(folder)!r}) holds no pruning state of a sharded run ({FOLDER}/"
            f"{SHARED_NAME}); was it written by another engine? Resume with the engine that wrote it"
        )
    state = torch.load(source / SHARED_NAME, map_location="cpu", weights_only=True)
    stored = StoredParts(source)
    copied = _copied_parts(optimizer, model)
    for kind, snapshot in snapshots_in(state):
        weights, states = [], []
        for (name, part), shared in zip(copied, snapshot["state"], strict=True):
            weights.append(stored.read(f"{kind}/weights/{name}", part))
            own = {key: stored.read(f"{kind}/{key}/{name}", part) for key in stored.keys_of(kind, name)}
            states.append(shared | own or None)
        random = random_state(optimizer.process.bound.device)
        snapshot |= {"weights": weights, "state": states, "random": random}
    healing, held = state.get("healing", {}), optimizer.process.bound.held
    healing |= {name: [stored.read(f"healing/weights/{name}", held[name].parts[0])] for name in healing}
    optimizer.load_pruning_state(state)
    load_random_states(optimizer, folder)


def _copied_parts(optimizer: HessoOptimizer, model: nn.Module) -> list[tuple[str, Part]]:
    """Return the names of the parameters that a snapshot copies, in its order, and what is held of each."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    copied = snapshotted(optimizer.base, optimizer.process.bound.parameters.values())
    return [(names[id(parameter)], part_of(names[id(parameter)], parameter)) for parameter in copied]


class StoredParts:
    """The parts that all processes wrote, read element by element where they lie."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, list[tuple[Path, Part]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in sorted(folder.glob("parts-*.safetensors")):
            with safe_open(path, framework="pt") as stored:
                places = json.loads((stored.metadata() or {}).get("places", "{}"))
                for key, place in places.items():
                    tensor, shape = stored.get_slice(key), tuple(place["shape"])
                    part = Part(tuple(place["starts"]), tuple(tensor.get_shape()), shape)
                    self._where.setdefault(key, []).append((path, part))
                    self._dtypes[key] = tensor[(slice(0, 0),) * len(shape)].dtype

    def keys_of(self, kind: str, name: str) -> list[str]:
        """Return which optimizer state of a parameter was stored in parts."""
        keys = [key.split("/", 2) for key in self._where]
        return [key for found, key, owner in keys if found == kind and owner == name and key != "weights"]

    def read(self, key: str, part: Part) -> torch.Tensor:
        """Return a part of a stored tensor, put together from what the processes wrote.

        Raises:
            CheckpointMismatchError: where elements are missing or the shapes differ.
        """
        stored = self._where.get(key, [])
        if not stored or stored[0][1].shape != part.shape:
            shape = stored[0][1].shape if stored else None
            raise CheckpointMismatchError(f"the checkpoint holds {key} of shape {shape}, this run has {part.shape}")
        found, filled = torch.empty(part.sizes, dtype=self._dtypes[key]), 0
        for path, held in stored:
            overlap = _overlap(part, held)
            if overlap is None:
                continue
            with safe_open(path, framework="pt") as file:
                values = file.get_slice(key)[_slices(overlap, held)]
            found[_slices(overlap, part)] = values
            filled += values.numel()
        if filled != found.numel():
            raise CheckpointMismatchError(f"{key}: {found.numel() - filled} elements are missing; is a file lost?")
        return found


def _overlap(wanted: Part, held: Part) -> list[tuple[int, int]] | None:
    """Return what two parts share, (first index, one past the last) per dimension; None where nothing."""
    shared = []
    for begin, size, other, other_size in zip(wanted.starts, wanted.sizes, held.starts, held.sizes, strict=True):
        low, high = max(begin, other), min(begin + size, other + other_size)
        if low >= high:
            return None
        shared.append((low, high))
    return shared


def _slices(stretch: list[tuple[int, int]], part: Part) -> tuple[slice, ...]:
    return tuple(slice(low - start, high - start) for (low, high), start in zip(stretch, part.starts, strict=True))


def _checked(value: Any, name: str, key: str, part: Part) -> Any:
    """Return optimizer state that all processes have alike: numbers and scalars."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and (not value.dim() or part.is_whole):
        return value.detach().cpu()
    raise HessoError(
        f"`optim`: its state {key!r} of {name} isn't one value an element, so a CRIC snapshot of it can't be stored in "
        "shards; use adamw_torch, or save checkpoints outside of CRIC's cycles"
    )
