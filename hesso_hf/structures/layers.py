"""Layers as units: what writes to the residual stream in each layer, and what a model without some layers is called.

A layer whose writers are all zero leaves the stream as it is, so it can be taken out. Each writer belongs wholly to
the unit that is its layer.
Legend: L layers, U units per layer; for this structure U is the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import NotApplicableError, UnsupportedStructureError
from ..hf_models.sizes import HIDDEN, LAYERS
from .groups import Axis, AxisName, KeptUnits, PruningGroups, StructureGroups
from .layout import owned_layout
from .shape_probe import AxisMap, ParameterInfo

LAYER_UNITS = "layers"  # the name of the structure


@dataclass(frozen=True)
class LayerScheme:
    """What the proof settles for whole layers: pattern and dimension of all that writes to the stream in a layer."""

    writers: frozenset[AxisName]

    def without_module(self, module: str) -> LayerScheme:
        """Return a scheme in which the parameters of one module (`model.layers.*.self_attn.q_proj`) write nothing."""
        return LayerScheme(frozenset(axis for axis in self.writers if axis[0].rpartition(".")[0] != module))


def stack_of(axis_map: AxisMap) -> str:
    """Return the name of the module list whose members are the layers (`model.layers`).

    Raises:
        UnsupportedStructureError: where there is none, or its members differ in their parameters.
    """
    layers = axis_map.sizes.get(LAYERS)
    if layers is None:
        raise NotApplicableError(f"{LAYER_UNITS}: {axis_map.sizes.config_class} has no integer `{LAYERS}`")
    if layers < 2:
        raise UnsupportedStructureError("there is only one layer")
    if HIDDEN in axis_map.failed:
        raise UnsupportedStructureError(f"`{HIDDEN}` can't be changed in the model code: {axis_map.failed[HIDDEN]}")
    writing = {axis_map.parameters[parameter].layer for parameter, _ in axis_map.moving((HIDDEN,))} - {""}
    names = sorted({layer.rpartition(".")[0] for layer in writing})
    if len(names) != 1:
        raise UnsupportedStructureError(f"the stream runs through {names or 'no list of layers'}, not through one list")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {f"{names[0]}.{index}": {} for index in range(layers)}
    for info in axis_map.parameters.values():
        if info.layer:
            shapes.setdefault(info.layer, {})[info.name.removeprefix(info.layer)] = info.shape
    first = f"{names[0]}.0"
    for layer, found in shapes.items():
        if found != shapes[first]:
            odd = sorted(key for key in found.keys() | shapes[first].keys() if found.get(key) != shapes[first].get(key))
            raise UnsupportedStructureError(
                f"{first} and {layer} differ in `{odd[0].lstrip('.')}`, so the size of the smaller model would depend "
                "on which layers stay"
            )
    return names[0]


def layer_groups(axis_map: AxisMap, scheme: LayerScheme) -> StructureGroups:
    """Build the groups whose units are whole layers: each writer is owned by the unit of its layer.

    Raises:
        UnsupportedStructureError: as `stack_of` does, or where nothing writes to the stream.
    """
    stack = stack_of(axis_map)
    axes: dict[str, Axis] = {}
    for parameter, dim in axis_map.moving((HIDDEN,)):
        info = axis_map.parameters[parameter]
        if (info.pattern, dim) in scheme.writers and parameter not in axes:
            layer = int(info.layer.rpartition(".")[2])
            axes[parameter] = Axis(parameter, dim, owned_layout(info.shape[dim], layer))
    if not axes:
        raise UnsupportedStructureError("nothing was found that writes to the residual stream in a layer")
    layers = axis_map.sizes.by_name[LAYERS]
    return StructureGroups(LAYER_UNITS, {LAYERS: 1}, layers, ("",), (tuple(axes.values()),), stack=stack)


def in_stack(groups: PruningGroups, info: ParameterInfo) -> str:
    """Tell how a parameter counts where layers are dropped: `first` layer, `other` layer, or `outside` of them."""
    structure = groups.structures.get(LAYER_UNITS)
    if structure is None or info.layer.rpartition(".")[0] != structure.stack:
        return "outside"
    return "first" if info.layer == f"{structure.stack}.0" else "other"


def kept_layers(kept: KeptUnits) -> tuple[int, ...] | None:
    """Return the indices of the layers that stay, None where none is dropped."""
    found = kept.kept.get(LAYER_UNITS)
    return found[0] if found and len(found[0]) < kept.num_units[LAYER_UNITS] else None


def without_dropped_layers(groups: PruningGroups, kept: KeptUnits) -> KeptUnits:
    """Return the decision as it is about the smaller model: what was decided in dropped layers is left out."""
    decided = {}
    for name, layers in kept.kept.items():
        units = zip(groups.structures[name].layers, layers, strict=True)
        decided[name] = tuple(found for layer, found in units if not is_dropped(layer, groups, kept))
    return KeptUnits(kept.num_units, decided)


def is_dropped(name: str, groups: PruningGroups, kept: KeptUnits) -> bool:
    """Whether a parameter or layer (`model.layers.3`, or what is in it) is gone from the smaller model."""
    staying, index = kept_layers(kept), _index_in_stack(name, groups)
    return staying is not None and index is not None and index not in staying


def full_names(names: Iterable[str], groups: PruningGroups, kept: KeptUnits) -> dict[str, str]:
    """Map names in the smaller model to names in the full one: `model.layers.3.x` there was `model.layers.5.x`."""
    staying, found = kept_layers(kept), {}
    for name in names:
        index = _index_in_stack(name, groups)
        found[name] = name
        if staying is not None and index is not None and index < len(staying):
            stack = groups.structures[LAYER_UNITS].stack
            found[name] = f"{stack}.{staying[index]}{name.removeprefix(f'{stack}.{index}')}"
    return found


def _index_in_stack(name: str, groups: PruningGroups) -> int | None:
    structure = groups.structures.get(LAYER_UNITS)
    if structure is None or not name.startswith(f"{structure.stack}."):
        return None
    index = name.removeprefix(f"{structure.stack}.").partition(".")[0]
    return int(index) if index.isdigit() else None
