"""Proofs that processes share: those that a test session starts prove each config once among them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from transformers import PretrainedConfig, PreTrainedModel

from hesso_hf.structures.proof import prove

FOLDER = "HESSO_TESTS_PROOFS"  # environment variable: where they lie

_plain, _remembered = prove.prove_anew, prove._remembered


def _shared(model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...]) -> prove.Proved:
    folder = Path(os.environ.get(FOLDER, ""))
    if FOLDER not in os.environ or not folder.exists():
        return _plain(model_class, config, names)
    told = (model_class.__module__, model_class.__qualname__, prove._Case.of(model_class, config).says, names)
    path = folder / hashlib.sha256(repr(told).encode()).hexdigest()
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # who comes while it is being proved waits: processes often prove at once
        if path.stat().st_size:
            return pickle.loads(path.read_bytes())
        proof = _plain(model_class, config, names)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(proof))
        written.replace(path)
        return proof


def keep() -> None:
    """Have proofs shared from now on."""
    prove.prove_anew = _shared


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
    """Have proofs made anew meanwhile, each time, and not kept."""
    if not whether:
        yield
        return
    with mock.patch.multiple(prove, prove_anew=_plain, _remembered=_remembered.__wrapped__):
        yield
