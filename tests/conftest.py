"""What holds for all tests."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import proofs

proofs.keep()

# Files that take long come first, so that no worker is left alone with one at the end (`--dist loadfile`).
LONG = (
    "engines/test_fsdp.py", "distributed/test_parts.py", "trainer/test_cric_training.py",
    "structures/proof/test_prove.py", "cli/survey/test_survey.py", "trainer/test_trl.py", "cli/test_main.py",
    "trainer/test_distributed.py", "export/test_publish.py", "export/test_families.py", "trainer/test_replay.py",
    "pruning/test_cric.py", "trainer/test_trainer.py", "engines/test_deepspeed.py", "project/test_readme.py",
    "trainer/test_other_tasks.py", "project/test_notebooks.py", "trainer/test_hub.py", "pruning/test_optimizer.py",
    "structures/test_shape_probe.py", "structures/test_experts.py", "trainer/test_stream.py",
)  # fmt: skip

FRESH = "tests.structures.proof."  # whose tests prove anew


def pytest_configure(config: pytest.Config) -> None:
    """Have a folder for proofs from before workers are started until the session ends."""
    stack = contextlib.ExitStack()
    stack.enter_context(proofs.shared())
    config.add_cleanup(stack.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file, long ones first."""
    rank = {str(Path(__file__).parent / name): index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> None:
    """Spare the collections that Accelerate makes at every training a walk through all that has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _proofs_are_made_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take a config's proof from an earlier test, but where proofs are tested or something is replaced."""
    fresh = "monkeypatch" in request.fixturenames or request.module.__name__.startswith(FRESH)
    with proofs.made_again(fresh):
        yield
