"""Rounding: how many units a layer may keep."""

from __future__ import annotations

import math

from ..config import HessoConfig
from ..errors import HessoError
from ..structures.experts import EXPERT_UNITS
from ..structures.groups import StructureGroups

CHANNELS = ("mlp_channels", "expert_channels")  # whose number no config class refuses
EXPERT_ROWS = 8  # numbers in the rows of fused experts: their kernels take rows of whole 16 bytes
MULTIPLES = (128, 32, 8)  # of channels, tried until one meets the ratio: kernels like large ones best


def default_round_to(size: int, most: int = 128) -> int:
    """Return `most`, or the largest power of two that leaves a smaller size 32 steps."""
    return next((step for step in (128, 64, 32, 16, 8, 4, 2) if step <= most and size >= 32 * step), 1)


def default_head_multiple(heads: int) -> int:
    """Return how many heads at a time go: with four steps left, tensor parallelism of 2 or 4 ranks stays possible."""
    return next((step for step in (4, 2) if heads >= 4 * step and heads % step == 0), 1)


def allowed_counts(config: HessoConfig, group: StructureGroups, most: int) -> list[int]:
    """List the numbers of units per layer that rounding and tensor parallelism allow, ascending.

    Args:
        most: one of `MULTIPLES`, which channels keep to where nothing is asked for; with the last, heads go singly.

    Raises:
        HessoError: where `tensor_parallel_size` leaves none.
    """
    name, tp = group.structure, config.tensor_parallel_size
    if name == "layers":
        return list(range(1, group.num_units + 1))
    divisible = [1] if name in CHANNELS else []  # so many indices a unit, times the kept units
    if name in ("attention_heads", "query_heads"):
        together = name == "attention_heads" and most != MULTIPLES[-1]
        multiple = math.lcm(group.pools, default_head_multiple(group.num_units) if together else 1)
        divisible = list(group.increments.values())
    elif name == EXPERT_UNITS:
        multiple = math.lcm(group.pools, default_round_to(group.num_units, most))
    else:
        fused_experts = any(axis.dim == 2 for _, axis in group.all_axes())
        multiple = config.round_to or (1 if fused_experts else default_round_to(group.num_units, most))
        multiple = math.lcm(multiple, EXPERT_ROWS if fused_experts else 1)
    counts = [count for count in range(multiple, group.num_units, multiple) if count >= group.least]
    counts.append(group.num_units)
    allowed = [count for count in counts if all(count * step % tp == 0 for step in divisible)]
    if not allowed:
        raise HessoError(f"`tensor_parallel_size` ({tp}) leaves no allowed number of {name} below {group.num_units}")
    return allowed
