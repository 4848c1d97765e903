"""Accelerate's real FSDP2 path on a CPU, for the tests: it turns FSDP on only for devices that this takes the place of.

Everything after the replaced methods is Accelerate's and Trainer's own code.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import ROOT, forks

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "OMP_NUM_THREADS": "1",
}

DDP = {"OMP_NUM_THREADS": "1"}

_WORKER = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.support import fsdp_cpu, proofs
from hesso_hf.distributed.collectives import leave
torch.set_num_threads(1)
if os.environ.get("ACCELERATE_USE_FSDP"):
    fsdp_cpu.start()
for job in json.loads(sys.argv[2]):
    with fsdp_cpu.environment(job["env"]), proofs.made_again(bool(job["env"])):
        getattr(importlib.import_module(job["module"]), job["function"])(**job["arguments"])
leave()
"""


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Have other environment variables meanwhile."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Job:
    """A call of a function of a test module in every process; it gets its folder and the number of processes too."""

    module: str
    function: str
    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def to_dict(self, processes: int) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        arguments = {"folder": str(self.folder), "processes": processes, **self.arguments}
        return {"module": self.module, "function": self.function, "arguments": arguments, "env": self.env}


def start() -> None:
    """Join the process group and let Accelerate believe that gloo's processes have an accelerator."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_HPU)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # offloading asks for it
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[method-assign]


def command(where: Path, jobs: list[Job], processes: int = 2, node: list[str] | None = None) -> list[str]:
    """Return the torchrun command that does jobs one after the other in several processes.

    Args:
        node: torchrun's arguments for one of several nodes; by default there is one, with all the processes.
    """
    told = _told(where, jobs, processes)
    (where / "worker.py").write_text(_WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += node or ["--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(where / "worker.py"), str(ROOT), told]


def _told(where: Path, jobs: list[Job], processes: int) -> str:
    for folder in (where, *(job.folder for job in jobs)):
        folder.mkdir(parents=True, exist_ok=True)
    return json.dumps([job.to_dict(processes) for job in jobs])


def start_jobs(
    where: Path, jobs: list[Job], processes: int = 2, sharded: bool = True, env: dict[str, str] | None = None
) -> forks.Forked:
    """Start jobs in several processes under FSDP2, or else under DDP."""
    changes = (ENVIRONMENT if sharded else DDP) | (env or {})
    return forks.start(_WORKER, str(ROOT), _told(where, jobs, processes), processes=processes, env=changes)


def run_jobs(
    where: Path, jobs: list[Job], processes: int = 2, sharded: bool = True
) -> subprocess.CompletedProcess[str]:
    """Do jobs in several processes under FSDP2, or else under DDP."""
    return start_jobs(where, jobs, processes, sharded).completed()


def run(
    where: Path, module: str, function: str, processes: int = 2, sharded: bool = True, **arguments: Any
) -> subprocess.CompletedProcess[str]:
    """Do one job."""
    return run_jobs(where, [Job(module, function, where, arguments)], processes, sharded)
