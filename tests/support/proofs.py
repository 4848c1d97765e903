"""Proofs by config: the tests' many runs of few tiny models prove each of them once in a session."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hesso_hf.structures.proof import prove

FOLDER = "HESSO_TESTS_PROOFS"  # environment variable: where they lie, for processes that a session starts

_plain = prove.proved_groups
_found: dict[str, Any] = {}
_again = False


@functools.wraps(_plain)
def _kept(model_class: type[PreTrainedModel], config: PretrainedConfig, *names: Any, **options: Any) -> Any:
    if _again or options:
        return _plain(model_class, config, *names, **options)
    told = (f"{model_class.__module__}.{model_class.__qualname__}", type(config).__qualname__, names)
    key = repr((*told, config.to_json_string(use_diff=False), config._attn_implementation))
    if key not in _found:
        _found[key] = _shared(key) or _share(key, _plain(model_class, config, *names))
    return _found[key]


def _path(key: str) -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder) / hashlib.sha256(key.encode()).hexdigest() if folder else None


def _shared(key: str) -> Any:
    path = _path(key)
    return pickle.loads(path.read_bytes()) if path is not None and path.exists() else None


def _share(key: str, proof: Any) -> Any:
    path = _path(key)
    if path is not None and path.parent.exists():
        written = path.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(proof))
        written.replace(path)
    return proof


def keep() -> None:
    """Have proofs kept from now on, by all that import the function later."""
    prove.proved_groups = _kept


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Have a folder meanwhile, in which the processes that are started find each other's proofs."""
    if FOLDER in os.environ:
        yield
        return
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="proofs-")
    try:
        yield
    finally:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


@contextlib.contextmanager
def made_again(whether: bool = True) -> Iterator[None]:
    """Have proofs made anew meanwhile, and not kept."""
    global _again
    before, _again = _again, _again or whether
    try:
        yield
    finally:
        _again = before
