"""Branches: a structure's axes divided into units that read and feed each other, in one of several ways.

Divisions are tried the finest first. Mostly a unit is the smallest change of the config sizes: one key-value head with
its queries, one channel. Heads that work in pairs only go in pairs, an MLP size may count gates and ups, and heads may
lie in runs that stay equally long.
Legend: U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import HessoError, UnsupportedStructureError
from ...hf_models.sizes import ConfigSizes
from ..build import num_units
from ..groups import Axis, AxisName, Branch
from ..layout import Layout, Segment, block_layout
from ..shape_probe import AxisMap
from .ownership import NOBODY, UNKNOWN, GradientProbe, layout_of

_BUNDLES = (1, 2, 4)


@dataclass(frozen=True)
class Division:
    """How axes are divided into units.

    Attributes:
        bundle: how many of the smallest changes of the config sizes a unit is.
        strided: whether the units are taken to lie strided where they might as well lie in blocks.
    """

    bundle: int = 1
    strided: bool = False


def divisions(structure: str, sizes: ConfigSizes) -> list[Division]:
    """List the divisions to try; with bundles only those that leave two units at least."""
    if structure not in ("attention_heads", "mlp_channels"):
        return [Division()]
    try:
        units = num_units(structure, sizes)
    except HessoError:  # the proof says why
        return [Division()]
    bundles = [bundle for bundle in _BUNDLES if bundle == 1 or (units % bundle == 0 and units // bundle > 1)]
    return [Division(bundle, strided) for bundle in bundles for strided in (False, True)]


def discover_branches(
    probe: GradientProbe,
    axis_map: AxisMap,
    axes: Iterable[AxisName],
    units: int,
    granule: int,
    leaves_some: bool = False,
    strided: bool = False,
) -> list[Branch]:
    """Divide the axes that a size moves into branches, each with a reader and every axis' layout.

    Args:
        units: U of the tiny model.
        granule: smallest run of indices that stays together (head_dim for heads, 1 for channels).
        leaves_some: whether axes may be left over.
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
    search = Search(probe, axis_map, remaining, units)
    branches: list[Branch] = []
    while remaining:
        branch = search.best(granule, strided)
        if branch is None and leaves_some and branches:
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


@dataclass(frozen=True)
class Search:
    """Looks for the next branch.

    Attributes:
        remaining: pattern and dimension to the axes that it stands for, of all that no branch has yet.
        units: U of the tiny model.
    """

    probe: GradientProbe
    axis_map: AxisMap
    remaining: dict[AxisName, list[AxisName]]
    units: int

    def best(self, granule: int, strided: bool) -> Branch | None:
        """Try each matrix as the reader, the last of a block first; take the one that accounts for most axes."""
        best: Branch | None = None
        for reader, axes in reversed(self.remaining.items()):
            shape = self.axis_map.parameters[axes[0][0]].shape
            if len(shape) < 2:
                continue
            layouts = _reader_layouts(shape[reader[1]], self.units, granule)
            for layout in reversed(layouts) if strided else layouts:
                found = self.confirmed(self._branch({reader: layout}))
                if len(found.layouts) > (len(best.layouts) if best else 1):
                    best = found
                if best is not None and len(best.layouts) == len(self.remaining):
                    return best
        for readers in self._reader_groups():
            together = self._branch(readers)
            if len(together.layouts) > 1 and (best is None or self._worth(together) > self._worth(best)):
                best = together
        return best

    def _worth(self, branch: Branch) -> tuple[bool, int]:
        """Compare branches: what leaves nothing over of a block that it is of comes first, then what has more axes."""
        blocks = {_block_of(pattern) for pattern, _ in branch.layouts}
        complete = all(axis in branch.layouts for axis in self.remaining if _block_of(axis[0]) in blocks)
        return complete, len(branch.layouts)

    def _reader_groups(self) -> list[dict[AxisName, Layout]]:
        """List matrices that read the same units together.

        A state-space mixer's channels feed its own projections too, and layers of several kinds may share a table (the
        position biases of T5's heads).
        """
        blocks: dict[str, dict[AxisName, Layout]] = {}
        for axis, found in self.remaining.items():
            info = self.axis_map.parameters[found[0][0]]
            linear = isinstance(self.probe.model.get_submodule(info.module), nn.Linear)
            if linear and axis[1] == 1 and info.shape[1] % self.units == 0 and info.role == "matrix":
                block = axis[0].rpartition(".")[0].rpartition(".")[0]
                layout = block_layout(info.shape[1] // self.units)
                blocks.setdefault(block, {})[axis] = layout
                stack = info.layer.rpartition(".")[0]
                blocks.setdefault(f"{stack}|{info.module.removeprefix(info.layer)}", {})[axis] = layout
        return [readers for readers in blocks.values() if len(readers) > 1]

    def confirmed(self, branch: Branch) -> Branch:
        """Read the reader's layout, so far assumed, off the gradients where another matrix of the branch is zeroed.

        One that accounts for a part of it (with queries at zero, values keep their gradients) only has to agree.
        """
        assumed = branch.layouts[branch.reader]
        for other, layout in branch.layouts.items():
            if other == branch.reader or self.probe.parameters[self.remaining[other][0][0]].dim() < 2:
                continue
            back = self._branch({other: layout}).layouts.get(branch.reader)
            if back == assumed:
                break
            if back is not None and not _agrees(assumed, _owners_in(back, self.units), self.units, unknown=NOBODY):
                return Branch(branch.reader, branch.layouts | {branch.reader: back})
        return branch

    def _branch(self, readers: dict[AxisName, Layout]) -> Branch:
        """Return the branch of matrices that read the units as these layouts say."""
        probe, units = self.probe, self.units
        read = [(name, dim, layout) for reader, layout in readers.items() for name, dim in self.remaining[reader]]
        for name, dim, layout in read:
            if probe.parameters[name].shape[dim] != layout.size(units):
                raise UnsupportedStructureError(f"{name} dimension {dim} has another length than in other layers")

        def zero(mask: torch.Tensor) -> None:
            for name, dim, layout in read:
                Axis(name, dim, layout).mask_(probe.parameters[name], mask, fill=0.0)
                bias = probe.bias_beside(name, dim)
                if bias is not None:
                    Axis(name, 0, layout).mask_(bias, mask, fill=0.0)

        others = {pattern: axes for pattern, axes in self.remaining.items() if pattern not in readers}
        # first of more axes than later, as those that remain get fewer
        owners = probe.owners(units, zero, [axis for axes in others.values() for axis in axes], tuple(read))
        layouts: dict[AxisName, Layout] = dict(readers)
        unclear: dict[AxisName, list[torch.Tensor]] = {}
        for pattern, axes in others.items():
            seen = [owners[axis] for axis in axes]
            known = {layout_of(owner, units) for owner in seen if not bool((owner == UNKNOWN).any())}
            only = known.pop() if len(known) == 1 else None
            if only is not None and only.per_unit:
                layouts[pattern] = only
            elif not known:
                unclear[pattern] = seen
        return Branch(next(iter(readers)), layouts | _like_others(unclear, layouts, units))


def _block_of(pattern: str) -> str:
    """Return the part of a pattern up to the layer's own member, the whole pattern outside any layer."""
    parts = pattern.split(".")
    layer = next((index for index, part in enumerate(parts) if part.startswith("*")), len(parts))
    return ".".join(parts[: layer + 2])


def _reader_layouts(size: int, units: int, granule: int) -> list[Layout]:
    """List how a reader's units may lie: in blocks or strided."""
    per_unit, rest = divmod(size, units)
    layouts = []
    if not rest:
        layouts.append(block_layout(per_unit))
        if per_unit > granule and per_unit % granule == 0:
            layouts.append(Layout((Segment(per_unit // granule, granule),)))
    return layouts


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


def _agrees(layout: Layout, owners: torch.Tensor, units: int, unknown: int = UNKNOWN) -> bool:
    """Tell whether indices belong to whom a layout says, where that isn't `unknown`."""
    if layout.size(units) != len(owners):
        return False
    return bool(((owners == _owners_in(layout, units)) | (owners == unknown)).all())


def _owners_in(layout: Layout, units: int) -> torch.Tensor:
    return layout.expand(torch.arange(units), fixed_value=NOBODY)
