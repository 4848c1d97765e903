"""Proofs by config: the tests' many runs of few tiny models prove each of them once in a test process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hesso_hf.structures.proof import prove

_plain = prove.proved_groups
_found: dict[Any, Any] = {}
_again = False


@functools.wraps(_plain)
def _kept(model_class: type[PreTrainedModel], config: PretrainedConfig, *names: Any, **options: Any) -> Any:
    if _again or options:
        return _plain(model_class, config, *names, **options)
    key = (model_class, type(config), config.to_json_string(use_diff=False), config._attn_implementation, names)
    if key not in _found:
        _found[key] = _plain(model_class, config, *names)
    return _found[key]


def keep() -> None:
    """Have proofs kept from now on, by all that import the function later."""
    prove.proved_groups = _kept


@contextlib.contextmanager
def made_again(whether: bool = True) -> Iterator[None]:
    """Have proofs made anew meanwhile, and not kept."""
    global _again
    before, _again = _again, _again or whether
    try:
        yield
    finally:
        _again = before
