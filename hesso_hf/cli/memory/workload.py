"""What a memory estimate is asked for: the run and the GPUs, checked; and what its components are called. Bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import HessoError

GB = 1e9
HEADROOM = 0.08  # of a GPU: CUDA's context, NCCL's buffers, and what the caching allocator can't use

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "adamw_8bit", "adafactor", "sgd")
DTYPES = ("bfloat16", "float32")
COMPONENTS = (
    "parameters", "gradients", "optimizer", "snapshot", "teacher", "activations", "logits", "buffers",
)  # fmt: skip
Parts = dict[str, float]  # component to bytes


@dataclass(frozen=True)
class Workload:
    """What is trained how, apart from the engine.

    Attributes:
        dtype: that of the computation; the trained weights (LoRA's base aside) are fp32 masters in any case.
        accumulates: whether gradients of an earlier micro-batch lie in memory during the forward pass.
        cric: none, or where CRIC's snapshot of weights and optimizer state is kept.
        distillation: whether a teacher, the original model in bf16, runs beside it.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    optimizer: OptimizerName = "adamw"
    accumulates: bool = False
    cric: Literal["none", "cpu", "device"] = "none"
    distillation: bool = False
    lora_rank: int = 16

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise HessoError(f"`{name}` ({getattr(self, name)}) must be at least 1")
        for name, allowed in (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("cric", ("none", "cpu", "device"))):
            if getattr(self, name) not in allowed:
                raise HessoError(f"`{name}` ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Cluster:
    """GPUs, their memory (bytes), how many one node has, and its main memory (bytes; None: as much as is needed)."""

    num_gpus: int
    gpu_memory: float
    gpus_per_node: int = 8
    host_memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpu_memory", "gpus_per_node"):
            if getattr(self, name) <= 0:
                raise HessoError(f"`{name}` ({getattr(self, name)}) must be above zero")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise HessoError(
                f"`num_gpus` ({self.num_gpus}) must be a multiple of gpus_per_node ({self.gpus_per_node}), or fit one"
            )

    @property
    def ranks_per_node(self) -> int:
        return min(self.num_gpus, self.gpus_per_node)

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors can take."""
        return self.gpu_memory * (1 - HEADROOM)
