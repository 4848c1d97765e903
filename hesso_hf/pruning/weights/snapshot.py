"""A snapshot of a training run's weights, optimizer state and random state, to return to bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from transformers.utils import logging

from ...distributed.parts import like_parameter, local

logger = logging.get_logger(__name__)

_SCHEDULED = (
    "params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "momentum", "max_momentum", "base_momentum", "betas",
    "weight_decay",
)  # fmt: skip


class Snapshot:
    """Copies of parameters, their optimizer state and the random state of this process.

    Args:
        parameters: what is copied; the same tensors in the same order at every use.
        optimizer: whose `state` of these parameters is copied too, or None. What a schedule drives in its
            `param_groups`, such as the learning rate, is left alone.
        on_cpu: whether the copies lie in host memory, so that the device holds no second copy.

    Attributes:
        random: this process' random state at the snapshot.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], optimizer: Optimizer | None, on_cpu: bool) -> None:
        self._parameters = list(parameters)
        self._optimizer, self._on_cpu = optimizer, on_cpu
        self._position = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._weights = [self._copy(local(parameter.data)) for parameter in self._parameters]
        state = optimizer.state if optimizer else {}
        self._state = [self._copy(state.get(parameter)) for parameter in self._parameters]
        groups = optimizer.param_groups if optimizer else []
        self._options = [{key: self._copy(group[key]) for key in _own_options(group)} for group in groups]
        self.random = random_state(self._device)

    def weights_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the copy of what this process holds of a parameter, where it lies."""
        return self._weights[self._position[id(parameter)]]

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights, optimizer state and random state back."""
        self.restore_weights()
        set_random_state(self.random, self._device)
        if self._optimizer is None:
            return
        state = self._optimizer.state
        for parameter, saved in zip(self._parameters, self._state, strict=True):
            if saved is None:
                state.pop(parameter, None)
            else:
                state[parameter] = _put_back(saved, state.get(parameter), parameter.device, parameter)
        for group, saved in zip(self._optimizer.param_groups, self._options, strict=True):
            group.update({key: _put_back(value, group.get(key), self._device) for key, value in saved.items()})

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the weights back and nothing else."""
        for parameter, saved in zip(self._parameters, self._weights, strict=True):
            local(parameter.data).copy_(saved)

    @torch.no_grad()
    def swap_weights(self) -> None:
        """Exchange the weights with the copies, so that a second call undoes the first."""
        for parameter, saved in zip(self._parameters, self._weights, strict=True):
            values = local(parameter.data)
            present = values.clone()
            values.copy_(saved)
            saved.copy_(present)

    def state_dict(self) -> dict[str, Any]:
        """Return the copies: tensors and plain containers only."""
        copies = {"weights": list(self._weights), "state": list(self._state), "options": list(self._options)}
        return copies | {"random": self.random}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies that were saved."""
        self._weights = _put_back(list(state["weights"]), self._weights, self._device)
        self._state = _put_back(list(state["state"]), self._state, self._device)
        self._options = _put_back(list(state["options"]), self._options, self._device)
        self.random = state["random"]

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = local(value)
            if self._on_cpu and value.is_cuda and type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim():
                return pinned_like(value).copy_(value)
            return value.detach().to("cpu" if self._on_cpu else value.device, copy=True)
        if isinstance(value, Mapping):
            return {key: self._copy(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return _like(value, [self._copy(part) for part in value])
        return copy.deepcopy(value)


def pinned_like(like: torch.Tensor) -> torch.Tensor:
    """Make room for a tensor in the host's memory, pinned where the system allows it: a GPU reads that by itself."""
    try:
        return torch.empty_like(like, device="cpu", pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning_once(f"snapshots lie in ordinary memory, which is slower to return to: no pinned one ({reason})")
        return torch.empty_like(like, device="cpu")


def snapshotted(optimizer: Optimizer, scaled: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return what a snapshot copies, in its order: what an optimizer trains and what else is scaled, each once."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {id(parameter) for parameter in trained}
    return [*trained, *(parameter for parameter in scaled if id(parameter) not in known)]


def _put_back(saved: Any, present: Any, device: torch.device, owner: torch.Tensor | None = None) -> Any:
    """Return `saved` as live state: in the tensors that are there where they fit, else as copies.

    Args:
        owner: the parameter that it is the state of; what has its shape is placed over the processes as it is.
    """
    if isinstance(saved, torch.Tensor):
        if isinstance(present, torch.Tensor) and present.dtype == saved.dtype and local(present).shape == saved.shape:
            local(present).copy_(saved)
            return present
        if not saved.dim():
            return saved.clone()  # step counts stay on the CPU
        copied = saved.to(device, copy=True)
        of_parameter = owner is not None and local(owner).shape == saved.shape
        return like_parameter(copied, owner) if owner is not None and of_parameter else copied
    if isinstance(saved, Mapping):
        known = present if isinstance(present, Mapping) else {}
        return {key: _put_back(value, known.get(key), device, owner) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        fits = isinstance(present, type(saved)) and len(present) == len(saved)
        olds = present if fits else [None] * len(saved)
        return _like(saved, [_put_back(value, old, device) for value, old in zip(saved, olds, strict=True)])
    return copy.deepcopy(saved)


def _own_options(group: Mapping[str, Any]) -> list[str]:
    """Return the keys of a parameter group that the optimizer itself moves on, such as a step count."""
    return [key for key in group if key not in _SCHEDULED and isinstance(group[key], int | float | torch.Tensor)]


def _like(sequence: Any, parts: list[Any]) -> Any:
    """Return `parts` as a list, tuple or named tuple, as `sequence` is."""
    return type(sequence)(*parts) if hasattr(sequence, "_fields") else type(sequence)(parts)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leave Python's, NumPy's and torch's generators as they were, whatever is drawn inside."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators as tensors and plain containers.

    Of GPUs it is the one that `device` is or, where parameters wait on the CPU, the one that this process computes on.
    """
    version, keys, gauss = random.getstate()
    kind, words, *rest = np.random.get_state(legacy=True)  # a tuple, which is plain data
    assert isinstance(words, np.ndarray)
    found = {
        "python": [version, list(keys), gauss],
        "numpy": [kind, torch.from_numpy(words.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if _computes_on_gpu(device):
        found["cuda"] = torch.cuda.get_rng_state(_gpu(device))
    return found


def _computes_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" or torch.cuda.is_initialized()


def _gpu(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cuda")


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back; the state may have been loaded to any device."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and _computes_on_gpu(device):
        torch.cuda.set_rng_state(state["cuda"].cpu(), _gpu(device))
