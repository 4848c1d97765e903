"""What holds for all tests."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import forks, proofs

# Files that take long come first, so that no worker is left alone with one at the end (`--dist loadfile`).
LONG = (
    "engines/test_fsdp.py", "cli/test_main.py", "distributed/test_parts.py", "project/test_benchmarks.py",
    "trainer/test_cric_training.py", "structures/proof/test_prove.py", "pruning/test_cric.py",
    "cli/survey/test_survey.py", "export/test_families.py", "trainer/test_distributed.py", "trainer/test_trl.py",
    "project/test_notebooks.py", "structures/proof/test_turn.py", "pruning/test_devices.py", "project/test_readme.py",
    "trainer/test_devices.py", "trainer/test_trainer.py", "pruning/test_optimizer.py", "engines/test_deepspeed.py",
    "trainer/test_replay.py", "cli/test_quickstart.py", "trainer/test_basis_lora.py", "trainer/test_resume.py",
    "trainer/test_trl_trainers.py", "structures/test_layers.py", "cli/survey/test_stream_basis.py",
    "structures/test_experts.py",
    "trainer/test_basis.py", "trainer/test_other_tasks.py", "trainer/test_ladder.py",
)  # fmt: skip

FRESH = "tests.structures.proof."  # whose tests prove anew
REMEMBERED = "tests.structures.test_remembered"  # where those do that move or replace something
# No proof depends on what is replaced here: what comes after the structures in the order of imports, and other things.
APART = (
    *(f"hesso_hf.{name}" for name in ("budget", "cli", "engines", "export", "pruning", "trainer", "vocabulary")),
    "accelerate", "datasets", "huggingface_hub", "subprocess", "sys", "tests",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Have a folder for proofs and a server of worker processes before test processes are started, until all end."""
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    stack.enter_context(proofs.shared())
    if config.getoption("numprocesses", None):
        stack.enter_context(forks.served())
        return  # this process watches over the others, and needn't import what takes time
    from tests.support.shortened import shorten

    proofs.keep()
    shorten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file, long ones first."""
    rank = {str(Path(__file__).parent / name): index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))


@pytest.fixture(autouse=True)
def _proofs_are_made_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take a config's proof from an earlier test, but where proofs are tested."""
    name = request.module.__name__
    with proofs.made_again(name.startswith(FRESH) or (name == REMEMBERED and "monkeypatch" in request.fixturenames)):
        yield


class _Patch(pytest.MonkeyPatch):
    """Has proofs made anew where something is replaced that one may depend on."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()

    def setattr(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """Replace an attribute of an object, or of what a dotted name stands for."""
        owner = pkgutil.resolve_name(target.rpartition(".")[0]) if isinstance(target, str) else target
        module = getattr(owner, "__name__" if isinstance(owner, ModuleType) else "__module__", "")
        if not any(f"{module}.".startswith(f"{name}.") for name in APART):
            self._stack.enter_context(proofs.made_again())
        super().setattr(target, *args, **kwargs)

    def undo(self) -> None:
        """Put back what was replaced."""
        super().undo()
        self._stack.close()


@pytest.fixture
def monkeypatch(request: pytest.FixtureRequest) -> Iterator[pytest.MonkeyPatch]:
    """Replace things, as pytest's own fixture."""
    name = request.module.__name__  # no proof depends on what is replaced in the first ones
    patch = pytest.MonkeyPatch() if name.startswith("tests.project.") or name == REMEMBERED else _Patch()
    yield patch
    patch.undo()


@pytest.fixture
def unshortened() -> Iterator[None]:
    """Have all meanwhile as it is for users."""
    from tests.support import shortened

    shortened.restore()
    yield
    shortened.shorten()
