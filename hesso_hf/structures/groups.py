"""Groups: for each unit of a structure, the slices of all tensors that belong to it (zero-invariant groups).

Legend: L layers, U units a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from ..distributed.parts import Part
from ..errors import HessoError, NotApplicableError, UnsupportedStructureError
from ..hf_models.sizes import HEADS, HIDDEN
from .layout import Layout
from .shape_probe import AxisMap
from .units import HEAD_UNITS, num_pools, num_units, unit_increments

COUPLED = ("attention_heads", "embedding_channels")  # where head_dim follows from both
AxisName = tuple[str, int]  # a parameter, or the pattern of its name, and a dimension of it


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter along which the units of a structure lie.

    Attributes:
        shift: what the model adds to the stored value: 1 for norm weights stored as w and used as 1 + w.
        power: the stored value takes c**power, c = sqrt(kept / all units), when units are removed (exact fold).
        centred: it writes to a stream that norms subtract the mean of, so what it writes is kept at mean zero.
    """

    parameter: str
    dim: int
    layout: Layout
    shift: float = 0.0
    power: int = 0
    centred: bool = False

    def spread(
        self, values: torch.Tensor, ndim: int, fixed_value: float = 1.0, part: Part | None = None
    ) -> torch.Tensor:
        """Turn one value per unit, shape (U,), into a factor that broadcasts over the parameter or a part of it."""
        shape = [1] * ndim
        shape[self.dim] = -1
        along = self.layout.expand(values, fixed_value)
        return (part.along(along, self.dim) if part is not None else along).view(shape)


@dataclass(frozen=True)
class StructureGroups:
    """All groups of one structure: `axes[layer]` are the axes that the U units of that layer share.

    Attributes:
        pools: consecutive runs into which a layer's units are split, each of which keeps equally many: for query heads
            those of one key-value head each, for experts those of one routing group, else 1.
        least: units that a layer keeps at least, and `needed_for` what.
        buffers: axes of buffers, per layer; these are cut with the units, and never shrunk.
        stack: where the units are whole layers, the module list that these are the members of.
    """

    structure: str
    increments: dict[str, int]
    num_units: int
    layers: tuple[str, ...]
    axes: tuple[tuple[Axis, ...], ...]
    pools: int = 1
    least: int = 1
    needed_for: str = ""
    buffers: tuple[tuple[Axis, ...], ...] = ()
    stack: str = ""

    @property
    def pool_size(self) -> int:
        """Number of units of one pool of the full model."""
        return self.num_units // self.pools

    def all_axes(self) -> Iterable[tuple[int, Axis]]:
        """Yield (layer index, axis)."""
        for index, axes in enumerate(self.axes):
            for axis in axes:
                yield index, axis

    def config_sizes(self, kept: int) -> dict[str, int]:
        """Return the config sizes of a model that keeps `kept` units in every layer."""
        return {name: increment * kept for name, increment in self.increments.items()}

    def check_pools(self, layers: Iterable[Iterable[int]]) -> None:
        """Check that each layer keeps equally many units in every pool.

        Args:
            layers: indices of the kept units, per layer.

        Raises:
            HessoError: naming the first layer where it doesn't, with the numbers.
        """
        for layer, units in zip(self.layers, layers, strict=True):
            counts = [0] * self.pools
            for unit in units:
                counts[unit // self.pool_size] += 1
            if len(set(counts)) > 1:
                raise HessoError(
                    f"{self.structure} of {layer or 'the model'}: the {self.pools} runs of {self.pool_size} units keep "
                    f"{counts}, but all must keep equally many"
                )

    def elements_per_unit(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of elements that one unit of the first layer owns."""
        total = 0
        for axis in self.axes[0]:
            across = math.prod(shapes[axis.parameter]) // shapes[axis.parameter][axis.dim]
            total += across * (axis.layout.per_unit * self.num_units + axis.layout.owned)
        return total // self.num_units


@dataclass(frozen=True)
class PruningGroups:
    """The proved structures of a model and, for the others, why not.

    Attributes:
        absent: structures that this architecture doesn't have, with the config size that is missing or unused.
        coupled: structures that only shrink together (head_dim is hidden_size / num_attention_heads, or a mixer's
            channels are twice the width), with how many units of each go with one of the coarsest, the driver; empty
            where all are independent.
        picky: whether the model class refuses sizes that its config class accepts.
    """

    structures: dict[str, StructureGroups]
    refused: dict[str, str] = field(default_factory=dict)
    coupled: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    picky: bool = False

    def by_parameter(self) -> dict[str, list[tuple[str, int, Axis]]]:
        """Return, per parameter, (structure, layer index, axis) of each of its axes."""
        found: dict[str, list[tuple[str, int, Axis]]] = {}
        for name, structure in self.structures.items():
            for layer, axis in structure.all_axes():
                found.setdefault(axis.parameter, []).append((name, layer, axis))
        return found

    def select(self, names: Iterable[str], explicit: bool) -> PruningGroups:
        """Return only the named structures.

        Raises:
            UnsupportedStructureError: where one that was asked for explicitly is refused, or none is left.
        """
        names = list(names)
        missing = [name for name in names if name not in self.structures]
        if missing and explicit:
            known = self.absent | self.refused
            reasons = "; ".join(f"{name}: {known.get(name, 'unknown')}" for name in missing)
            proved = list(self.structures)
            raise UnsupportedStructureError(f"`structures` asks for what can't be pruned: {reasons}. Proved: {proved}")
        chosen = {name: groups for name, groups in self.structures.items() if name in names}
        if not chosen:
            raise UnsupportedStructureError(f"no structure of this model can be pruned: {self.refused}")
        apart = [name for name in self.coupled if name not in chosen]
        if apart and len(apart) < len(self.coupled):
            raise UnsupportedStructureError(
                f"`structures` ({names}) leaves out {apart}: in this architecture {list(self.coupled)} only shrink "
                "together (one's size follows from the others'); name all of them, or none"
            )
        return replace(self, structures=chosen, coupled={} if apart else self.coupled)

    def with_coupled(self, counts: Mapping[str, Any]) -> dict[str, Any]:
        """Return kept units of independent structures with those that follow from them."""
        if self.driver not in counts:
            return dict(counts)
        found = {**counts, **{name: counts[self.driver] * ratio for name, ratio in self.coupled.items()}}
        return {name: found[name] for name in self.structures if name in found}

    @property
    def independent(self) -> tuple[str, ...]:
        """Structures whose number of units can be chosen; those of the others follow."""
        return tuple(name for name in self.structures if name not in self.coupled or name == self.driver)

    @property
    def driver(self) -> str:
        """The coupled structure whose number of units decides over the others', "" where nothing is coupled."""
        return min(self.coupled, key=lambda name: self.coupled[name], default="")


@dataclass(frozen=True)
class Branch:
    """Axes of one kind of block that share units: those of an MLP, of an attention.

    Attributes:
        reader: pattern and dimension of the weight that reads the units.
        layouts: pattern and dimension to layout, the reader's too, at the tiny model's sizes.
    """

    reader: AxisName
    layouts: dict[AxisName, Layout]


@dataclass(frozen=True)
class Scheme:
    """What the proof settles for one structure, by parameter pattern: valid for every size of the architecture.

    Attributes:
        num_units: units a layer of the tiny model, which the branches' layouts are of.
        shifts: pattern to what the model adds to the stored value.
        powers: pattern to the power of c.
        centred: patterns of what writes to a stream of mean zero.
        shared: whether the units are the same in all layers, since layers read each other's keys and values.
        granule: head_dim of the tiny model for heads whose size follows the width, else 1.
        per_channel: units for each embedding channel, where their number follows the width (an MLP of 4 * width).
        bundle: how many of the smallest changes of the config sizes a unit is: 2 where heads work in pairs.
    """

    branches: tuple[Branch, ...]
    num_units: int
    shifts: dict[str, float] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)
    centred: frozenset[str] = frozenset()
    shared: bool = False
    granule: int = 1
    per_channel: int = 0
    bundle: int = 1


@dataclass(frozen=True)
class KeptUnits:
    """The decision: per structure one sorted tuple of kept unit indices per layer."""

    num_units: dict[str, int]
    kept: dict[str, tuple[tuple[int, ...], ...]]

    @classmethod
    def of(cls, masks: Mapping[str, torch.Tensor]) -> KeptUnits:
        """Take the decision from masks, bool (L, U) per structure."""
        kept = {
            name: tuple(tuple(layer.nonzero().flatten().tolist()) for layer in m.cpu()) for name, m in masks.items()
        }
        return cls({name: mask.shape[1] for name, mask in masks.items()}, kept)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            name: {"num_units": self.num_units[name], "kept": [list(layer) for layer in layers]}
            for name, layers in self.kept.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KeptUnits:
        """Read what `to_dict` wrote."""
        return cls(
            {name: int(value["num_units"]) for name, value in values.items()},
            {name: tuple(tuple(map(int, layer)) for layer in value["kept"]) for name, value in values.items()},
        )


def moving_axes(structure: str, axis_map: AxisMap) -> list[AxisName]:
    """List the axes that a structure's config sizes move.

    Raises:
        UnsupportedStructureError: where the sizes can't be changed, or no parameter depends on them.
    """
    increments = unit_increments(structure, axis_map.sizes)
    for size in increments:
        if size in axis_map.failed:
            raise UnsupportedStructureError(f"`{size}` can't be changed in the model code: {axis_map.failed[size]}")
    moving = axis_map.moving(tuple(increments))
    if not moving:
        raise NotApplicableError(f"no parameter's shape depends on `{next(iter(increments))}`")
    return list(moving)


def build_groups(structure: str, axis_map: AxisMap, scheme: Scheme) -> StructureGroups:
    """Apply a proved scheme to a model of any size of the same architecture.

    Raises:
        UnsupportedStructureError: where the model has an axis that the proof never saw or whose length doesn't fit.
    """
    sizes = axis_map.sizes
    smallest = {} if scheme.per_channel else unit_increments(structure, sizes)
    increments = {size: increment * scheme.bundle for size, increment in smallest.items()}
    units = num_units(structure, sizes) if increments else scheme.per_channel * (sizes.get(HIDDEN) or 0)
    units, rest = divmod(units, scheme.bundle)
    if rest:
        raise UnsupportedStructureError(f"its units are {scheme.bundle} of {smallest} each, and {rest} would be left")
    known = {axis: (branch, layout) for branch in scheme.branches for axis, layout in branch.layouts.items()}
    by_layer: dict[tuple[str, AxisName], list[Axis]] = {}
    for info in axis_map.parameters.values():
        for dim, size in enumerate(info.shape):
            if (info.pattern, dim) not in known:
                continue
            branch, template = known[info.pattern, dim]
            per_unit = _per_unit((info.name, dim), template, axis_map, increments, scheme)
            layout = template.fitted(scheme.num_units, units, size, per_unit, structure not in HEAD_UNITS)
            if layout is None:
                raise UnsupportedStructureError(f"{info.name} dimension {dim} ({size}) doesn't divide as in the proof")
            shift, power = scheme.shifts.get(info.pattern, 0.0), scheme.powers.get(info.pattern, 0)
            axis = Axis(info.name, dim, layout, shift, power, info.pattern in scheme.centred)
            alone = structure == "embedding_channels" or scheme.shared
            by_layer.setdefault(("" if alone else info.layer, branch.reader), []).append(axis)
    axes = tuple(tuple(axes) for axes in by_layer.values())
    return StructureGroups(structure, increments, units, _labels(list(by_layer)), axes, num_pools(structure, sizes))


def check_covered(structures: Mapping[str, StructureGroups], axis_map: AxisMap) -> None:
    """Compare the groups of structures that shrink together, or of one, with the axes that their sizes move.

    Raises:
        UnsupportedStructureError: naming an axis that would shrink and that no group knows.
    """
    covered = {(axis.parameter, axis.dim) for groups in structures.values() for _, axis in groups.all_axes()}
    for structure, groups in structures.items():
        if not groups.increments:  # its size follows from another's
            continue
        coupled = axis_map.coupling is not None and structure in COUPLED
        for name, dim in axis_map.moving((HIDDEN,)) if coupled else moving_axes(structure, axis_map):
            if (name, dim) not in covered:
                raise UnsupportedStructureError(f"{name} dimension {dim} isn't covered by the proof")


def _per_unit(axis: AxisName, template: Layout, axis_map: AxisMap, increments: dict[str, int], scheme: Scheme) -> int:
    """Return how many of an axis' indices one unit owns in this model."""
    follows_width = axis_map.coupling is not None and {HEADS, HIDDEN} & increments.keys()
    if follows_width or scheme.per_channel:
        granule = axis_map.coupling.head_dim if axis_map.coupling and HEADS in increments else 1
        return template.per_unit * granule // scheme.granule
    slopes = axis_map.slopes.get(axis, {})
    per_unit = sum((slopes.get(size, 0) * increment for size, increment in increments.items()), Fraction(0))
    if per_unit.denominator > 1:
        raise UnsupportedStructureError(f"{axis[0]} dimension {axis[1]} grows by {per_unit} with a unit")
    return int(per_unit)


def coupled_units(
    structures: dict[str, StructureGroups], axis_map: AxisMap, schemes: dict[str, Scheme]
) -> dict[str, int]:
    """Return how many units of each coupled structure go with one of the coarsest; empty where nothing is coupled."""
    names = needing_others(axis_map, schemes)
    if not names or not names <= structures.keys():
        return {}
    fewest = min(structures[name].num_units for name in names)
    return {name: structures[name].num_units // fewest for name in structures if name in names}


def needing_others(axis_map: AxisMap, schemes: dict[str, Scheme]) -> set[str]:
    """Return the structures that only shrink together with others."""
    followers = {name for name, scheme in schemes.items() if scheme.per_channel}
    if axis_map.coupling is not None:
        return followers | set(COUPLED)
    return followers | {"embedding_channels"} if followers else set()


def _labels(keys: list[tuple[str, AxisName]]) -> tuple[str, ...]:
    """Name each layer's units by the layer, or by the module that reads them where a layer has several kinds."""
    layers = [layer for layer, _ in keys]
    labels = []
    for layer, (pattern, _) in keys:
        if layers.count(layer) == 1:
            labels.append(layer)
        else:
            tail = ".".join(pattern.removesuffix(".weight").split(".")[layer.count(".") + 1 :])
            labels.append(f"{layer}.{tail}" if layer else pattern.removesuffix(".weight"))
    return tuple(labels)


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
