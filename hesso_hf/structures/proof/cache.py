"""Proofs that outlast a process: what was proved of a class of Transformers' lies on disk, and isn't proved again.

What else could make another proof is part of a file's name: the config, the class' source and this library's, versions.
Nothing is kept that may differ in the next process: of classes from elsewhere, of code that something has put other
code into, and of structures that were refused, as an error that comes once may have done that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...compat import attention_of, experts_of
from ...distributed.collectives import is_main_process
from ...hf_models.build import without_advice
from ..experts import ExpertScheme
from ..groups import Branch, Scheme
from ..layers import LayerScheme
from ..layout import Layout, Segment
from ..turn import NormScheme, TurnScheme
from .result import Proof, StructureProof

logger = logging.get_logger(__name__)

CACHE = "HESSO_HF_CACHE"  # environment variable: the folder, nothing is kept where it is empty
SLOW = 1.0  # seconds after which it is said what takes so long
STOCK = {  # whose code Transformers' modules have among theirs
    "transformers", "torch", "accelerate", "huggingface_hub", "safetensors", "tqdm", "typing_extensions",
    *sys.stdlib_module_names,
}  # fmt: skip
KINDS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")  # of attention and experts, which nobody has registered
SOURCES = ("errors.py", "compat.py", "config", "distributed", "hf_models", "structures")  # what proofs are made by
TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Branch, ExpertScheme, Layout, LayerScheme, NormScheme, Proof, Scheme, Segment, StructureProof, TurnScheme
    )
}  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """A model class with a config, equal to any other with one that says the same."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig = field(compare=False)
    says: tuple[Any, ...]

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PretrainedConfig) -> Case:
        kinds = attention_of(config), experts_of(config)  # which its dict leaves out
        return cls(model_class, config, (type(config), *kinds, repr(config.to_dict())))


def cached(case: Case, what: tuple[str, ...], prove: Callable[[], _T], told: tuple[str, ...] | None = None) -> _T:
    """Return what another process has proved of a case; else prove it, and keep it where that can be used again.

    Args:
        what: is proved.
        told: that, as people read it.
    """
    path = _path(case, what)
    if path is not None and (found := _read(path)) is not None:
        return found
    name = case.model_class.__name__
    notice = f"proving {', '.join(told or what)} of {name} on a tiny model (once per model type)"
    timer = threading.Timer(SLOW, logger.warning, (notice,))
    timer.daemon = True
    if is_main_process():
        timer.start()
    try:
        with without_advice():
            made = prove()
    finally:
        timer.cancel()
    if path is not None and _holds(made):
        _write(path, made)
    return made


def cache_folder() -> Path | None:
    """Return the folder of the proofs, None where nothing is to be kept."""
    named = os.environ.get(CACHE)
    if named is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        named = os.path.join(os.path.expanduser(home), "hesso_hf")
    return Path(named).absolute() / "proofs" if named else None


def _path(case: Case, what: tuple[str, ...]) -> Path | None:
    """Return the file of a proof, None where nothing may be kept of it."""
    try:
        folder, (kind, attention, experts, said) = cache_folder(), case.says
        if folder is None or attention not in KINDS or experts not in KINDS:
            return None
        modules = {sys.modules[base.__module__] for made in (case.model_class, kind) for base in _bases(made)}
        if not all(map(_is_stock, modules)):
            return None
        sources = [Path(str(module.__file__)) for module in sorted(modules, key=lambda module: module.__name__)]
        names = [f"{made.__module__}.{made.__qualname__}" for made in (case.model_class, kind)]
        versions = torch.__version__, transformers.__version__, str(torch.get_default_dtype())
        told = names, attention, experts, said, what, versions, _digest(sources), _own_digest()
    except Exception:  # without a home, or sources: it is proved anew
        return None
    return folder / f"{case.model_class.__name__}-{hashlib.sha256(repr(told).encode()).hexdigest()}.json"


def _bases(kind: type) -> Iterator[type]:
    """Yield a class and those it is made of, Python's and torch's own left out, which versions stand for."""
    yield from (base for base in kind.__mro__ if base.__module__.partition(".")[0] not in STOCK - {"transformers"})


def _is_stock(module: ModuleType) -> bool:
    """Whether a module is Transformers' own and nothing has put other code into it."""
    if not module.__name__.startswith("transformers."):
        return False
    found = [value for value in vars(module).values() if isinstance(value, type | FunctionType)]
    own = (value for value in found if isinstance(value, type) and value.__module__ == module.__name__)
    found += [value for kind in own for value in vars(kind).values() if isinstance(value, FunctionType)]
    return all(value.__module__.partition(".")[0] in STOCK for value in found)


def _digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


@functools.cache
def _own_digest() -> str:
    package = Path(__file__).parents[2]
    return _digest(path for name in SOURCES for path in sorted({package / name, *(package / name).rglob("*.py")})
                   if path.is_file())  # fmt: skip


def _holds(made: Any) -> bool:
    """Whether a proof holds for all that there is."""
    return not isinstance(made, Proof) or all(
        found.scheme is not None or not found.applicable for found in made.structures.values()
    )


def _read(path: Path) -> Any:
    """Return what was kept, None where there is nothing that can be read."""
    try:
        told = json.loads(path.read_bytes())
        if told["digest"] != hashlib.sha256(told["proof"].encode()).hexdigest():
            return None
        return _decoded(json.loads(told["proof"]))
    except Exception:  # whatever lies there: it is proved anew
        return None


def _write(path: Path, made: Any) -> None:
    """Keep a proof, where that is possible; who reads meanwhile finds all or nothing."""
    try:
        proof = json.dumps(_encoded(made))
        told = json.dumps({"digest": hashlib.sha256(proof.encode()).hexdigest(), "proof": proof})
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            try:
                file.write(told)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except (OSError, TypeError):  # no room, no right to write, or no proof
        return


def _encoded(value: Any) -> Any:
    """Return a proof as JSON can hold it.

    Raises:
        TypeError: for anything else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dataclass(value) and TYPES.get(type(value).__name__) is type(value):
        return [type(value).__name__, {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}]
    if type(value) is dict:
        return ["dict", [[_encoded(key), _encoded(found)] for key, found in value.items()]]
    if type(value) in (tuple, frozenset):
        return [type(value).__name__, [_encoded(found) for found in value]]
    raise TypeError(f"{type(value).__name__} is no part of a proof")


def _decoded(told: Any) -> Any:
    """Return what `_encoded` was given."""
    if not isinstance(told, list):
        return told
    kind, values = told
    if kind in TYPES:
        return TYPES[kind](**{name: _decoded(value) for name, value in values.items()})
    if kind == "dict":
        return {_decoded(key): _decoded(value) for key, value in values}
    return {"tuple": tuple, "frozenset": frozenset}[kind](map(_decoded, values))
