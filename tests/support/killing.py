"""Kill -9 at a chosen event of a run: the run stops there and says so, and everything that belongs to it is killed."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.forks import Forked

EVENT, RANK, MARK = "KILL_AT_EVENT", "KILL_RANK", "KILL_MARK"

# what a run can be about to do when it is killed: where it is found, and its name there
EVENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "step": (("hesso_hf.trainer.trainer:HessoTrainer", "training_step"),),
    "pruning state": (("hesso_hf.engines.fsdp.engine", "save_pruning_state"),),
    "parts": (("hesso_hf.engines.fsdp.state", "save_file"),),
    "distributed files": (("torch.distributed.checkpoint", "save"),),
    "torch file": (("torch", "save"),),
    "replacing": (("os", "replace"),),
    "small model": (("hesso_hf.export.weight_files:WeightFiles", "finish"), ("safetensors.torch", "save_file")),
}

ON_ALL_RANKS = ("step", "pruning state", "parts", "distributed files")


def arm() -> None:
    """In the run: count events of one kind, and stop for good before the one of that number."""
    if EVENT not in os.environ or os.environ.get("RANK", "0") != os.environ.get(RANK, "0"):
        return
    kind, _, number = os.environ[EVENT].rpartition(":")
    count = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            if next(count) == int(number):
                Path(os.environ[MARK]).write_text(os.environ[EVENT])
                time.sleep(600)
            return call(*args, **kwargs)

        return counting

    for place, name in EVENTS[kind]:
        owner = owner_of(place)
        setattr(owner, name, counted(getattr(owner, name)))


def owner_of(place: str) -> Any:
    """Return the module, or the class in one, that EVENTS names."""
    module, _, inner = place.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, inner) if inner else owner


def run_and_kill(start: Callable[[dict[str, str]], Forked], mark: Path, event: str, rank: int) -> bool:
    """Start a run and kill it and all its processes at an event ("step:3"); return whether it came to that.

    Args:
        start: starts it with changes of the environment.
    """
    mark.unlink(missing_ok=True)
    run = start({EVENT: event, RANK: str(rank), MARK: str(mark)})
    while run.poll() is None and not mark.exists():
        time.sleep(0.05)
    if run.poll() is not None:
        assert run.wait() == 0, run.output("stderr")[-3000:]
        return False
    run.kill()
    return True
