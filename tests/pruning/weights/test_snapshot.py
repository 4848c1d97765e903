"""Snapshots: what a GPU needs of them, on a machine without one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from hesso_hf.pruning.weights import snapshot
from hesso_hf.pruning.weights.snapshot import Snapshot


class Gpu:
    """What torch.cuda says of the GPU that this process computes on: its generator is a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = {"cuda": torch.tensor([5]), "cuda:1": torch.tensor([7])}
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.states[str(device)].clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _set(self, state: torch.Tensor, device: torch.device) -> None:
        self.states[str(device)] = state


def test_the_gpus_generator_returns_where_parameters_wait_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do under `fsdp_offload_params` and ZeRO's offload."""
    gpu = Gpu(monkeypatch)
    taken = Snapshot([nn.Parameter(torch.ones(3))], None, on_cpu=True)
    gpu.states["cuda"] = torch.tensor([6])
    taken.restore()
    assert gpu.states["cuda"].item() == 5


def test_the_generator_is_that_of_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    with snapshot.kept_random_state(torch.device("cuda:1")):
        gpu.states["cuda:1"] = gpu.states["cuda"] = torch.tensor([0])
    assert gpu.states["cuda:1"].item() == 7
    assert gpu.states["cuda"].item() == 0


def test_a_state_with_a_gpus_generator_is_taken_without_one() -> None:
    state = snapshot.random_state(torch.device("cpu")) | {"cuda": torch.tensor([5])}
    first = torch.rand(2)
    snapshot.set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(2), first)


def test_without_pinned_memory_copies_lie_in_ordinary_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = torch.empty_like

    def unpinned(like: torch.Tensor, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: OS call failed or operation not supported\nmore of it")
        return plain(like, **options)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(snapshot.logger, "propagate", True)
    snapshot.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [snapshot.pinned_like(torch.ones(2, 3)) for _ in range(2)]
    assert [(value.shape, value.device.type) for value in found] == [((2, 3), "cpu")] * 2
    assert caplog.text.count("no pinned one (CUDA error: OS call failed or operation not supported)") == 1
