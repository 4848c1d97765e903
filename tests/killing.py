"""Kill -9 at a chosen event of a run: the run stops there and says so, and everything that belongs to it is killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

EVENT, RANK, MARK = "KILL_AT_EVENT", "KILL_RANK", "KILL_MARK"


def arm() -> None:
    """In the run: count training steps and writes to disk, and stop for good before the event of that number."""
    if EVENT not in os.environ or os.environ.get("RANK", "0") != os.environ.get(RANK, "0"):
        return
    import safetensors.torch
    import torch
    import torch.distributed.checkpoint as dcp

    import hesso_hf.engines
    import hesso_hf.shard_export
    import hesso_hf.shard_state
    from hesso_hf import HessoTrainer

    count = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == int(os.environ[EVENT]):
                Path(os.environ[MARK]).write_text(f"event {count[0]}: {call.__name__}")
                time.sleep(600)
            return call(*args, **kwargs)

        return counting

    HessoTrainer.training_step = counted(HessoTrainer.training_step)  # type: ignore[method-assign]
    for module, name in (
        (torch, "save"), (safetensors.torch, "save_file"), (os, "replace"), (dcp, "save"),
        (hesso_hf.shard_state, "save_file"), (hesso_hf.shard_export, "save_file"),
        (hesso_hf.engines, "save_pruning_state"),
    ):  # fmt: skip
        setattr(module, name, counted(getattr(module, name)))


def run_and_kill(command: list[str], mark: Path, event: int, rank: int, env: dict[str, str]) -> str | None:
    """Start a run and kill it and all its processes at an event; None where it ended before.

    Returns:
        What the run was about to do.
    """
    mark.unlink(missing_ok=True)
    environment = {**os.environ, **env, EVENT: str(event), RANK: str(rank), MARK: str(mark)}
    log = mark.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and not mark.exists():
            time.sleep(0.05)
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()[-3000:]
            return None
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            member.send_signal(signal.SIGKILL)
        process.wait()
    return mark.read_text()
