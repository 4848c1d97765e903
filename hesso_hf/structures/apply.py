"""What is done to the slices of a structure's units, in place: shrink them, centre what they write, set them to zero.

Legend: U units a layer.
"""

from __future__ import annotations

import torch

from ..distributed.parts import Part
from .groups import Axis


@torch.no_grad()
def shrink_(tensor: torch.Tensor, axis: Axis, factors: torch.Tensor, part: Part | None = None) -> None:
    """Multiply each unit's slice by its factor, in place; a factor of 1 leaves it as it is, bit for bit.

    Args:
        tensor: the parameter's data, or what this process holds of it.
        factors: one factor per unit, shape (U,).
        part: which part that is; all of it by default.
    """
    spread = axis.spread(factors.to(tensor.device, tensor.dtype), tensor.dim(), part=part)
    tensor.mul_(spread)
    if axis.shift:  # (w + shift) * f - shift, without rounding where f is 1
        tensor.add_((spread - 1) * axis.shift)


@torch.no_grad()
def centre_(
    tensor: torch.Tensor,
    axis: Axis,
    scales: torch.Tensor,
    share: float = 1.0,
    part: Part | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Take the mean out of what is written to the residual stream, in place, each channel by its scale.

    A norm that subtracts the mean over all channels doesn't see it while all scales are 1; when pruned channels are at
    zero the kept ones have mean zero among themselves.

    Args:
        scales: shape (U,), 1 kept to 0 pruned.
        share: of the mean, how much is taken out.
        part: which part of the parameter `tensor` is; all of it by default.
        total: sum over the channels of all parts, where `tensor` holds some of them.
    """
    scales = scales.to(tensor.device, tensor.dtype)
    spread = axis.spread(scales, tensor.dim(), part=part)
    total = tensor.sum(axis.dim, keepdim=True) if total is None else total.to(tensor.device, tensor.dtype)
    tensor.sub_(spread * (total * (share / scales.sum())))


@torch.no_grad()
def mask_(
    tensor: torch.Tensor, axis: Axis, pruned: torch.Tensor, fill: float | None = None, part: Part | None = None
) -> None:
    """Set pruned units' slices to what stands for zero, in place, even where they hold NaN.

    Args:
        pruned: shape (U,), bool.
        fill: the value; by default -shift, so that the effective weight is zero.
        part: which part of the parameter `tensor` is; all of it by default.
    """
    spread = axis.spread(pruned.to(tensor.device), tensor.dim(), fixed_value=False, part=part)
    tensor.masked_fill_(spread, -axis.shift if fill is None else fill)
