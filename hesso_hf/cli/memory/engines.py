"""The ways to spread a run over GPUs that `hesso-hf plan` compares, in the order in which one is recommended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sharded = Literal["optimizer", "gradients", "parameters"]


@dataclass(frozen=True)
class Engine:
    """One way to spread a run.

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
    def casts(self) -> bool:
        """Whether autocast makes low-precision copies of whole fp32 weights, as DDP's model has them."""
        return not (self.deepspeed or self.shards_parameters or self.lora)

    @property
    def needs_several(self) -> bool:
        """Whether one GPU alone would gain nothing by it."""
        return bool(self.sharded) and not self.offload

    @property
    def setting(self) -> str:
        """What its configuration must say beyond what the file says."""
        return {"": "", "all": "fsdp_offload_params: true", "optimizer": "offload_optimizer_device: cpu"}[self.offload]

    def ranks(self, what: Sharded, num_gpus: int) -> int:
        """Return over how many GPUs something is spread."""
        return num_gpus if what in self.sharded else 1


_ALL: tuple[Sharded, ...] = ("optimizer", "gradients", "parameters")
ENGINES = (
    Engine("ddp", "one GPU, DDP", "ddp"),
    Engine("fsdp2", "FSDP2 (as ZeRO-3)", "fsdp2", _ALL),
    Engine("fsdp2_offload", "FSDP2, offloaded", "fsdp2", _ALL, offload="all"),
    Engine("zero1", "ZeRO-1", "zero2", ("optimizer",), deepspeed=True),
    Engine("zero2", "ZeRO-2", "zero2", ("optimizer", "gradients"), deepspeed=True),
    Engine("zero3", "ZeRO-3", "zero3", _ALL, deepspeed=True),
    Engine(
        "zero2_offload", "ZeRO-2, offloaded", "zero2", ("optimizer", "gradients"), deepspeed=True, offload="optimizer"
    ),
    Engine("zero3_offload", "ZeRO-3, offloaded", "zero3", _ALL, deepspeed=True, offload="optimizer"),
    Engine("lora", "LoRA, DDP", "ddp", lora=True),
)


def accelerate_config(engine: Engine, nodes: int) -> str:
    """Return the file in recipes/ to launch an engine with."""
    name = "multi_node_fsdp2" if engine.config == "fsdp2" and nodes > 1 else engine.config
    return f"recipes/accelerate_configs/{name}.yaml"
