"""Discovery: which index of which axis belongs to which unit, read off a tiny random model's gradients.

Where the weights that read a unit are zero, nothing that only feeds it has a gradient. So a reader's columns are zeroed
unit by unit (in a binary code, some half of the units at a time), and every index whose gradient vanishes exactly with
unit j belongs to j: rows of q, k, v and biases by head, fused or interleaved in any order, without a list of layouts.
What a norm divides by and subtracts counts as a constant meanwhile, or every channel would depend on every other.

Legend: N indices of an axis, U units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedStructureError
from ..groups import AxisName, Branch
from ..layout import Layout, Segment
from ..shape_probe import AxisMap

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
        self._baseline: dict[AxisName, torch.Tensor] | None = None

    def owners(
        self, units: int, zero: Callable[[torch.Tensor], Any], axes: Iterable[AxisName]
    ) -> dict[AxisName, torch.Tensor]:
        """Return the owner of each index of each axis, shape (N,): a unit, NOBODY, or UNKNOWN without any gradient.

        Args:
            zero: zeroes in place what reads the units of a mask, shape (U,), bool; undone afterwards.
        """
        axes = list(axes)
        bits, codes = _codes(units)
        found = {axis: torch.zeros(self.parameters[axis[0]].shape[axis[1]], dtype=torch.long) for axis in axes}
        for bit in range(bits):
            with self._undone():
                zero((codes >> bit) & 1 == 1)
                vanished = self.vanished(axes)
            for axis, mask in vanished.items():
                found[axis] += mask.long() << bit
        dead = self._dead(axes)
        units_of = torch.full((1 << bits,), NOBODY)
        units_of[codes] = torch.arange(units)
        return {axis: torch.where(dead[axis], UNKNOWN, units_of[code]) for axis, code in found.items()}

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

    def _dead(self, axes: list[AxisName]) -> dict[AxisName, torch.Tensor]:
        if self._baseline is None:
            every = [(name, dim) for name, p in self.parameters.items() for dim in range(p.dim())]
            self._baseline = self.vanished(every)
        return {axis: self._baseline[axis] for axis in axes}

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
    def _undone(self) -> Iterator[None]:
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
    runs: list[tuple[int, int]] = []  # owner, length
    for owner in owners.tolist():
        if runs and runs[-1][0] == owner:
            runs[-1] = (owner, runs[-1][1] + 1)
        else:
            runs.append((owner, 1))
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


def discover_branches(
    probe: GradientProbe,
    axis_map: AxisMap,
    axes: Iterable[AxisName],
    units: int,
    granule: int,
    partial: bool = False,
    strided: bool = False,
) -> list[Branch]:
    """Divide the axes that a size moves into branches, each with a reader and every axis' layout.

    Args:
        units: U of the tiny model.
        granule: smallest run of indices that stays together (head_dim for heads, 1 for channels).
        partial: whether axes may be left over.
        strided: whether a reader's units are taken to lie strided, where they might as well lie in blocks.

    Raises:
        UnsupportedStructureError: naming an axis that no reader's units account for.
    """
    remaining: dict[AxisName, list[AxisName]] = {}
    for name, dim in axes:
        remaining.setdefault((axis_map.parameters[name].pattern, dim), []).append((name, dim))
    beside = _biases(probe, axis_map, remaining)
    for axis in beside:
        del remaining[axis]
    branches: list[Branch] = []
    while remaining:
        branch = _best_branch(probe, axis_map, remaining, units, granule, strided)
        if branch is None and partial and branches:
            break
        if branch is None:
            pattern, dim = next(iter(remaining))
            raise UnsupportedStructureError(f"no gradient ties {pattern} dimension {dim} to single units")
        for axis in branch.layouts:
            del remaining[axis]
        biases = {bias: branch.layouts[weight] for bias, weight in beside.items() if weight in branch.layouts}
        branches.append(Branch(branch.reader, branch.layouts | biases))
    return branches


def _biases(
    probe: GradientProbe, axis_map: AxisMap, axes: Mapping[AxisName, list[AxisName]]
) -> dict[AxisName, AxisName]:
    """Return, for each bias of a linear layer, its weight's axis: they lie alike.

    (By its gradient alone a bias of the keys can't be placed: it moves all scores of a query alike, so the softmax
    leaves it but rounding noise.)
    """
    found: dict[AxisName, AxisName] = {}
    for axis, members in axes.items():
        weight = probe.output_axis(members[0][0])
        if weight is not None and weight[0] in axis_map.parameters:
            pattern = (axis_map.parameters[weight[0]].pattern, weight[1])
            found |= {axis: pattern} if pattern in axes else {}
    return found


def _best_branch(
    probe: GradientProbe,
    axis_map: AxisMap,
    remaining: dict[AxisName, list[AxisName]],
    units: int,
    granule: int,
    strided: bool,
) -> Branch | None:
    """Try each matrix as the reader, the last of a block first; take the one that accounts for most axes."""
    best: Branch | None = None
    for reader in reversed(remaining):
        shape = axis_map.parameters[remaining[reader][0][0]].shape
        if len(shape) < 2:
            continue
        layouts = _reader_layouts(shape[reader[1]], units, granule)
        for layout in reversed(layouts) if strided else layouts:
            found = _confirmed(probe, remaining, _branch(probe, remaining, {reader: layout}, units), units)
            if len(found.layouts) > (len(best.layouts) if best else 1):
                best = found
            if best is not None and len(best.layouts) == len(remaining):
                return best
    for readers in _reader_groups(probe, axis_map, remaining, units):
        together = _branch(probe, remaining, readers, units)
        if len(together.layouts) > 1 and (best is None or _worth(together, remaining) > _worth(best, remaining)):
            best = together
    return best


def _worth(branch: Branch, remaining: Iterable[AxisName]) -> tuple[bool, int]:
    """Compare branches: what leaves nothing over of a block that it is of comes first, then what has more axes."""
    blocks = {_block_of(pattern) for pattern, _ in branch.layouts}
    complete = all(axis in branch.layouts for axis in remaining if _block_of(axis[0]) in blocks)
    return complete, len(branch.layouts)


def _block_of(pattern: str) -> str:
    """Return the part of a pattern up to the layer's own member, the whole pattern outside any layer."""
    parts = pattern.split(".")
    layer = next((index for index, part in enumerate(parts) if part.startswith("*")), len(parts))
    return ".".join(parts[: layer + 2])


def _reader_groups(
    probe: GradientProbe, axis_map: AxisMap, remaining: dict[AxisName, list[AxisName]], units: int
) -> list[dict[AxisName, Layout]]:
    """List matrices that read the same units together.

    A state-space mixer's channels feed its own projections too, and layers of several kinds may share a table (the
    position biases of T5's heads).
    """
    blocks: dict[str, dict[AxisName, Layout]] = {}
    for axis, found in remaining.items():
        info = axis_map.parameters[found[0][0]]
        linear = isinstance(probe.model.get_submodule(info.module), nn.Linear)
        if linear and axis[1] == 1 and info.shape[1] % units == 0 and info.role == "matrix":
            block = axis[0].rpartition(".")[0].rpartition(".")[0]
            layout = Layout((Segment(1, info.shape[1] // units),))
            blocks.setdefault(block, {})[axis] = layout
            stack = info.layer.rpartition(".")[0]
            blocks.setdefault(f"{stack}|{info.module.removeprefix(info.layer)}", {})[axis] = layout
    return [readers for readers in blocks.values() if len(readers) > 1]


def _confirmed(probe: GradientProbe, remaining: dict[AxisName, list[AxisName]], branch: Branch, units: int) -> Branch:
    """Read the reader's own layout, so far assumed, off the gradients where another matrix of the branch is zeroed.

    One that accounts for a part of the reader (with queries at zero, values keep their gradients) only has to agree.
    """
    assumed = branch.layouts[branch.reader]
    expected = assumed.expand(torch.arange(units), fixed_value=NOBODY)
    for other, layout in branch.layouts.items():
        if other == branch.reader or probe.parameters[remaining[other][0][0]].dim() < 2:
            continue
        back = _branch(probe, remaining, {other: layout}, units).layouts.get(branch.reader)
        if back == assumed:
            break
        if back is not None:
            seen = back.expand(torch.arange(units), fixed_value=NOBODY)
            if not bool(((seen == expected) | (seen == NOBODY)).all()):
                return Branch(branch.reader, branch.layouts | {branch.reader: back})
    return branch


def _reader_layouts(size: int, units: int, granule: int) -> list[Layout]:
    """List how a reader's units may lie: in blocks or strided."""
    per_unit, rest = divmod(size, units)
    layouts = []
    if not rest:
        layouts.append(Layout((Segment(1, per_unit),)))
        if per_unit > granule and per_unit % granule == 0:
            layouts.append(Layout((Segment(per_unit // granule, granule),)))
    return layouts


def _branch(
    probe: GradientProbe,
    remaining: dict[AxisName, list[AxisName]],
    readers: dict[AxisName, Layout],
    units: int,
) -> Branch:
    for reader, layout in readers.items():
        for name, dim in remaining[reader]:
            if probe.parameters[name].shape[dim] != layout.size(units):
                raise UnsupportedStructureError(f"{name} dimension {dim} has another length than in other layers")

    def zero(mask: torch.Tensor) -> None:
        for reader, layout in readers.items():
            for name, dim in remaining[reader]:
                parameter = probe.parameters[name]
                shape = [1] * parameter.dim()
                shape[dim] = -1
                spread = layout.expand(mask, fixed_value=False)
                parameter.masked_fill_(spread.view(shape), 0.0)
                bias = probe.bias_beside(name, dim)
                if bias is not None:
                    bias.masked_fill_(spread, 0.0)

    others = [axis for pattern, found in remaining.items() if pattern not in readers for axis in found]
    owners = probe.owners(units, zero, others)
    layouts: dict[AxisName, Layout] = dict(readers)
    unclear: dict[AxisName, list[torch.Tensor]] = {}
    for pattern, found in remaining.items():
        if pattern in readers:
            continue
        seen = [owners[axis] for axis in found]
        known = {layout_of(owner, units) for owner in seen if not bool((owner == UNKNOWN).any())}
        only = known.pop() if len(known) == 1 else None
        if only is not None and only.per_unit:
            layouts[pattern] = only
        elif not known:
            unclear[pattern] = seen
    return Branch(next(iter(readers)), layouts | _like_others(unclear, layouts, units))


def _like_others(
    unclear: dict[AxisName, list[torch.Tensor]], layouts: dict[AxisName, Layout], units: int
) -> dict[AxisName, Layout]:
    """Give axes with indices that no gradient reaches the layout of another that agrees in the rest."""
    found: dict[AxisName, Layout] = {}
    for axis, seen in unclear.items():
        module = axis[0].rpartition(".")[0]
        near = sorted(layouts, key=lambda other: other[0].rpartition(".")[0] != module)
        for other in near:
            if all(_agrees(layouts[other], owner, units) for owner in seen):
                found[axis] = layouts[other]
                break
    return found


def _agrees(layout: Layout, owners: torch.Tensor, units: int) -> bool:
    if layout.size(units) != len(owners):
        return False
    expected = layout.expand(torch.arange(units), fixed_value=NOBODY)
    return bool(((owners == expected) | (owners == UNKNOWN)).all())
