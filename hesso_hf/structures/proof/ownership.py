"""Ownership: which index of which axis belongs to which unit, read off a tiny random model's gradients.

Where the weights that read a unit are zero, nothing that only feeds it has a gradient. So a reader's columns are zeroed
unit by unit (in a binary code, some half of the units at a time), and every index whose gradient vanishes exactly with
unit j belongs to j: rows of q, k, v and biases by head, fused or interleaved in any order, without a list of layouts.
What a norm divides by and subtracts counts as a constant meanwhile, or every channel would depend on every other.

Legend: N indices of an axis, U units.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..groups import AxisName
from ..layout import Layout, Segment

NOBODY, UNKNOWN = -1, -2
_RELUS = {F.relu, torch.relu, torch.Tensor.relu}
_MEANS = {torch.mean, torch.Tensor.mean, torch.var, torch.Tensor.var, torch.std, torch.Tensor.std}


class _ConstantStatistics(TorchFunctionMode):
    """Norms are elementwise for the gradient: their means, variances and roots of mean squares count as constants.

    ReLUs leak meanwhile, so that a channel at rest has a gradient too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MEANS:
            found = func(*args, **kwargs)
            kept = kwargs.get("keepdim") or any(arg is True for arg in args[2:])  # others are on the way, as of streams
            return found.detach() if kept and _over_channels(*args, **kwargs) else found
        if func in _RELUS:  # no unit is dead then
            return F.leaky_relu(args[0] if args else kwargs["input"], 0.1)
        if func is F.layer_norm:
            return _normalised(*args, **kwargs, centred=True)
        if func is F.rms_norm:
            return _normalised(*args, **kwargs, centred=False)
        return func(*args, **kwargs)


def _over_channels(input: torch.Tensor, dim: Any = None, *_: Any, **__: Any) -> bool:
    """Tell whether a mean is a norm's: over the last dimension. Others join copies of the stream, or tokens."""
    dims = (dim,) if isinstance(dim, int) else dim
    return not isinstance(dims, list | tuple) or any(index in (-1, input.dim() - 1) for index in dims)


def _normalised(
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    centred: bool,
) -> torch.Tensor:
    """Layer norm (centred) or RMS norm with constant statistics."""
    dims = tuple(range(-len(normalized_shape), 0))
    mean = input.detach().mean(dims, keepdim=True) if centred else 0.0
    square = (input.detach() - mean).square().mean(dims, keepdim=True)
    found = (input - mean) * torch.rsqrt(square + (eps or torch.finfo(input.dtype).eps))
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


class GradientProbe:
    """Finds the owners of indices on a model by zeroing what reads the units."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, forward: Callable[..., torch.Tensor]) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self._input_ids, self._forward = input_ids, forward
        self._known: dict[Hashable, dict[AxisName, torch.Tensor]] = {}

    def owners(
        self, units: int, zero: Callable[[torch.Tensor], Any], axes: Collection[AxisName], what: Hashable = None
    ) -> dict[AxisName, torch.Tensor]:
        """Return the owner of each index of each axis, shape (N,): a unit, NOBODY, or UNKNOWN without any gradient.

        Args:
            zero: zeroes in place what reads the units of a mask, shape (U,), bool; undone afterwards.
            what: says what is zeroed, if what is found is to be remembered: proofs try the same again and again.
        """
        known = self._known.setdefault((units, what), {}) if what is not None else {}
        if missing := [axis for axis in axes if axis not in known]:
            known |= self._found(units, zero, missing)
        return {axis: known[axis] for axis in axes}

    def _found(
        self, units: int, zero: Callable[[torch.Tensor], Any], axes: list[AxisName]
    ) -> dict[AxisName, torch.Tensor]:
        bits, codes = _codes(units)
        found = {axis: torch.zeros(self.parameters[axis[0]].shape[axis[1]], dtype=torch.long) for axis in axes}
        for bit in range(bits):
            with self.undone():
                zero((codes >> bit) & 1 == 1)
                vanished = self.vanished(axes)
            for axis, mask in vanished.items():
                found[axis] += mask.long() << bit
        units_of = torch.full((1 << bits,), NOBODY)
        units_of[codes] = torch.arange(units)
        return {axis: torch.where(self.dead[axis], UNKNOWN, units_of[code]) for axis, code in found.items()}

    def vanished(self, axes: Iterable[AxisName]) -> dict[AxisName, torch.Tensor]:
        """Return, per axis, which indices have no gradient at all: shape (N,), bool."""
        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad(), _ConstantStatistics():
            logits = self._forward(self.model, self._input_ids)
            generator = torch.Generator().manual_seed(logits.shape[-1])
            (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
        found = {}
        for name, dim in axes:
            parameter = self.parameters[name]
            if parameter.grad is None:
                found[name, dim] = torch.ones(parameter.shape[dim], dtype=torch.bool)
            else:
                others = [d for d in range(parameter.dim()) if d != dim]
                found[name, dim] = (parameter.grad.abs().amax(others) if others else parameter.grad.abs()) == 0
        return found

    @cached_property
    def dead(self) -> dict[AxisName, torch.Tensor]:
        """The indices that have no gradient anyway, of every axis of the model."""
        return self.vanished((name, dim) for name, p in self.parameters.items() for dim in range(p.dim()))

    def output_axis(self, name: str) -> AxisName | None:
        """Return the axis of a linear layer's weight along which its bias lies; None for other parameters."""
        module_name, _, leaf = name.rpartition(".")
        dim = {nn.Linear: 0, Conv1D: 1}.get(type(self.model.get_submodule(module_name)))
        return (f"{module_name}.weight", dim) if leaf == "bias" and dim is not None else None

    def bias_beside(self, name: str, dim: int) -> nn.Parameter | None:
        """Return the bias that lies along an axis of a linear layer's weight, if it has one."""
        bias = name.removesuffix("weight") + "bias"
        return self.parameters[bias] if bias in self.parameters and self.output_axis(bias) == (name, dim) else None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the parameters back that were changed inside."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(before[name])


def _codes(units: int) -> tuple[int, torch.Tensor]:
    """Return a number of bits and one code for each unit, half of whose bits are set.

    What feeds several units vanishes in the bits that all of these have, so fewer: never another unit's code.
    """
    bits = 2
    while math.comb(bits, bits // 2) < units:
        bits += 1
    codes = [code for code in range(1 << bits) if code.bit_count() == bits // 2]
    return bits, torch.tensor(codes[:units])


def layout_of(owners: torch.Tensor, units: int) -> Layout | None:
    """Return the layout in which units lie in ascending order, or None where they don't or the owners aren't known."""
    runs = [(owner, len(list(indices))) for owner, indices in itertools.groupby(owners.tolist())]
    segments: list[Segment] = []
    position = 0
    while position < len(runs):
        owner, length = runs[position]
        if owner == NOBODY:
            segments.append(Segment(fixed=length))
            position += 1
            continue
        if runs[position : position + units] != [(unit, length) for unit in range(units)]:
            return None
        last = segments[-1] if segments else None
        if last is not None and not last.fixed and last.block == length:
            segments[-1] = Segment(last.repeat + 1, length)
        else:
            segments.append(Segment(1, length))
        position += units
    return Layout(tuple(segments))
