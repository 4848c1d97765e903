"""Short runs in a loop of one's own, on one process or sharded over several, for the tests of sharded parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import VOCAB, tiny_gemma2, tiny_llama, tiny_phi
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hesso_hf import HessoConfig, HessoOptimizer
from hesso_hf.plan import PruningPlan
from hesso_hf.schedule import Schedule
from hesso_hf.shard_state import load_pruning_state, save_pruning_state

BATCH, LENGTH = 4, 9
MODELS: dict[str, Callable[..., PreTrainedModel]] = {"llama": tiny_llama, "gemma2": tiny_gemma2, "phi": tiny_phi}
SIZES = {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48}
PHI_SIZES = {"intermediate_size": 28, "hidden_size": 48}
HESSO = Schedule(3, 6, 2, 14)
CRIC = Schedule(2, 4, 2, 20, cycle_steps=3, cycles=2)


class Run:
    """A model with its optimizer, whole or sharded.

    Args:
        mesh: how the processes are laid out, "shard" or "replicate_shard"; None for no sharding.
    """

    def __init__(self, kind: str = "llama", mesh: str | None = None, **config: Any) -> None:
        self.model = MODELS[kind](seed=5).train()
        sizes = PHI_SIZES if kind == "phi" else SIZES
        self.config = HessoConfig(**({"target_sizes": sizes, "saliency_batches": 2} | config))
        if mesh:
            shard_(self.model, mesh)
        self.plan = PruningPlan.prepare(self.model, self.config)
        # a key bias has a gradient of zero but for rounding, which Adam's usual epsilon would blow up to a full step
        base = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1, eps=1e-4)
        self.optimizer = HessoOptimizer(base, self.plan.process(CRIC if self.config.cric else HESSO))
        self.losses: list[float] = []
        self.collectives: list[int] = []

    def step(self) -> None:
        """Train on this process' share of the step's global batch."""
        generator = torch.Generator().manual_seed(100 + self.optimizer.process.step)
        batch = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
        if dist.is_initialized():
            batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        with Collectives() as counted:
            self.optimizer.step()
        self.losses.append(loss.item())
        self.collectives.append(counted.count)

    def result(self) -> dict[str, Any]:
        """Return whole weights, the decision and what was counted."""
        return {
            "weights": {name: whole(p.detach()) for name, p in self.model.named_parameters()},
            "kept": self.optimizer.process.kept_units().to_dict(),
            "collectives": self.collectives,
            "norm": self.optimizer.process.redundant_norm(),
            "cric": self._cric(),
        }

    def _cric(self) -> dict[str, Any]:
        """Return which units CRIC tried and corrected, without the values on the way."""
        structures = (self.optimizer.process.cric_report() or {}).get("structures", {})
        return {
            name: {key: value for key, value in found.items() if key != "paths"} for name, found in structures.items()
        }


class Collectives:
    """Counts what is asked of torch.distributed by name; FSDP2 and the gradient's norm use other ways."""

    names = ("all_reduce", "broadcast", "broadcast_object_list", "all_gather", "all_gather_object", "reduce", "barrier")

    def __enter__(self) -> Collectives:
        self.count, self._saved = 0, {name: getattr(dist, name) for name in self.names}
        for name, call in self._saved.items():
            setattr(dist, name, self._counting(call))
        return self

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return call(*args, **kwargs)

        return counting

    def __exit__(self, *_: object) -> None:
        for name, call in self._saved.items():
            setattr(dist, name, call)


def shard_(model: PreTrainedModel, mesh: str) -> None:
    """Shard every decoder layer and the rest, as Accelerate does."""
    world = dist.get_world_size()
    if mesh == "replicate_shard":
        device_mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        device_mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=device_mesh)
    fully_shard(model, mesh=device_mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a parameter."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(folder: Path, steps: int, mesh: str | None, kind: str = "llama", **config: Any) -> None:
    """Train and leave what came out, one file a process."""
    run = Run(kind, mesh, **config)
    for _ in range(steps):
        run.step()
    torch.save(run.result(), folder / f"rank{dist.get_rank() if dist.is_initialized() else 0}.pt")


def train_and_save(folder: Path, steps: int, mesh: str | None, kind: str = "llama", **config: Any) -> None:
    """Train and write the pruning state; weights and optimizer state go whole, by name, from process 0."""
    run = Run(kind, mesh, **config)
    for _ in range(steps):
        run.step()
    weights = {name: whole(p.detach()) for name, p in run.model.named_parameters()}
    state = {
        name: {key: whole(value) for key, value in run.optimizer.state[p].items()}
        for name, p in run.model.named_parameters()
    }
    save_pruning_state(run.optimizer, run.model, folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"weights": weights, "state": state}, folder / "whole.pt")
    if dist.is_initialized():
        dist.barrier()


def load_and_train(folder: Path, source: str, steps: int, mesh: str | None, kind: str = "llama", **config: Any) -> None:
    """Continue from what `train_and_save` wrote."""
    run = Run(kind, mesh, **config)
    saved = torch.load(Path(source) / "whole.pt", weights_only=True)

    def placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if isinstance(like, DTensor) and value.dim():
            return distribute_tensor(value, like.device_mesh, like.placements)
        return value.clone()

    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(placed(saved["weights"][name], parameter))
            run.optimizer.base.state[parameter] = {
                key: placed(value, parameter) for key, value in saved["state"][name].items()
            }
    load_pruning_state(run.optimizer, run.model, Path(source))
    for _ in range(steps):
        run.step()
    torch.save(run.result(), folder / f"rank{dist.get_rank() if dist.is_initialized() else 0}.pt")


def forget_the_pruning_state(folder: Path) -> None:
    """Load torch's own state of the optimizer through a distributed checkpoint, and train on."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    run, fresh = Run(mesh="shard"), Run(mesh="shard")
    for _ in range(4):
        run.step()
    set_optimizer_state_dict(fresh.model, fresh.optimizer, get_optimizer_state_dict(run.model, run.optimizer))
    assert fresh.optimizer.process.step == 0, "torch's own step counted"
    try:
        fresh.step()
    except ValueError as error:
        (folder / "refused").write_text(str(error)[str(error).index("call") :][:24])


def main(jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Run jobs of this module, (name, folder, arguments) each, in one of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job, folder, arguments in jobs:
        Path(folder).mkdir(parents=True, exist_ok=True)
        globals()[job](Path(folder), **arguments)
        dist.barrier()
    dist.destroy_process_group()


_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sharded
sharded.main(json.loads(open(sys.argv[2]).read()))
"""


def launch(folder: Path, jobs: list[tuple[str, Path, dict[str, Any]]], processes: int = 2) -> None:
    """Run jobs one after the other in several real processes."""
    (folder / "worker.py").write_text(_WORKER)
    (folder / "jobs.json").write_text(json.dumps([(job, str(where), options) for job, where, options in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(folder / "worker.py"), str(Path(__file__).parent), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
