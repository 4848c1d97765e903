"""Groups: for each unit of a structure, the slices of all tensors that belong to it (zero-invariant groups).

Legend: L layers, U units per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..distributed.parts import Part
from ..errors import HessoError, UnsupportedStructureError
from .layout import Layout

COUPLED = ("attention_heads", "embedding_channels")  # where head_dim follows from both
MOST_OF_A_REASON = 300  # characters of it in a message
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

    def lay(self, along: torch.Tensor, ndim: int, part: Part | None = None) -> torch.Tensor:
        """Turn one value per index of the whole axis into what broadcasts over the parameter or a part of it."""
        shape = [1] * ndim
        shape[self.dim] = -1
        return (part.along(along, self.dim) if part is not None else along).view(shape)

    def spread(self, values: torch.Tensor, ndim: int, fixed_value: float = 1.0) -> torch.Tensor:
        """Turn one value per unit, shape (U,), into a factor that broadcasts over the parameter."""
        return self.lay(self.layout.expand(values, fixed_value), ndim)

    @torch.no_grad()
    def mask_(self, tensor: torch.Tensor, pruned: torch.Tensor, fill: float | None = None) -> None:
        """Set pruned units' slices to what stands for zero, in place, even where they hold NaN.

        Args:
            tensor: the parameter's data.
            pruned: shape (U,), bool.
            fill: the value; by default -shift, so that the effective weight is zero.
        """
        along = self.layout.expand(pruned.to(tensor.device), fixed_value=False)
        tensor.masked_fill_(self.lay(along, tensor.dim()), -self.shift if fill is None else fill)

    @torch.no_grad()
    def centre_(
        self,
        tensor: torch.Tensor,
        portions: torch.Tensor,
        part: Part | None = None,
        total: torch.Tensor | None = None,
    ) -> None:
        """Take the mean out of what is written to the residual stream, in place, each channel its portion of it.

        A norm that subtracts the mean over all channels doesn't see it while all scales are 1; when pruned channels are
        at zero the kept ones have mean zero among themselves.

        Args:
            tensor: the parameter's data, or what this process holds of it.
            part: which part `tensor` is; all of it by default.
            portions: per index of the whole axis, in the tensor's dtype (`portions_of`).
            total: sum over the channels of all parts, where `tensor` holds some of them.
        """
        total = tensor.sum(self.dim, keepdim=True) if total is None else total.to(tensor.device, tensor.dtype)
        tensor.addcmul_(self.lay(portions, tensor.dim(), part), total, value=-1)


def portions_of(scales: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """Return what share of the sum over all channels each gives when `share` of the mean is taken out of a stream.

    Args:
        scales: shape (..., U), 1 kept to 0 pruned.
    """
    return scales * (share / scales.sum(-1, keepdim=True))


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
        """Check that each layer keeps equally many units in every pool; `layers` holds each one's kept indices.

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
        model_class: the model's, where it is known.
    """

    structures: dict[str, StructureGroups]
    refused: dict[str, str] = field(default_factory=dict)
    coupled: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    picky: bool = False
    model_class: type[PreTrainedModel] | None = None

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
        chosen = {name: groups for name, groups in self.structures.items() if name in names}
        if (missing and explicit) or not chosen:
            reasons = "; ".join(self.why_whole(missing))
            instead = f"can be pruned instead: {list(self.structures)}" if self.structures else "nothing else can be"
            raise UnsupportedStructureError(f"`structures` ({names}): {reasons}; {instead}")
        apart = [name for name in self.coupled if name not in chosen]
        if apart and len(apart) < len(self.coupled):
            raise UnsupportedStructureError(
                f"`structures` ({names}) leaves out {apart}: in this architecture {list(self.coupled)} only shrink "
                "together (one's size follows from the others'); name all of them, or none"
            )
        return replace(self, structures=chosen, coupled={} if apart else self.coupled)

    @property
    def owner(self) -> str:
        """Whose structures these are, for messages."""
        return self.model_class.__name__ if self.model_class is not None else "this model"

    def why_whole(self, names: Iterable[str]) -> list[str]:
        """Say of structures that nothing of them is pruned and why, in short: one sentence for each reason."""
        said = []
        for reason, alike in by_reason({name: self.why(name) for name in names}).items():
            units, short = ", ".join(alike).replace("_", " "), " ".join(reason.split())
            if len(short) > MOST_OF_A_REASON:
                short = f"{short[:MOST_OF_A_REASON]}..."
            if alike[0] in self.absent:
                said.append(f"{self.owner} has no {units} that could be pruned (reason: {short})")
            else:
                said.append(
                    f"{units} of {self.owner} stay whole, since taking some out wouldn't be exact (reason: {short})"
                )
        return said

    def why(self, name: str) -> str:
        """Return the reason why a structure isn't pruned."""
        return (self.absent | self.refused).get(name, "it wasn't tried")

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


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that have each reason, given the reason of each name."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


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
        num_units: units per layer of the tiny model, which the branches' layouts are of.
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

    @property
    def all_stay(self) -> bool:
        """Whether nothing is cut."""
        return all(len(layer) == self.num_units[name] for name, layers in self.kept.items() for layer in layers)

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
