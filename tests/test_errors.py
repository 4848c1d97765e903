"""Words of messages."""

from __future__ import annotations

from hesso_hf.errors import counted


def test_one_is_no_plural() -> None:
    assert [counted(count, "step") for count in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
