"""Cutting: from a model with pruned units at zero to a smaller model of the same class."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import EllipsisType

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..compat import set_buffer
from ..distributed.parts import Part, plain_name, stock_class, whole
from ..errors import UnsupportedStructureError
from ..hf_models.resize import resized_config
from ..hf_models.sizes import head_dim_of
from .groups import Axis, KeptUnits, PruningGroups, portions_of
from .layers import full_names, is_dropped, kept_layers, without_dropped_layers
from .uneven_layers import layer_list, layer_sizes, rebuild_layers

logger = logging.get_logger(__name__)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
Where = slice | torch.Tensor | EllipsisType  # some rows of a tensor; all of it where it has none
Cuts = Sequence[tuple[Axis, torch.Tensor, int]]  # (axis, kept units, all units) of each cut of a tensor
MARK = "hesso_hf"  # name in a config: of a model that a run has saved, and that is as large as the base


@torch.no_grad()
def zero_units_(parameters: Mapping[str, torch.Tensor], groups: PruningGroups, kept: KeptUnits) -> None:
    """Set all units that aren't kept to zero, in place, and centre what writes to a stream of mean zero."""
    for name, layers in kept.kept.items():
        structure = groups.structures[name]
        for layer, axis in structure.all_axes():
            zero_axis_(parameters[axis.parameter].data, axis, layers[layer], structure.num_units)


def zero_axis_(parameter: torch.Tensor, axis: Axis, units: Collection[int], total: int) -> None:
    """Do along one axis what `zero_units_` does.

    Args:
        units: those that are kept, of `total`.
    """
    pruned = torch.ones(total, dtype=torch.bool, device=parameter.device)
    pruned[list(units)] = False
    axis.mask_(parameter, pruned)
    if axis.centred and pruned.any():
        portions = portions_of((~pruned).float()).to(parameter.dtype)
        axis.centre_(parameter, axis.layout.expand(portions, fixed_value=0.0))


@torch.no_grad()
def load_cut(small: PreTrainedModel, full: Mapping[str, torch.Tensor], groups: PruningGroups, kept: KeptUnits) -> None:
    """Fill a smaller model with the kept units of a full one's parameters, folded in fp32, one parameter at a time.

    Raises:
        UnsupportedStructureError: naming the first parameter that one of the two lacks or whose shape differs.
    """
    parameters = dict(small.named_parameters())
    origins = full_names(parameters, groups, kept)
    check_origins(origins, full, groups, kept)
    cuts = cuts_by_tensor(groups, kept)
    for name, parameter in parameters.items():
        tensor = full[origins[name]].detach()
        for axis, units, total in cuts.get(origins[name], ()):
            tensor = _cut(tensor, axis, units, total)
        if tensor.shape != parameter.shape:
            raise UnsupportedStructureError(
                f"{name} has shape {tuple(tensor.shape)} after cutting, the smaller model {tuple(parameter.shape)}"
            )
        parameter.copy_(tensor)


def check_origins(origins: Mapping[str, str], full: Iterable[str], groups: PruningGroups, kept: KeptUnits) -> None:
    """Compare what the smaller model takes from the full one with what this has.

    Args:
        origins: names in the smaller model to those in the full one.
        full: names in the full model.

    Raises:
        UnsupportedStructureError: naming the first parameter that one of the two lacks.
    """
    odd = sorted(set(origins.values()) ^ {name for name in full if not is_dropped(name, groups, kept)})
    if odd:
        raise UnsupportedStructureError(f"parameter {odd[0]} exists in only one of the full and the smaller model")


def cuts_by_tensor(groups: PruningGroups, kept: KeptUnits) -> dict[str, list[tuple[Axis, torch.Tensor, int]]]:
    """Return the cuts of each parameter or buffer."""
    cuts: dict[str, list[tuple[Axis, torch.Tensor, int]]] = {}
    for name, layers in kept.kept.items():
        structure = groups.structures[name]
        buffers = [(layer, axis) for layer, axes in enumerate(structure.buffers) for axis in axes]
        for layer, axis in (*structure.all_axes(), *buffers):
            if len(layers[layer]) < structure.num_units and not axis.layout.owned:
                cuts.setdefault(axis.parameter, []).append((axis, torch.tensor(layers[layer]), structure.num_units))
    return cuts


def copy_buffers(small: PreTrainedModel, full: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
    """Copy buffers, cut where units lie on them."""
    buffers, cuts = {plain_name(n): b for n, b in full.named_buffers()}, cuts_by_tensor(groups, kept)
    for name, origin in full_names(dict(small.named_buffers()), groups, kept).items():
        owner, _, leaf = name.rpartition(".")
        holder, trained = small.get_submodule(owner), buffers.get(origin)
        if trained is None:
            continue
        for axis, units, total in cuts.get(origin, ()):
            trained = _cut(trained, axis, units, total)
        if origin in cuts:  # in its own dtype: the bias of a router's choice isn't one of the weights
            set_buffer(holder, leaf, trained.to(holder.get_buffer(leaf).device, copy=True))
        # a scalar follows from the sizes (Gemma's sqrt(hidden_size)); all others are as in the trained model
        elif trained.dim() and trained.shape == holder.get_buffer(leaf).shape:
            holder.get_buffer(leaf).copy_(trained)


def _cut(tensor: torch.Tensor, axis: Axis, units: torch.Tensor, total: int) -> torch.Tensor:
    if axis.layout.size(total) > tensor.shape[axis.dim]:
        raise UnsupportedStructureError(
            f"{axis.parameter} dimension {axis.dim} ({tensor.shape[axis.dim]}) is shorter than its {total} units need"
        )
    return cut_part(tensor, whole(tensor.shape), [(axis, units, total)])


def cut_part(tensor: torch.Tensor, part: Part, cuts: Cuts) -> torch.Tensor:
    """Return what is left of a part of a tensor when units are cut; it has fewer indices where the part has some.

    What takes a power of c, the root of the share of units that are kept, is folded in fp32.
    """
    for axis, units, total in cuts:
        indices = axis.layout.indices(units, total)
        first, held = part.starts[axis.dim], part.sizes[axis.dim]
        here = indices[(indices >= first) & (indices < first + held)] - first
        tensor = _folded(take(tensor, axis.dim, here), axis, units, total)
    return tensor


def cut_rows(tensor: torch.Tensor, rows: Where, cuts: Cuts) -> torch.Tensor:
    """Return some rows of what is left of a tensor when units are cut, as `cut_part` gives them; no more is read.

    Args:
        rows: of what is left.
        cuts: as for `cut_part`.
    """
    chosen = None
    for axis, units, total in cuts:
        if axis.dim == 0:
            indices = axis.layout.indices(units, total)
            chosen = indices if chosen is None else chosen[indices]
    tensor = tensor[rows] if chosen is None else take(tensor, 0, chosen[rows])
    for axis, units, total in cuts:
        if axis.dim:
            tensor = take(tensor, axis.dim, axis.layout.indices(units, total))
        tensor = _folded(tensor, axis, units, total)
    return tensor


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as integers: NumPy has no bfloat16, and sums of integers are the same in any order."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def take(tensor: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    """Return what a tensor has at some indices of a dimension; on the CPU by NumPy, which is several times as fast."""
    if tensor.device.type != "cpu" or not tensor.dim():
        return tensor.index_select(dim, indices.to(tensor.device))
    return torch.from_numpy(np.take(bits_of(tensor).numpy(), indices.cpu().numpy(), axis=dim)).view(tensor.dtype)


def _folded(tensor: torch.Tensor, axis: Axis, units: torch.Tensor, total: int) -> torch.Tensor:
    if not axis.power:
        return tensor
    return (tensor.float() + axis.shift) * math.sqrt(len(units) / total) ** axis.power - axis.shift


def kept_sizes(groups: PruningGroups, kept: KeptUnits) -> dict[str, int]:
    """Return the config sizes of a model that keeps these units; where layers differ, the full model's stay."""
    sizes: dict[str, int] = {}
    for name, layers in without_dropped_layers(groups, kept).kept.items():
        counts = {len(layer) for layer in layers}
        if len(counts) == 1 and counts != {groups.structures[name].num_units}:
            sizes |= groups.structures[name].config_sizes(counts.pop())
    return sizes


def build_cut(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
    """Build the smaller model of the same class, its weights unset.

    Raises:
        HessoError: where the config class refuses the sizes, or a layer keeps no unit.
    """
    uneven = layer_sizes(groups, kept, head_dim_of(model.config))
    config = resized_config(model.config, kept_sizes(groups, kept), kept_layers(kept))
    vars(config).pop(MARK, None)
    with no_init_weights():
        small = stock_class(model)(config)
        if uneven is not None:
            rebuild_layers(small, layer_list(groups), uneven)
    small.tie_weights()
    if model.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(config, "use_cache"):
        config.use_cache = True  # Trainer turns it off; a saved model should generate with its cache
    return small


def device_with_room(device: torch.device, size: int) -> torch.device:
    """Return the device, or the CPU where `size` bytes more don't fit a GPU: an optimizer may leave little."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if size <= free:
        return device
    logger.info(f"{size / 1e9:.1f} GB don't fit {device}, which has {free / 1e9:.1f} GB left: the CPU is used")
    return torch.device("cpu")


@torch.no_grad()
def cut_model(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits, dtype: torch.dtype) -> PreTrainedModel:
    """Build the smaller model of the same class, folded in fp32 and then cast to `dtype`.

    It lies on the model's device, or on the CPU where that has no room for it and what is read back to compare.

    Raises:
        HessoError: where the config class refuses the sizes, a layer keeps no unit, or its pools differ.
    """
    for name, layers in kept.kept.items():
        groups.structures[name].check_pools(layers)
    small = build_cut(model, groups, kept)
    place = device_with_room(model.device, 2 * sum(p.numel() for p in small.parameters()) * dtype.itemsize)
    small = small.to(dtype).to(place)  # type: ignore[arg-type, call-arg]  # its wrapper hides the signature
    load_cut(small, dict(model.named_parameters()), groups, kept)
    copy_buffers(small, model, groups, kept)
    return small.eval()
