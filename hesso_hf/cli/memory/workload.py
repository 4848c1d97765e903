"""What an estimate is asked for: the run and the GPUs, checked, and the engines that are compared. Bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...errors import HessoError

GB = 1e9
HEADROOM = 0.08  # of a GPU: CUDA's context, NCCL's buffers, and what the caching allocator can't use

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "adamw_8bit", "adafactor", "sgd")
DTYPES = ("bfloat16", "float32")
COMPONENTS = (
    "parameters", "gradients", "optimizer", "snapshot", "teacher", "activations", "logits", "buffers", "healing",
)  # fmt: skip
Parts = dict[str, float]  # component to bytes
Sharded = Literal["optimizer", "gradients", "parameters"]


@dataclass(frozen=True)
class Workload:
    """What is trained how, apart from the engine.

    Attributes:
        dtype: that of the computation; the trained weights (LoRA's base aside) are fp32 masters in any case.
        accumulates: whether gradients of an earlier micro-batch lie in memory during the forward pass.
        cric: none, or where CRIC's snapshot of weights and optimizer state is kept.
        distillation: whether a teacher, the original model in bf16, runs beside it on the user's data too.
        replay_share: of all tokens, on which the original model runs beside it; they come on top of the batch.
        healing: whether what goes is refitted into what stays, as far as the engine has whole matrices.
        healing_tokens: as in `HessoConfig`.
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
    replay_share: float = 0.0
    healing: bool = False
    healing_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise HessoError(f"`{name}` ({getattr(self, name)}) must be at least 1")
        for name, allowed in (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("cric", ("none", "cpu", "device"))):
            if getattr(self, name) not in allowed:
                raise HessoError(f"`{name}` ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")

        if not 0 <= self.replay_share < 1:
            raise HessoError(f"`replay_share` ({self.replay_share}) must lie in [0, 1)")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch whose activations wait for the backward pass."""
        return math.ceil(self.batch_size * self.sequence_length / (1 - self.replay_share))

    @property
    def width(self) -> int:
        """Bytes of the computation's dtype."""
        return 2 if self.dtype == "bfloat16" else 4


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


@dataclass(frozen=True)
class TokenPace:
    """How many tokens of the data a run reads, and the peak of one GPU (10^12 operations a second)."""

    tokens: float = 1e9
    device_tflops: float = 989.0  # of an H100 SXM in bf16, without sparsity

    def __post_init__(self) -> None:
        for name in ("tokens", "device_tflops"):
            if not 0 < getattr(self, name) < math.inf:
                raise HessoError(f"`{name}` ({getattr(self, name):g}) must be above zero")


@dataclass(frozen=True)
class EngineSpec:
    """One way to spread a run over GPUs.

    Attributes:
        title: what it is called in a table.
        config: file in recipes/accelerate_configs, without its ending.
        sharded: what every GPU holds only its share of; the fp32 masters go with the optimizer state.
        deepspeed: whether a low-precision model lies beside the masters.
        offload: what lies in main memory: nothing, masters and optimizer state, or all that is sharded.
        lora: whether only adapters are trained.
    """

    name: str
    title: str
    config: str
    sharded: tuple[Sharded, ...] = ()
    deepspeed: bool = False
    offload: Literal["", "optimizer", "all"] = ""
    lora: bool = False

    @property
    def shards_parameters(self) -> bool:
        return "parameters" in self.sharded

    @property
    def heals(self) -> bool:
        """Whether what healing takes is counted: on shards it takes what room there is, and leaves out the rest."""
        return not self.sharded and not self.deepspeed

    @property
    def setting(self) -> str:
        """What its configuration must say beyond what the file says."""
        return {"": "", "all": "fsdp_offload_params: true", "optimizer": "offload_optimizer_device: cpu"}[self.offload]

    def config_file(self, nodes: int) -> str:
        """Return the file in recipes/ to launch it with."""
        name = "multi_node_fsdp2" if self.config == "fsdp2" and nodes > 1 else self.config
        return f"recipes/accelerate_configs/{name}.yaml"


_ZERO2: tuple[Sharded, ...] = ("optimizer", "gradients")
_ALL: tuple[Sharded, ...] = (*_ZERO2, "parameters")
# In the order in which one is recommended.
ENGINES = {
    engine.name: engine
    for engine in (
        EngineSpec("ddp", "one GPU, DDP", "ddp"),
        EngineSpec("fsdp2", "FSDP2 (as ZeRO-3)", "fsdp2", _ALL),
        EngineSpec("fsdp2_offload", "FSDP2, offloaded", "fsdp2", _ALL, offload="all"),
        EngineSpec("zero1", "ZeRO-1", "zero2", ("optimizer",), deepspeed=True),
        EngineSpec("zero2", "ZeRO-2", "zero2", _ZERO2, deepspeed=True),
        EngineSpec("zero3", "ZeRO-3", "zero3", _ALL, deepspeed=True),
        EngineSpec("zero2_offload", "ZeRO-2, offloaded", "zero2", _ZERO2, deepspeed=True, offload="optimizer"),
        EngineSpec("zero3_offload", "ZeRO-3, offloaded", "zero3", _ALL, deepspeed=True, offload="optimizer"),
        EngineSpec("lora", "LoRA, DDP", "ddp", lora=True),
    )
}
