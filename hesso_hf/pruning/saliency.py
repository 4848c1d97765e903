"""Sums over the weights x and gradients g of units, from which saliencies follow (`criteria`).

Sums are accumulated over batches first and formulas applied once, so that shards and batches can simply be added.
Legend: L layers, U units per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..distributed.parts import Part, add_over_ranks, whole
from ..structures.groups import Axis, PruningGroups
from ..structures.layout import Spread

PerUnit = dict[str, torch.Tensor]  # structure -> (L, U)
ParameterAxes = list[tuple[str, int, Axis]]  # (structure, layer index, axis) of every axis of a parameter
_CHUNK, _CHUNK_OF_GPU = 1 << 22, 1 << 26  # elements of a temporary at most, whatever the size of the parameter


@dataclass
class UnitSums:
    """Running sums per unit: `sums[structure][term]` has shape (L, U); `batches` gradients went into them.

    Who adds to the sums counts the batch first: without one they are zero.
    """

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
        if not other.batches:
            return
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
        found = [value.isfinite().all() for terms in self.sums.values() for value in terms.values()]
        return bool(torch.stack(found).all())

    def zero_(self) -> None:
        """Forget all batches, in place; without any, all is zero already."""
        if not self.batches:
            return
        for terms in self.sums.values():
            for value in terms.values():
                value.zero_()
        self.batches = 0


class OnTrial:
    """The units on CRIC's way to zero, spread over their axes.

    Attributes:
        units: the masks, bool.
        left: what is left of each unit, 1 of the others, to the powers of x in a term.

    Args:
        units: bool (L, U) per structure.
        scale: what is left of them.
    """

    def __init__(self, units: Mapping[str, torch.Tensor], scale: float) -> None:
        self.units = Spread(units, False)
        self.left = {power: Spread(marked(units, scale**power), 1.0) for power in (1, 2)}


class PathDisplacements:
    """What removing a unit moves one parameter by, at a point on CRIC's way to zero.

    For a unit on trial it is the whole way, its weights at the snapshot, and not what is left of them: the mean of
    -<w, gradient at s w> over s estimates f(0) - f(w) (integrated gradients). Where two units on trial share an
    element, each takes it as the other leaves it, so that all scores add up to the joint rise of the loss.

    Args:
        origin: the parameter at the snapshot, or this process' part of it, on any device.
        axes: of the parameter.
        trial: the units on trial, and what is left of them.
        part: which part of the parameter it is.
    """

    def __init__(self, origin: torch.Tensor, axes: ParameterAxes, trial: OnTrial, part: Part) -> None:
        self._origin, self._shift = origin, axes[0][2].shift
        self._dims = [axis.dim for _, _, axis in axes]

        def all_along(spread: Spread) -> list[torch.Tensor]:
            return [
                part.along(spread.along(structure, layer, axis.layout), axis.dim) for structure, layer, axis in axes
            ]

        self._masks = all_along(trial.units)
        self._factors = {power: all_along(left) for power, left in trial.left.items()}

    def rows(self, start: int, weights: torch.Tensor) -> torch.Tensor:
        """Return the rows `start` and on at the snapshot."""
        # pinned memory is copied while the GPU works; converted on the host it would be another memory
        origin = self._origin[start : start + weights.shape[0]].to(weights.device, non_blocking=True).float()
        return origin + self._shift if self._shift else origin

    def left(self, index: int, power: int) -> dict[int, torch.Tensor]:
        """Return, per dimension, what the other axes' units on trial leave of each index, to the given power.

        Args:
            index: position in the parameter's list of axes.
        """
        found: dict[int, torch.Tensor] = {}
        for other, (dim, factor) in enumerate(zip(self._dims, self._factors[power], strict=True)):
            if other != index:
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
_Sums = dict[tuple[int, str], list[torch.Tensor]]  # per axis' position and term, of some rows after the others
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
        along = part.spread_out(along, axis.dim)
        if axis.layout.per_unit > 1 or axis.layout.owned:
            along = along.to(into.dtype)
        into += axis.layout.collect(along, into.shape[0])


def _sums_along(
    terms: list[str],
    parameter: torch.Tensor,
    gradient: torch.Tensor | None,
    axes: ParameterAxes,
    chunk: int,
    displacements: PathDisplacements | None,
) -> dict[tuple[int, str], torch.Tensor]:
    """Return each term per index of each axis, by the axis' position and the term."""
    present, displaced = _Sums(), _Sums()
    left = {(n, p): displacements.left(n, p) for n in range(len(axes)) for p in (1, 2)} if displacements else {}
    rows = chunk_rows(parameter, chunk)
    for start in range(0, parameter.shape[0], rows):
        weights = parameter[start : start + rows].float()
        if axes[0][2].shift:
            weights = weights + axes[0][2].shift
        slope = None if gradient is None else gradient[start : start + rows].float()
        for term, values in _elementwise(terms, weights, slope).items():
            for index, (_, _, axis) in enumerate(axes):
                present.setdefault((index, term), []).append(sum_but(values, axis.dim))
        if displacements is None:
            continue
        moving = [term for term in terms if _POWERS[term]]
        for term, values in _elementwise(moving, displacements.rows(start, weights), slope).items():
            for index, (_, _, axis) in enumerate(axes):
                factors = left[index, _POWERS[term]]
                if 0 in factors:
                    factors = {**factors, 0: factors[0][start : start + rows]}
                displaced.setdefault((index, term), []).append(sum_but(values, axis.dim, factors))
    found = {(index, term): _joined(sums, axes[index][2].dim) for (index, term), sums in present.items()}
    for (index, term), sums in displaced.items():
        assert displacements is not None
        joined = _joined(sums, axes[index][2].dim)
        found[index, term] = displacements.replace(found[index, term], joined, index, _POWERS[term])
    return found


def _joined(sums: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Join the sums of some rows after the others."""
    if len(sums) == 1:
        return sums[0]
    if dim == 0:
        return torch.cat(sums)
    return torch.stack(sums).to(float_sums(sums[0].device)).sum(0)


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


def marked(units: Mapping[str, torch.Tensor], value: float) -> PerUnit:
    """Return a value for marked units and 1 for the others, (L, U) per structure."""
    return {name: torch.ones_like(m, dtype=torch.float32).masked_fill_(m, value) for name, m in units.items()}


def no_units(shapes: Mapping[str, tuple[int, int]], device: torch.device) -> PerUnit:
    """Return masks that mark no unit, bool (L, U) per structure."""
    return {name: torch.zeros(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}


def chunk_size(elements: int, device: torch.device) -> int:
    """Return how many elements of a model's so many to work on at a time.

    Temporaries stay below a thousandth of the model's; on a GPU, where every launch costs, below a 32nd, so that most
    matrices are taken whole.
    """
    if device.type == "cuda":
        return min(_CHUNK_OF_GPU, max(_CHUNK, elements >> 5))
    return max(1 << 14, min(_CHUNK, elements >> 10))


def chunk_rows(parameter: torch.Tensor, chunk: int) -> int:
    """Return how many rows of a parameter hold about `chunk` elements, one at least."""
    return max(1, chunk * parameter.shape[0] // max(1, parameter.numel()))
