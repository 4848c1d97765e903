"""What takes long in the tests and says nothing there, in all processes that a test session starts by itself.

Tiny models need few tokens to be measured on; how many a real one needs no test asserts. Accelerate looks for garbage
among all that has been imported, at the beginning of every training.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import accelerate.utils.memory

from hesso_hf.pruning import basis, calibration, healing
from hesso_hf.structures.proof import cache
from hesso_hf.trainer import basis as trainer_basis

TOKENS = 512
REMOVED_SHARES = (0.25, 0.5, 0.875)

_stack = contextlib.ExitStack()


def shorten() -> None:
    """Make it short, until all is restored."""
    changes = (
        (basis, {"LEAST_TOKENS": TOKENS}),
        (trainer_basis, {"LEAST_TOKENS": TOKENS}),
        (healing, {"HEALING_TOKENS": TOKENS}),
        (calibration, {"REMOVED_SHARES": REMOVED_SHARES}),
        (cache, {"SLOW": 3600.0}),  # on a busy machine some would take so long, and some not
        (accelerate.utils.memory, {"gc": SimpleNamespace(collect=lambda: 0)}),
    )
    for module, values in changes:
        _stack.enter_context(mock.patch.multiple(module, **values))


def restore() -> None:
    """Have all as it is for users, until it is made short again."""
    _stack.close()
