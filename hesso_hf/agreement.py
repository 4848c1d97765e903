"""Ranks decide alike: decisions come from rank 0 and a checksum is compared on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .errors import HessoError


def world_size() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast_decision_(decision: torch.Tensor) -> None:
    """Overwrite a decision with rank 0's, in place.

    Raises:
        HessoError: where the ranks hold different decisions afterwards.
    """
    if world_size() == 1:
        return
    bits = decision.to(torch.uint8)
    dist.broadcast(bits, src=0)
    decision.copy_(bits.to(decision.dtype))
    positions = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.float64)
    checksum = (bits.flatten().to(torch.float64) * positions).sum()
    extremes = torch.stack([checksum, -checksum])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if bool(extremes[0] != -extremes[1]):
        raise HessoError(
            "the processes disagree about which units are redundant; is every rank running the same model?"
        )
