"""Proofs that processes share: those that a test session starts prove each config once among them."""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

FOLDER = "HESSO_TESTS_PROOFS"  # environment variable: where they lie
_anew = contextvars.ContextVar("_anew", default=False)  # for those that took `prove` by name too
CACHE = "HESSO_HF_CACHE"  # the library's own, which commands find that are started as users start them


def _modules() -> dict[ModuleType, str]:
    """Return the modules that remember what they have proved, with the name of what proves anew."""
    from hesso_hf.structures.proof import prove, turn

    return {prove: "prove", turn: "prove_turn"}


@functools.cache
def _plain() -> dict[ModuleType, tuple[Any, Any]]:
    """Return what proves anew, and what remembers, as the library has them."""
    return {module: (getattr(module, name), module._remembered) for module, name in _modules().items()}  # type: ignore[attr-defined]


def _shared(plain: Callable[..., Any], model_class: type, config: Any, *names: Any) -> Any:
    """Prove, or take the proof that another process has made."""
    from hesso_hf.structures.proof.cache import Case

    folder = Path(os.environ.get(FOLDER, ""))
    if _anew.get() or FOLDER not in os.environ or not folder.exists():
        return plain(model_class, config, *names)
    says = Case.of(model_class, config).says
    told = (plain.__name__, model_class.__module__, model_class.__qualname__, says, names)
    path = folder / hashlib.sha256(repr(told).encode()).hexdigest()
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # who comes while it is being proved waits: processes often prove at once
        if path.stat().st_size:
            return pickle.loads(path.read_bytes())
        proof = plain(model_class, config, *names)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(proof))
        written.replace(path)
        return proof


def keep() -> None:
    """Have proofs shared from now on."""
    for module, (plain, _) in _plain().items():
        setattr(module, _modules()[module], functools.partial(_shared, plain))


@contextlib.contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Have the library keep its proofs in a folder meanwhile, "" for none."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = folder
    try:
        yield
    finally:
        os.environ.pop(CACHE, None)
        os.environ.update({} if before is None else {CACHE: before})


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Have a folder meanwhile, in which the processes that are started find each other's proofs."""
    if FOLDER in os.environ:
        yield
        return
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="proofs-")
    try:
        with kept_in(os.environ[FOLDER]):
            yield
    finally:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


@contextlib.contextmanager
def made_again(whether: bool = True) -> Iterator[None]:
    """Have proofs made anew meanwhile, each time, and not kept."""
    if not whether:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_in(""))
        stack.callback(_anew.reset, _anew.set(True))
        for module, (plain, remembered) in _plain().items():
            anew = {_modules()[module]: plain, "_remembered": remembered.__wrapped__}
            stack.enter_context(mock.patch.multiple(module, **anew))
        yield
