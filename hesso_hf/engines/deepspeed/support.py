"""What of DeepSpeed's config pruning doesn't work with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import HessoConfig
from ...errors import HessoError


def refuse_zero(engine_config: Mapping[str, Any], config: HessoConfig) -> None:
    """Refuse a DeepSpeed config that pruning doesn't work with.

    Raises:
        HessoError: naming the setting and the remedy.
    """
    zero = engine_config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise HessoError(
            f"`zero_optimization.stage` ({zero.get('stage', 0)}) of DeepSpeed's config must be 1, 2 or 3; without "
            "ZeRO train under DDP"
        )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise HessoError(f"`zero_optimization.{name}.device` ('nvme') isn't supported: use 'cpu'")
    if zero.get("round_robin_gradients"):  # DeepSpeed 0.19 then maps parameters to the wrong part of its fp32 vectors
        raise HessoError("`round_robin_gradients` (True) of DeepSpeed's config isn't supported: leave it out")
    if zero.get("mics_shard_size", -1) > 0:
        raise HessoError(
            f"`zero_optimization.mics_shard_size` ({zero['mics_shard_size']}) isn't supported: leave it out"
        )
    if zero.get("elastic_checkpoint"):  # DeepSpeed 0.19 fails on what it writes then, on as many processes too
        raise HessoError(
            "`zero_optimization.elastic_checkpoint` (True) isn't supported: leave it out, and resume on another number "
            "of processes by `checkpoint.load_universal`"
        )
    for found, name in ((zero, "zenflow"), (engine_config, "torch_autocast"), (engine_config, "tensor_parallel")):
        if found.get(name):
            raise HessoError(f"`{name}` ({found[name]}) of DeepSpeed's config isn't supported: leave it out")
    if config.cric and config.cric_mode == "probe":
        raise HessoError(
            "`cric_mode` ('probe') isn't supported with DeepSpeed, whose backward passes belong to steps; use 'path'"
        )
    if config.prune_vocabulary:
        raise HessoError(
            "`prune_vocabulary` (True) isn't supported with DeepSpeed; leave it out, and trim the saved model on one "
            "process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
        )
