"""How much memory a training run takes, by engine, from a config alone: pure functions, nothing is allocated.

The peak of one GPU is the largest of three moments of a step: the loss (`forward`), the backward pass, the optimizer's
step. What lies in memory at each is summed in `step` and `resident`; the sources of each term are named with it.
Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .engines import ENGINES, Engine
from .resident import compute_bytes, state_bytes, trained_parameters
from .step import phases
from .workload import COMPONENTS, GB, Cluster, Parts, Workload

if TYPE_CHECKING:
    from .model_sizes import ModelSizes

PROCESS = 4 * GB  # host memory of a process before any weight: Python, CUDA and NCCL (assumed)
MAX_BATCH = 4096


@dataclass(frozen=True)
class Estimate:
    """What one engine needs.

    Attributes:
        phase: the moment of the step with the highest sum.
        parts: bytes of each of COMPONENTS at that moment; they add up to `peak`.
        host: bytes of one node's main memory.
        margin: usable bytes that are left on a GPU; negative where it doesn't fit.
        host_fits: whether a node's main memory is enough.
        max_batch_size: largest micro-batch that fits, 0 where none does.
    """

    engine: str
    phase: str
    parts: Parts
    host: float
    margin: float
    host_fits: bool
    max_batch_size: int

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and self.host_fits

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "engine": self.engine,
            "fits": self.fits,
            "phase": self.phase,
            "peak_bytes": round(self.peak),
            "parts": {name: round(value) for name, value in self.parts.items()},
            "host_bytes_per_node": round(self.host),
            "margin_bytes": round(self.margin),
            "max_batch_size": self.max_batch_size,
        }


def estimate(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> Estimate:
    """Estimate what a run needs under one engine."""
    phase, parts = peak_of(phases(sizes, engine, workload, cluster.num_gpus))
    host = host_memory(sizes, engine, workload, cluster)
    margin = cluster.usable - sum(parts.values())
    host_fits = cluster.host_memory is None or host <= cluster.host_memory
    largest = largest_batch(sizes, engine, workload, cluster) if host_fits else 0
    return Estimate(engine.name, phase, parts, host, margin, host_fits, largest)


def estimates(sizes: ModelSizes, workload: Workload, cluster: Cluster) -> dict[str, Estimate]:
    """Estimate every engine that makes sense on the cluster, in the order of `ENGINES`."""
    engines = [engine for engine in ENGINES if cluster.num_gpus > 1 or not engine.needs_several]
    return {engine.name: estimate(sizes, engine, workload, cluster) for engine in engines}


def recommended(found: Mapping[str, Estimate]) -> str | None:
    """Return the first engine that fits, None where none does."""
    return next((name for name, item in found.items() if item.fits), None)


def largest_batch(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> int:
    """Return the largest micro-batch whose peak fits, by bisection: the peak grows with it."""

    def fits(batch: int) -> bool:
        _, parts = peak_of(phases(sizes, engine, replace(workload, batch_size=batch), cluster.num_gpus))
        return sum(parts.values()) <= cluster.usable

    low, high = 0, MAX_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def peak_of(moments: Mapping[str, Parts]) -> tuple[str, Parts]:
    """Return the moment with the highest sum, with a zero for what isn't there."""
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return name.partition(",")[0], {part: moments[name].get(part, 0.0) for part in COMPONENTS}


def host_memory(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> float:
    """Return the main memory of one node: while loading, or while training, whichever is more.

    Every rank loads the model on its own, in fp32 (LoRA: in the computation's dtype), except under engines that shard
    the parameters, where one does. CRIC's snapshot and offloaded masters, state and gradients are this node's share.
    """
    ranks = cluster.ranks_per_node
    trained, state = trained_parameters(sizes, engine, workload), state_bytes(sizes, engine, workload)
    loading = (compute_bytes(workload) if engine.lora else 4) * sizes.parameters
    loading *= 1 if engine.shards_parameters else ranks
    share = ranks / engine.ranks("optimizer", cluster.num_gpus)
    training = 0.0
    if workload.cric == "cpu":
        training += (4 * trained + state) * share
    if engine.offload:
        training += (8 * trained + state) * share
    return max(loading, training) + ranks * PROCESS
