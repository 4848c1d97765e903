"""Short runs in a loop of one's own, on one process or sharded over several, for the tests of sharded parameters."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hesso_hf import HessoConfig, HessoOptimizer, export_pruned
from hesso_hf.distributed.parts import like_parameter, named_parameters, part_of
from hesso_hf.engines.fsdp import export as shard_export
from hesso_hf.engines.fsdp.export import ShardedSource, Writers
from hesso_hf.engines.fsdp.state import load_pruning_state, save_pruning_state
from hesso_hf.export import publish
from hesso_hf.export.decision import NOTHING_CUT, Decision
from hesso_hf.export.report import PruningReport
from hesso_hf.export.write import DTYPES, Output, write_pruned, write_uncut
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.pruning.basis import turn_stream
from hesso_hf.pruning.healing import Healer
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.structures.groups import KeptUnits
from tests.support import ROOT, forks, proofs
from tests.support.moe import moe_model
from tests.support.tiny import VOCAB, tiny_gemma2, tiny_llama, tiny_phi

BATCH, LENGTH = 4, 9
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama, "gemma2": tiny_gemma2, "phi": tiny_phi,
    **{name: functools.partial(moe_model, name) for name in ("mixtral", "deepseek_v3")},
}  # fmt: skip
SIZES = {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48}
PHI_SIZES = {"intermediate_size": 28, "hidden_size": 48}
HESSO = Schedule(3, 6, 2, 14)
CRIC = Schedule(2, 4, 2, 20, cycle_steps=3, cycles=2)


class Run:
    """A model with its optimizer, whole or sharded.

    Args:
        mesh: how the processes are laid out, "shard" or "replicate_shard"; None for no sharding.
        heal: whether what stays is refitted.
    """

    def __init__(
        self, kind: str = "llama", mesh: str | None = None, layers: int = 2, heal: bool = False, **config: Any
    ) -> None:
        self.model = MODELS[kind](seed=5, **({"num_hidden_layers": layers} if layers != 2 else {})).train()
        sizes = PHI_SIZES if kind == "phi" else SIZES
        self.config = HessoConfig(**({"target_sizes": sizes, "saliency_batches": 2} | config))
        if mesh:
            shard_(self.model, mesh)
        self.plan = PruningPlan.prepare(self.model, self.config)
        # a key bias has a gradient of zero but for rounding, which Adam's usual epsilon would blow up to a full step
        base = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1, eps=1e-4)
        self.optimizer = HessoOptimizer(base, self.plan.process(CRIC if self.config.cric_way == "path" else HESSO))
        if heal:
            self.optimizer.process.heal_with(Healer(self.model, read(20)))
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
            "sums": self.optimizer.process.state_dict()["sums"],
            "cric": self._cric(),
            "healing": {name: self._whole(name, *held) for name, held in self.optimizer.process.state.healing.items()},
        }

    def _whole(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        return whole(like_parameter(piece, self.optimizer.process.bound.parameters[name]))

    def _cric(self) -> dict[str, Any]:
        """Return which units CRIC tried and corrected, without the values on the way."""
        structures = (self.optimizer.process.cric_report() or {}).get("structures", {})
        return {
            name: {key: value for key, value in found.items() if key != "paths"} for name, found in structures.items()
        }


def read(rows: int) -> dict[str, torch.Tensor]:
    """Return tokens to look at a model by, the same on all processes."""
    ids = torch.randint(3, VOCAB, (rows, 24), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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


def turn(folder: Path, mesh: str | None, kind: str = "llama", **changes: Any) -> None:
    """Turn a model into its principal axes; leave its weights, how it was turned, and logits before and after."""
    model = MODELS[kind](seed=5, **changes)
    if mesh:
        shard_(model, mesh)
    ids, before = read(2)["input_ids"], {name: p.requires_grad for name, p in model.named_parameters()}
    logits = [logits_of(model, ids)]
    batches = [{"input_ids": row[None], "labels": row[None]} for row in read(101)["input_ids"]]
    basis = turn_stream(model, batches, tolerance=1.0)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    logits.append(logits_of(model, ids))
    weights = {name: whole(p.detach()) for name, p in named_parameters(model).items()}
    found = {"weights": weights, "basis": basis.to_dict(), "logits": logits}
    torch.save(found, folder / f"rank{dist.get_rank() if dist.is_initialized() else 0}.pt")


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


def export(folder: Path, kind: str, dtype: str | None = None, layers: int = 2, **config: Any) -> None:
    """Prune, write the smaller model from shards, and from a whole copy on process 0 beside it."""
    run = Run(kind, "shard", layers, **config)
    while not run.optimizer.process.finished:
        run.step()
    kept, rank = run.optimizer.process.kept_units(), dist.get_rank()
    report = write_sharded(run.model, Decision(run.plan.groups, kept), folder / "small", dtype, "20KB")
    uncut = ShardedSource(run.model, Decision(run.plan.groups, NOTHING_CUT), all_write())
    write_uncut(uncut, Output(folder / "dense", run.model.dtype))
    whole_model = MODELS[kind](seed=5, **({"num_hidden_layers": layers} if layers != 2 else {}))
    state = {name: whole(p.detach()) for name, p in run.model.named_parameters()}
    torch.save({"fold": report.verification.fold_error}, folder / f"rank{rank}.pt")
    if rank == 0:
        whole_model.load_state_dict(state, strict=False)
        whole_model.tie_weights()
        export_pruned(whole_model, folder / "plain", kept_units=kept, groups=run.plan.groups, dtype=dtype)
        whole_model.save_pretrained(folder / "plain-dense")


def compacted(folder: Path, family: str, mesh: str) -> None:
    """Prune, cut the model in memory and train on."""
    from tests.engines.test_fsdp_compaction import loop_job  # which takes its models' sharding from here

    loop_job(str(folder), dist.get_world_size(), family, mesh)


def write_sharded(
    model: PreTrainedModel, decision: Decision, folder: Path, dtype: str | None, max_shard_size: str
) -> PruningReport:
    """Write the smaller model from shards."""
    output = Output(folder, DTYPES[dtype] if dtype else model.dtype, max_shard_size=max_shard_size)
    return write_pruned(ShardedSource(model, decision, all_write()), output, {})


def all_write() -> Writers:
    """Let all processes write into one folder."""
    rank = dist.get_rank()
    return Writers(rank, dist.get_world_size(), rank == 0)


def failing_exports(folder: Path) -> None:
    """Let one process fail at different points of an export; say what each process heard, and then export."""
    run = Run(mesh="shard", layers=3)
    while not run.optimizer.process.finished:
        run.step()
    rank = dist.get_rank()

    def failing(*_: Any) -> Any:
        raise OSError("no space left")

    def kept_from_failing() -> str:
        try:
            decision = Decision(run.plan.groups, run.optimizer.process.kept_units())
            write_sharded(run.model, decision, folder / "small", None, "20KB")
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    heard = []
    for culprit, module, name, replacement in (
        (1, shard_export.WeightFiles, "write", failing),
        (1, torch, "equal", lambda *_: False),
        (0, publish, "_replace", failing),
        (0, shard_export, "stored_files", lambda _: {}),
    ):
        plain = getattr(module, name)
        setattr(module, name, replacement if rank == culprit else plain)
        heard.append(kept_from_failing())
        setattr(module, name, plain)
        heard.append((folder / "small").exists())
    torch.save([*heard, kept_from_failing()], folder / f"rank{rank}.pt")


def export_in_little_memory(folder: Path) -> None:
    """Write a model of 100 MB from shards; say how much memory this process took for it."""
    sizes = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 16, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 40}  # fmt: skip
    model = tiny_llama(seed=5, **sizes)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    shard_(model, "shard")
    with proofs.made_again():  # in each process: what libraries keep from then on isn't counted below
        groups = PruningPlan.prepare(model, HessoConfig(target_sizes={"intermediate_size": 640})).groups
    structure = groups.structures["mlp_channels"]
    with torch.no_grad():
        for _, axis in structure.all_axes():
            parameter = model.get_parameter(axis.parameter)
            along = axis.layout.expand(torch.arange(1280) >= 640, fixed_value=False)
            mask = axis.lay(along, parameter.dim(), part_of(axis.parameter, parameter))
            parameter.to_local().masked_fill_(mask, 0.0)
    kept = KeptUnits({"mlp_channels": 1280}, {"mlp_channels": (tuple(range(640)),) * len(structure.layers)})
    gc.collect()
    with Growth() as grown:
        write_sharded(model, Decision(groups, kept), folder / "small", None, "8MB")
    torch.save({"grown": grown.peak, "dense": dense}, folder / f"rank{dist.get_rank()}.pt")


class Growth:
    """How much memory this process takes at most, beyond what it had."""

    def __enter__(self) -> Growth:
        self._process, self._ended = psutil.Process(), threading.Event()
        self._before, self.peak = self._process.memory_info().rss, 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


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
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: else the allocator keeps what FSDP2 lets go
    dist.init_process_group("gloo")
    for job, folder, arguments in jobs:
        Path(folder).mkdir(parents=True, exist_ok=True)
        globals()[job](Path(folder), **arguments)
        dist.barrier()
    dist.destroy_process_group()


_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.support import sharded
sharded.main(json.loads(open(sys.argv[2]).read()))
"""


def launch(folder: Path, jobs: list[tuple[str, Path, dict[str, Any]]], processes: int = 2) -> None:
    """Run jobs one after the other in several real processes."""
    (folder / "jobs.json").write_text(json.dumps([(job, str(where), options) for job, where, options in jobs]))
    done = forks.run(_WORKER, str(ROOT), str(folder / "jobs.json"), processes=processes)
    assert done.returncode == 0, done.stderr[:8000]
