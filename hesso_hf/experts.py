"""Experts of mixture-of-experts layers as units: one expert's weights, its router row, its entries in router buffers.

The axes come from a shape probe of the number of experts, as those of every other size; what the router asks of that
number (top-k, group-limited routing) comes from the config.
Legend: E experts a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import UnsupportedStructureError
from .groups import Allowed, Axis, StructureGroups
from .layout import Layout, Segment
from .probe import describe_parameters, layer_of
from .sizes import build_meta, copy_with, get_size

EXPERTS = "experts"
EXPERT_SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_BEST_OF_GROUP = 2  # experts by which a group is scored in group-limited routing

Shapes = Mapping[str, tuple[int, ...]]


def expert_size(config: PretrainedConfig) -> str:
    """Return the name of the number of experts, as the config itself stores it.

    Raises:
        UnsupportedStructureError: where the config has none.
    """
    found = [name for name in EXPERT_SIZES if (get_size(config, name) or 0) > 1]
    if not found:
        raise UnsupportedStructureError(f"{EXPERTS}: {type(config).__name__} has no number of experts above one")
    stored = config.to_dict()
    return next((name for name in found if name in stored), found[0])


def num_experts(config: PretrainedConfig) -> int | None:
    """Return the number of experts a layer, None for a model without."""
    return next((size for size in (get_size(config, name) for name in EXPERT_SIZES) if size and size > 1), None)


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return how many experts a token is routed to."""
    return next((size for size in (get_size(config, name) for name in _TOP_K) if size), None)


def routing_groups(config: PretrainedConfig) -> tuple[int, int]:
    """Return n_group and topk_group of group-limited routing, (1, 1) without."""
    return get_size(config, "n_group") or 1, get_size(config, "topk_group") or 1


def allowed_experts(config: PretrainedConfig) -> Allowed:
    """Return which numbers of experts the router can work with.

    Raises:
        UnsupportedStructureError: where the config doesn't say how many experts a token takes.
    """
    top_k = experts_per_token(config)
    if top_k is None:
        raise UnsupportedStructureError(f"{EXPERTS}: {type(config).__name__} has no `num_experts_per_tok`")
    groups, best = routing_groups(config)
    if get_size(config, "n_group") is None:
        return Allowed(1, top_k, f"`num_experts_per_tok` ({top_k})")
    least = groups * max(_BEST_OF_GROUP, math.ceil(top_k / best))
    return Allowed(groups, least, f"`num_experts_per_tok` ({top_k}), `n_group` ({groups}) and `topk_group` ({best})")


def expert_groups(model_class: type[PreTrainedModel], config: PretrainedConfig) -> StructureGroups:
    """Find the axes of the number of experts in parameters and buffers.

    Raises:
        UnsupportedStructureError: where there is no such number, or each expert has parameters of its own.
    """
    name, allowed = expert_size(config), allowed_experts(config)
    experts = get_size(config, name)
    assert experts is not None
    if experts % allowed.multiple or experts <= allowed.least:
        raise UnsupportedStructureError(f"{EXPERTS}: all {experts} are needed for {allowed.reason}")
    base = build_meta(model_class, copy_with(config, {}))
    step = allowed.multiple
    try:
        other = build_meta(model_class, copy_with(config, {name: experts + step}))
    except Exception as error:  # model code may refuse a size with any exception type
        raise UnsupportedStructureError(f"`{name}` can't be changed in the model code: {error}") from error
    parameters, layers = _moving(_shapes(base), _shapes(other), experts, step), dict[str, list[Axis]]()
    infos = describe_parameters(base)
    for axis in parameters:
        layers.setdefault(infos[axis.parameter].layer, []).append(axis)
    if not layers:
        raise UnsupportedStructureError(f"no parameter's shape depends on `{name}`: no layer has experts")
    owners = dict(base.named_modules())
    buffers: dict[str, list[Axis]] = {layer: [] for layer in layers}
    for axis in _moving(_buffer_shapes(base), _buffer_shapes(other), experts, step):
        buffers.setdefault(layer_of(axis.parameter, owners), []).append(axis)
    if buffers.keys() != layers.keys():
        raise UnsupportedStructureError(f"{EXPERTS}: a buffer outside of {list(layers)} depends on `{name}`")
    return StructureGroups(
        EXPERTS, {name: 1}, experts, tuple(layers), tuple(map(tuple, layers.values())),
        buffers=tuple(tuple(buffers[layer]) for layer in layers), allowed=allowed,
    )  # fmt: skip


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _buffer_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}


def _moving(base: Shapes, other: Shapes, experts: int, step: int) -> list[Axis]:
    """List the axes that grow by whole blocks with each expert; what is left over belongs to none and lies behind."""
    if base.keys() != other.keys():
        odd = sorted(base.keys() ^ other.keys())[0]
        raise UnsupportedStructureError(
            f"{EXPERTS}: each has parameters of its own here ({odd}); only fused expert weights can be pruned"
        )
    axes = []
    for name, shape in base.items():
        for dim, (before, after) in enumerate(zip(shape, other[name], strict=True)):
            block, rest = divmod(after - before, step)
            left_over = before - block * experts
            if rest or left_over < 0:
                raise UnsupportedStructureError(f"{name} dimension {dim} ({before}) isn't a multiple of the experts")
            if block:
                tail = (Segment(fixed=left_over),) if left_over else ()
                axes.append(Axis(name, dim, Layout((Segment(1, block), *tail))))
    return axes
