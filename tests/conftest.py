"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import proofs

proofs.keep()


@pytest.fixture(autouse=True)
def _proofs_are_made_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take a config's proof from an earlier test, but where proofs are tested or something is replaced."""
    fresh = "monkeypatch" in request.fixturenames or request.module.__name__.startswith("tests.structures.proof.")
    with proofs.made_again(fresh):
        yield
