"""The survey: what can be pruned in every causal language model type of the installed Transformers.

Each type is tried in a process of its own, so that one that crashes or hangs costs one row.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ... import __version__
from ...config import DEFAULT_STRUCTURES, STRUCTURES
from ...errors import HessoError, VerificationError, nearest_name
from ...hf_models.tiny_configs import default_config
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import PruningGroups
from ...structures.proof.experts import with_enough_experts
from ...structures.proof.prove import proved_groups
from ...structures.proof.result import Proof, groups_of
from ...structures.proof.tiny_case import covering_config
from .page import BASIS, JOINT, BasisSurvey, StructureSurvey, TypeSurvey, one_line, render_architectures
from .round_trip import RoundTrips, describe
from .stream_basis import survey_basis

COLUMNS = (*STRUCTURES, JOINT, BASIS)
TIME_LIMIT = 240.0
_NOTHING = StructureSurvey("not_applicable", reason="nothing is proved")


def model_types() -> list[str]:
    """List the model types that have a causal language model."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


# -- one type ----------------------------------------------------------------------------------------------------------


def survey_type(model_type: str) -> TypeSurvey:
    """Prove every structure of a model type, take the proved ones on a round trip, turn. Nothing is raised."""
    found: TypeSurvey = {JOINT: _NOTHING, **survey_only_basis(model_type)}
    for names in (DEFAULT_STRUCTURES, *((name,) for name in STRUCTURES if name not in DEFAULT_STRUCTURES)):
        try:
            found |= _survey_structures(model_type, names)
        except Exception as error:  # model code may fail with any exception type
            found |= dict.fromkeys(names, StructureSurvey("refused", reason=one_line(describe(error))))
    return {name: found[name] for name in COLUMNS}


def survey_only_basis(model_type: str) -> TypeSurvey:
    """Try only whether the stream of a model type can be turned. Nothing is raised."""
    return {BASIS: survey_basis(model_type)}


def refuse_all(reason: str) -> TypeSurvey:
    """Return refusals of all structures and of turning, and that nothing is left to be cut at once."""
    refused = dict.fromkeys(STRUCTURES, StructureSurvey("refused", reason=one_line(reason)))
    return {**refused, JOINT: _NOTHING, BASIS: BasisSurvey("refused", reason=one_line(reason))}


def _survey_structures(model_type: str, names: tuple[str, ...]) -> dict[str, StructureSurvey]:
    """Survey structures that don't exclude each other."""
    model_class, config = default_config(model_type)
    groups, proof, _ = proved_groups(model_class, config, names)
    found = {name: _unproved(name, groups, proof) for name in names if name not in groups.structures}
    if not groups.structures:
        return found
    tiny = covering_config(model_class, config)
    if EXPERT_UNITS in names:
        tiny = with_enough_experts(tiny)
    trips = RoundTrips(model_class, tiny, groups_of(model_class, tiny, proof)[0])
    for together in _together(groups):
        found |= dict.fromkeys(together, _round_trip(trips, together, together[0] in groups.coupled))
    proved = tuple(name for name in groups.structures if found[name].status == "proved")
    if proved and names == DEFAULT_STRUCTURES:
        found[JOINT] = _round_trip(trips, proved, coupled=False) if len(proved) > 1 else found[proved[0]]
    return found


def _unproved(name: str, groups: PruningGroups, proof: Proof) -> StructureSurvey:
    if name in groups.absent:
        return StructureSurvey("not_applicable", reason=one_line(groups.absent[name]))
    return StructureSurvey("refused", _rounded(proof.structures[name].relative_error), one_line(groups.refused[name]))


def _together(groups: PruningGroups) -> list[tuple[str, ...]]:
    """List the structures, those that only shrink together as one."""
    alone: list[tuple[str, ...]] = [(name,) for name in groups.structures if name not in groups.coupled]
    return [tuple(groups.coupled), *alone] if groups.coupled else alone


def _round_trip(trips: RoundTrips, names: tuple[str, ...], coupled: bool) -> StructureSurvey:
    try:
        return StructureSurvey("proved", _rounded(trips.run(names)), trips.untried, coupled)
    except VerificationError as error:
        return StructureSurvey("refused", reason=one_line(str(error)), coupled=coupled)
    except Exception as error:  # model code may fail with any exception type
        return StructureSurvey("refused", reason=one_line(f"zeroing: {describe(error)}"), coupled=coupled)


def _rounded(error: float | None) -> float | None:
    return float(f"{error:.1e}") if error is not None and math.isfinite(error) else None


# -- all types ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    model_type: str
    process: BaseProcess
    receiver: Connection
    deadline: float


def survey_types(
    types: Sequence[str], jobs: int = 2, limit: float = TIME_LIMIT, survey: Callable[[str], TypeSurvey] = survey_type
) -> Iterator[tuple[str, TypeSurvey]]:
    """Survey types, several at a time, and yield each as it is done.

    Args:
        limit: time that one type may take (seconds).
        survey: what a process does; a function that can be imported.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting, running = deque(types), list[_Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                model_type = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(survey, model_type, sender), daemon=True)
                process.start()
                sender.close()
                running.append(_Worker(model_type, process, receiver, time.monotonic() + limit))
            earliest = min(worker.deadline for worker in running)
            wait([worker.receiver for worker in running], max(0.0, earliest - time.monotonic()))
            for worker in list(running):
                outcome = _outcome(worker, limit)
                if outcome is not None:
                    running.remove(worker)
                    yield worker.model_type, outcome
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()


def _outcome(worker: _Worker, limit: float) -> TypeSurvey | None:
    """Return what a process found, or refusals where it crashed or ran out of time; None while it works."""
    if worker.receiver.poll():
        try:
            found = worker.receiver.recv()
            worker.process.join()
        except EOFError:
            worker.process.join()
            found = refuse_all(f"the process ended with exit code {worker.process.exitcode}")
    elif time.monotonic() >= worker.deadline:
        worker.process.kill()
        worker.process.join()
        found = refuse_all(f"not done after {limit:g} seconds")
    else:
        return None
    worker.receiver.close()
    return found


def _work(survey: Callable[[str], TypeSurvey], model_type: str, sender: Connection) -> None:
    with open(os.devnull, "w") as nowhere:  # what model code prints or warns about on many types
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        found = survey(model_type)
    except Exception as error:  # the row says so
        found = refuse_all(describe(error))
    sender.send(found)


# -- the files ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions that the outcome depends on."""
    return {"hesso_hf": __version__, **{name: version(name) for name in ("transformers", "torch")}}


class SurveyFile:
    """The survey's JSON and the page rendered from it, written after every type.

    Args:
        path: the JSON; the page lies beside it.
        types: what is to be surveyed, all types by default; others that the file has are kept then.
        resume: keep what the file has of these types, too.
        only: the column to survey; the others that the file has are kept.

    Raises:
        HessoError: for an unknown type or one that the file lacks where it is to have a column more, or where the file
            to go on with was made with other versions.
    """

    def __init__(
        self, path: Path, types: Sequence[str] | None = None, resume: bool = False, only: str | None = None
    ) -> None:
        known = model_types()
        for name in types or ():
            if name not in known:
                raise HessoError(f"`--types` ({name!r}) has no causal language model{nearest_name(name, known)}")
        self.path = path
        self.columns = (only,) if only else COLUMNS
        wanted = known if types is None else list(dict.fromkeys(types))
        self.found: dict[str, Any] = self._read() if resume or only or types is not None else {}
        if only and (missing := [name for name in wanted if name not in self.found]):
            raise HessoError(
                f"`--only` ({only!r}): {str(path)!r} has no {missing[0]!r}; survey it without --only first"
            )
        self.left = [name for name in wanted if not (resume and set(self.columns) <= self.found.get(name, {}).keys())]

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            read = json.loads(self.path.read_text(encoding="utf-8"))
            found, made_with = dict(read["model_types"]), read["versions"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise HessoError(f"`--output` ({str(self.path)!r}) isn't the JSON of a survey; name another") from error
        if made_with != versions():
            raise HessoError(
                f"`--output` ({str(self.path)!r}) was made with {made_with}, here are {versions()}; survey all types "
                "without --resume, or name another output"
            )
        return found

    @property
    def content(self) -> dict[str, Any]:
        """The JSON's content."""
        return {"versions": versions(), "model_types": {name: self.found[name] for name in sorted(self.found)}}

    def add(self, model_type: str, found: TypeSurvey) -> None:
        """Take up a type's columns and write both files."""
        new = {name: found[name].to_dict() for name in self.columns}
        entries = self.found.get(model_type, {}) | new
        self.found[model_type] = {name: entries[name] for name in COLUMNS if name in entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        _write(self.path.with_suffix(".md"), render_architectures(self.content))


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that an interrupted survey can be resumed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
