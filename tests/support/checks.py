"""Comparisons bit for bit, and the package's log, shared by the tests."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hesso_hf import HessoTrainer


def known(model_type: str) -> Any:
    """Return a type as a parameter of a test, skipped where the installed Transformers is too old to have it."""
    return pytest.param(model_type, marks=needs(model_type))


def needs(model_type: str) -> pytest.MarkDecorator:
    """Skip a test where the installed Transformers is too old to have a type; the tested version has all."""
    return pytest.mark.skipif(model_type not in CONFIG_MAPPING_NAMES, reason=f"this Transformers has no {model_type}")


@contextlib.contextmanager
def propagated(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Let pytest see this package's log, which doesn't propagate by default."""
    loggers = [logging.getLogger(name) for name in ("transformers", "hesso_hf")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        yield caplog
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)


def assert_same(ours: Any, theirs: Any) -> None:
    """The same tensors in the same containers, bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


def check_equal(run: HessoTrainer, expected: HessoTrainer) -> None:
    """Same weights, optimizer state, decisions, schedule and CRIC report, bit for bit."""
    for (name, ours), theirs in zip(run.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    processes = [item.hesso_optimizer.process for item in (run, expected)]
    assert processes[0].kept_units() == processes[1].kept_units()
    assert processes[0].schedule == processes[1].schedule
    assert processes[0].cric_report() == processes[1].cric_report()
    assert_same(*(item.hesso_optimizer.base.state_dict()["state"] for item in (run, expected)))
