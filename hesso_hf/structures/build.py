"""Units of a structure, by how much each config size grows with one more, and a proved scheme's groups of any model."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from ..errors import NotApplicableError, UnsupportedStructureError
from ..hf_models.sizes import EXPERT_MLP, HEADS, HIDDEN, KV_HEADS, MLP, ConfigSizes
from .groups import COUPLED, Axis, AxisName, Scheme, StructureGroups
from .layout import Layout
from .shape_probe import AxisMap

HEAD_UNITS = ("attention_heads", "query_heads")
_SIZE_OF = {"mlp_channels": MLP, "expert_channels": EXPERT_MLP, "embedding_channels": HIDDEN}


def unit_increments(structure: str, sizes: ConfigSizes) -> dict[str, int]:
    """Return how much each config size grows with one more unit of `structure`.

    An attention head unit is one key-value head with all its query heads; under multi-query attention, where the only
    key-value head can't go, one query head. A query head unit is one query head of grouped ones.

    Raises:
        UnsupportedStructureError: where the config has no such size.
    """
    if structure == "mixer_channels":
        raise NotApplicableError("no mixer's channels follow the width")
    name = HEADS if structure in HEAD_UNITS else _SIZE_OF[structure]
    size = sizes.get(name)
    if size is None:
        raise NotApplicableError(f"{structure}: {sizes.config_class} has no integer `{name}`")
    kv_heads = sizes.get(KV_HEADS)
    if structure == "query_heads" and (kv_heads is None or kv_heads == size):
        raise NotApplicableError("each query head has a key-value head of its own: use attention_heads")
    if structure == "query_heads" and kv_heads == 1:
        raise NotApplicableError(
            "all query heads share one key-value head, and attention_heads means single query heads there: use it"
        )
    if structure not in HEAD_UNITS or kv_heads is None or kv_heads == 1:
        return {name: 1}
    if size % kv_heads:
        raise UnsupportedStructureError(f"{structure}: {size} query heads don't divide over {kv_heads} key-value heads")
    return {HEADS: 1} if structure == "query_heads" else {HEADS: size // kv_heads, KV_HEADS: 1}


def num_pools(structure: str, sizes: ConfigSizes) -> int:
    """Return into how many runs a layer's units are split that all keep equally many: key-value heads, or 1."""
    return (sizes.get(KV_HEADS) or 1) if structure == "query_heads" else 1


def num_units(structure: str, sizes: ConfigSizes) -> int:
    """Return the number of units of `structure` in one layer."""
    name, increment = next(iter(unit_increments(structure, sizes).items()))
    return sizes.by_name[name] // increment


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
                raise UnsupportedStructureError(
                    f"{info.name} dimension {dim} ({size}) doesn't divide as in the tiny model"
                )
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
        coupled = axis_map.coupled_head_dim is not None and structure in COUPLED
        for name, dim in axis_map.moving((HIDDEN,)) if coupled else moving_axes(structure, axis_map):
            if (name, dim) not in covered:
                raise UnsupportedStructureError(f"{name} dimension {dim} wasn't seen in the tiny model")


def _per_unit(axis: AxisName, template: Layout, axis_map: AxisMap, increments: dict[str, int], scheme: Scheme) -> int:
    """Return how many of an axis' indices one unit owns in this model."""
    follows_width = axis_map.coupled_head_dim is not None and {HEADS, HIDDEN} & increments.keys()
    if follows_width or scheme.per_channel:
        granule = axis_map.coupled_head_dim if axis_map.coupled_head_dim and HEADS in increments else 1
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
    if axis_map.coupled_head_dim is not None:
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
