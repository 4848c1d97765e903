"""Parameters that ZeRO's processes put together: all call each of these, in the same order."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ...distributed.collectives import all_or_none
from ...distributed.parts import full_shape


def gathered(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    """Put a parameter that ZeRO-3 has divided together for a while; all processes do it, in the same order."""
    if not hasattr(parameter, "ds_tensor"):
        return contextlib.nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # a module is about to compute with it
        return contextlib.nullcontext()

    return deepspeed.zero.GatheredParameters([parameter])


def room_for(parameter: torch.Tensor) -> None:
    """Take memory for a whole parameter in fp32, which DeepSpeed will take next.

    Raises:
        OutOfMemoryError: where there is none.
    """
    torch.empty(full_shape(parameter), dtype=torch.float32, device=parameter.device)


def whole_fp32(parameter: Any) -> torch.Tensor:
    """Return a whole parameter in fp32; all processes call it, in one order, and all raise where one has no room."""
    from deepspeed.utils import safe_get_full_fp32_param

    all_or_none(lambda: room_for(parameter), parameter.device)
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach()
    with gathered(parameter):
        return parameter.detach().float().clone()
