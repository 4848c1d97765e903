"""Accelerate's real FSDP2 path on a CPU, for the tests: it turns FSDP on only for devices that this takes the place of.

Everything after the two replaced methods of `PartialState` is Accelerate's and Trainer's own code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "OMP_NUM_THREADS": "1",
}

DDP = {"OMP_NUM_THREADS": "1"}

_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import os, torch, fsdp_cpu
torch.set_num_threads(1)
if os.environ.get("ACCELERATE_USE_FSDP"):
    fsdp_cpu.start()
import {module}
{module}.{function}(**json.loads(sys.argv[2]))
"""


def start() -> None:
    """Join the process group and let Accelerate believe that gloo's processes have an accelerator."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_HPU)  # type: ignore[method-assign]
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[method-assign]


def command(where: Path, module: str, function: str, nproc: int, **arguments: Any) -> list[str]:
    """Return the torchrun command that calls a function of a test module in several processes."""
    script = where / "worker.py"
    where.mkdir(parents=True, exist_ok=True)
    script.write_text(_WORKER.format(module=module, function=function))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*launcher, str(script), str(Path(__file__).parent), json.dumps(arguments)]


def run(
    where: Path,
    module: str,
    function: str,
    processes: int = 2,
    sharded: bool = True,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> subprocess.CompletedProcess[str]:
    """Call a function of a test module, with the folder, in several processes under FSDP2, or else under DDP."""
    line = command(where, module, function, processes, folder=str(where), processes=processes, **arguments)
    return subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, **(ENVIRONMENT if sharded else DDP), **(env or {})}
    )
