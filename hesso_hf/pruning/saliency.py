"""Sums over the weights x and gradients g of units, from which saliencies follow (`criteria`).

Sums are accumulated over batches first and formulas applied once, so that shards and batches can simply be added.
Legend: L layers, U units a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..distributed.parts import Part, add_over_ranks, whole
from ..structures.groups import Axis, PruningGroups

PerUnit = dict[str, torch.Tensor]  # structure -> (L, U)
ParameterAxes = list[tuple[str, int, Axis]]  # (structure, layer index, axis) of every axis of a parameter
_CHUNK = 1 << 22  # elements of a temporary at most, whatever the size of the parameter


@dataclass
class UnitSums:
    """Running sums per unit: `sums[structure][term]` has shape (L, U); `batches` gradients went into them."""

    sums: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    batches: int = 0

    @classmethod
    def zeros(cls, groups: PruningGroups, terms: tuple[str, ...], device: torch.device) -> UnitSums:
        """Start with no batch."""
        options: dict[str, Any] = {"dtype": float_sums(device), "device": device}
        return cls(
            {
                name: {term: torch.zeros(len(g.layers), g.num_units, **options) for term in terms}
                for name, g in groups.structures.items()
            }
        )

    def add_(self, other: UnitSums) -> None:
        """Add another set of sums, in place."""
        for name, terms in other.sums.items():
            for term, value in terms.items():
                self.sums[name][term] += value
        self.batches += other.batches

    def over_ranks(self) -> UnitSums:
        """Return the sums of all processes, each of which holds other parts, in one all-reduce."""
        added = iter(add_over_ranks([value for terms in self.sums.values() for value in terms.values()]))
        return UnitSums(
            {name: {term: next(added) for term in terms} for name, terms in self.sums.items()}, self.batches
        )

    def are_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(value.isfinite().all()) for terms in self.sums.values() for value in terms.values())

    def zero_(self) -> None:
        """Forget all batches, in place."""
        for terms in self.sums.values():
            for value in terms.values():
                value.zero_()
        self.batches = 0


class PathDisplacements:
    """What removing a unit moves one parameter by, at a point on CRIC's way to zero.

    For a unit on trial it is the whole way, its weights at the snapshot, and not what is left of them: the mean of
    -<w, gradient at s w> over s estimates f(0) - f(w) (integrated gradients). Where two units on trial share an
    element, each takes it as the other leaves it, so that all scores add up to the joint rise of the loss.

    Args:
        origin: the parameter at the snapshot, or this process' part of it, on any device.
        shrinking: the units on trial, bool (L, U) per structure.
        scale: what is left of them.
        part: which part of the parameter it is.
    """

    def __init__(
        self,
        origin: torch.Tensor,
        axes: ParameterAxes,
        shrinking: Mapping[str, torch.Tensor],
        scale: float,
        part: Part,
    ) -> None:
        self._origin, self._shift, self._scale = origin, axes[0][2].shift, scale
        self._dims = [axis.dim for _, _, axis in axes]
        self._masks = [
            part.along(axis.layout.expand(shrinking[name][layer], fixed_value=False), axis.dim)
            for name, layer, axis in axes
        ]

    def rows(self, start: int, weights: torch.Tensor) -> torch.Tensor:
        """Return the rows `start` and on at the snapshot."""
        origin = self._origin[start : start + weights.shape[0]].to(weights.device, torch.float32)
        return origin + self._shift if self._shift else origin

    def left(self, index: int, power: int) -> dict[int, torch.Tensor]:
        """Return, per dimension, what the other axes' units on trial leave of each index, to the given power.

        Args:
            index: position in the parameter's list of axes.
        """
        found: dict[int, torch.Tensor] = {}
        for other, (dim, mask) in enumerate(zip(self._dims, self._masks, strict=True)):
            if other != index:
                factor = torch.where(mask, self._scale**power, 1.0)
                found[dim] = found[dim] * factor if dim in found else factor
        return found

    def replace(self, sums: torch.Tensor, displaced: torch.Tensor, index: int, power: int) -> torch.Tensor:
        """Return the sums along one axis, with those of units on trial as the other axes' units leave them.

        Args:
            sums: per index of the axis, over the weights as they stand.
            displaced: per index, over what `rows` returned times what `left` leaves of the other dimensions.
        """
        dim = self._dims[index]
        along = self.left(index, power).get(dim)  # what other axes along the same dimension leave
        return torch.where(self._masks[index], displaced if along is None else displaced * along, sums)


Displaced = Callable[[str, ParameterAxes, Part, int], PathDisplacements]  # of a parameter's n-th part
_POWERS = {"x2": 2, "xg": 1, "xg2": 2, "g2": 0}  # of x in a term


@torch.no_grad()
def accumulate_(
    sums: UnitSums,
    parameter: torch.Tensor,
    gradient: torch.Tensor | None,
    axes: ParameterAxes,
    chunk: int | None = None,
    displacements: PathDisplacements | None = None,
    part: Part | None = None,
) -> None:
    """Add one parameter's contribution to its units' sums.

    Args:
        parameter: the weights, or what this process holds of them; where the model adds a constant to them, so does
            this (`Axis.shift`).
        gradient: its gradient; None (a frozen weight) contributes to x^2 only.
        chunk: elements that are worked on at a time.
        displacements: what stands for x; by default the weights.
        part: which part of the whole parameter the weights are; all of it by default.
    """
    if not parameter.numel():
        return
    part = part or whole(parameter.shape)
    terms = [term for term in next(iter(sums.sums.values())) if gradient is not None or term == "x2"]
    found = _sums_along(terms, parameter, gradient, axes, chunk or _CHUNK, displacements)
    for (index, term), along in found.items():
        structure, layer, axis = axes[index]
        into = sums.sums[structure][term][layer]
        into += axis.layout.collect(part.spread_out(along, axis.dim), into.shape[0])


def _sums_along(
    terms: list[str],
    parameter: torch.Tensor,
    gradient: torch.Tensor | None,
    axes: ParameterAxes,
    chunk: int,
    displacements: PathDisplacements | None,
) -> dict[tuple[int, str], torch.Tensor]:
    """Return each term per index of each axis, by the axis' position and the term."""
    present: dict[tuple[int, str], torch.Tensor] = {}
    displaced: dict[tuple[int, str], torch.Tensor] = {}
    left = {(n, p): displacements.left(n, p) for n in range(len(axes)) for p in (1, 2)} if displacements else {}
    rows = chunk_rows(parameter, chunk)
    for start in range(0, parameter.shape[0], rows):
        weights = parameter[start : start + rows].float()
        if axes[0][2].shift:
            weights = weights + axes[0][2].shift
        slope = None if gradient is None else gradient[start : start + rows].float()
        for term, values in _elementwise(terms, weights, slope).items():
            for index, (_, _, axis) in enumerate(axes):
                _add(present, (index, term), sum_but(values, axis.dim), axis.dim)
        if displacements is None:
            continue
        moving = [term for term in terms if _POWERS[term]]
        for term, values in _elementwise(moving, displacements.rows(start, weights), slope).items():
            for index, (_, _, axis) in enumerate(axes):
                factors = left[index, _POWERS[term]]
                if 0 in factors:
                    factors = {**factors, 0: factors[0][start : start + rows]}
                _add(displaced, (index, term), sum_but(values, axis.dim, factors), axis.dim)
    for (index, term), values in displaced.items():
        assert displacements is not None
        present[index, term] = displacements.replace(present[index, term], values, index, _POWERS[term])
    return present


def _add(found: dict[tuple[int, str], torch.Tensor], key: tuple[int, str], sums: torch.Tensor, dim: int) -> None:
    """Join the sums of further rows to those of the rows before."""
    sums = sums.to(float_sums(sums.device))
    if key not in found:
        found[key] = sums
    else:
        found[key] = torch.cat([found[key], sums]) if dim == 0 else found[key] + sums


def _elementwise(terms: Iterable[str], weights: torch.Tensor, gradient: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {"x2": weights.square()} if "x2" in terms else {}
    if gradient is None:
        return found
    product = weights * gradient
    values = {"xg": lambda: product, "xg2": product.square, "g2": gradient.square}
    return found | {term: value() for term, value in values.items() if term in terms}


def sum_but(values: torch.Tensor, dim: int, factors: Mapping[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Add up over all dimensions but one, shape (length of that one,), each index times its factor.

    Args:
        factors: per dimension, shape (its length,); 1 where there is none.
    """
    for other in reversed(range(values.dim())):
        if factors and other in factors and other != dim:
            values = torch.tensordot(values, factors[other].to(values.dtype), dims=([other], [0])).unsqueeze(other)
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(others) if others else values


def float_sums(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are kept in on a device: mps has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return tensors, and mappings of them, on a device; what is kept in float64 in what `float_sums` says."""

    def moved(value: torch.Tensor) -> torch.Tensor:
        return value.to(device, float_sums(device) if value.dtype == torch.float64 else value.dtype)

    return {n: on_device(v, device) if isinstance(v, Mapping) else moved(v) for n, v in values.items()}


def no_units(shapes: Mapping[str, tuple[int, int]], device: torch.device) -> PerUnit:
    """Return masks that mark no unit, bool (L, U) per structure."""
    return {name: torch.zeros(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}


def chunk_size(elements: int) -> int:
    """Return how many elements to work on at a time: temporaries stay below a thousandth of the model's."""
    return max(1 << 14, min(_CHUNK, elements >> 10))


def chunk_rows(parameter: torch.Tensor, chunk: int) -> int:
    """Return how many rows of a parameter hold about `chunk` elements, one at least."""
    return max(1, chunk * parameter.shape[0] // max(1, parameter.numel()))
