"""Experts of mixture-of-experts layers as units: one expert's weights, its router row, its entries in router buffers.

The axes come from a shape probe of the number of experts, as those of every other size; what the router asks of that
number (top-k, group-limited routing) comes from the config.
Legend: E experts per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import NotApplicableError, UnsupportedStructureError
from ..hf_models.build import build_meta
from ..hf_models.resize import copy_with
from ..hf_models.sizes import EXPERTS, ConfigSizes, get_size
from .groups import Axis, StructureGroups
from .layout import layout_with_rest
from .shape_probe import growth, layer_and_pattern

EXPERT_UNITS = "experts"
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_BEST_OF_GROUP = 2  # experts by which a group is scored in group-limited routing

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class ExpertScheme:
    """That experts are proved; what belongs to each is read off the model, which leaves nothing to settle."""


def num_experts(config: PretrainedConfig) -> int | None:
    """Return the number of experts per layer, None for a model without."""
    size = get_size(config, EXPERTS)
    return size if size and size > 1 else None


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return how many experts a token is routed to."""
    return next((size for size in (get_size(config, name) for name in _TOP_K) if size), None)


def routing_groups(config: PretrainedConfig) -> tuple[int, int]:
    """Return n_group and topk_group of group-limited routing, (1, 1) without."""
    return get_size(config, "n_group") or 1, get_size(config, "topk_group") or 1


def needed_experts(config: PretrainedConfig) -> tuple[int, str]:
    """Return how many experts the router needs at least, and for what.

    Raises:
        UnsupportedStructureError: where the config doesn't say how many experts a token takes.
    """
    top_k = experts_per_token(config)
    if top_k is None:
        raise UnsupportedStructureError(f"{EXPERT_UNITS}: {type(config).__name__} has no `num_experts_per_tok`")
    groups, best = routing_groups(config)
    if get_size(config, "n_group") is None:
        return top_k, f"`num_experts_per_tok` ({top_k})"
    least = groups * max(_BEST_OF_GROUP, math.ceil(top_k / best))
    return least, f"`num_experts_per_tok` ({top_k}), `n_group` ({groups}) and `topk_group` ({best})"


def expert_groups(model_class: type[PreTrainedModel], config: PretrainedConfig) -> StructureGroups:
    """Find the axes of the number of experts in parameters and buffers.

    Raises:
        NotApplicableError: where there is no such number.
        UnsupportedStructureError: where each expert has parameters of its own, or all are needed.
    """
    experts = num_experts(config)
    if experts is None:
        raise NotApplicableError(f"{EXPERT_UNITS}: {type(config).__name__} has no `{EXPERTS}` above one")
    (least, needed_for), pools = needed_experts(config), routing_groups(config)[0]
    if experts % pools or experts <= least:
        raise UnsupportedStructureError(f"{EXPERT_UNITS}: all {experts} are needed for {needed_for}")
    sizes = ConfigSizes.of(config)
    base = build_meta(model_class, copy_with(config, {}, sizes))
    try:
        other = build_meta(model_class, copy_with(config, {EXPERTS: experts + pools}, sizes))
    except Exception as error:  # model code may refuse a size with any exception type
        raise UnsupportedStructureError(f"`{EXPERTS}` can't be changed in the model code: {error}") from error
    owners = dict(base.named_modules())
    layers: dict[str, list[Axis]] = {}
    for axis in _moving(base.named_parameters(), other.named_parameters(), experts, pools):
        layers.setdefault(layer_and_pattern(axis.parameter, owners)[0], []).append(axis)
    if not layers:
        raise NotApplicableError(f"no parameter's shape depends on `{EXPERTS}`: no layer has experts")
    buffers: dict[str, list[Axis]] = {layer: [] for layer in layers}
    for axis in _moving(base.named_buffers(), other.named_buffers(), experts, pools):
        buffers.setdefault(layer_and_pattern(axis.parameter, owners)[0], []).append(axis)
    if buffers.keys() != layers.keys():
        raise UnsupportedStructureError(f"{EXPERT_UNITS}: a buffer outside of {list(layers)} depends on `{EXPERTS}`")
    return StructureGroups(
        EXPERT_UNITS, {EXPERTS: 1}, experts, tuple(layers), tuple(map(tuple, layers.values())), pools, least,
        needed_for, tuple(tuple(buffers[layer]) for layer in layers),
    )  # fmt: skip


def _moving(tensors: Named, of_other: Named, experts: int, step: int) -> list[Axis]:
    """List the axes that grow by whole blocks with each expert; what is left over belongs to none and lies behind."""
    base, other = ({name: tensor.shape for name, tensor in found} for found in (tensors, of_other))
    if base.keys() != other.keys():
        odd = sorted(base.keys() ^ other.keys())[0]
        raise UnsupportedStructureError(
            f"{EXPERT_UNITS}: each has parameters of its own here ({odd}); only fused expert weights can be pruned"
        )
    axes = []
    for (name, dim), more in growth(base, other).items():
        (block, rest), before = divmod(more, step), base[name][dim]
        left_over = before - block * experts
        if rest or left_over < 0:
            raise UnsupportedStructureError(f"{name} dimension {dim} ({before}) isn't a multiple of the experts")
        axes.append(Axis(name, dim, layout_with_rest(1, block, left_over)))
    return axes
