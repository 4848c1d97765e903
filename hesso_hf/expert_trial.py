"""A trial of cutting experts: a tiny random model with gated routers against the model without those experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .cut import cut_model
from .errors import UnsupportedStructureError
from .experts import EXPERTS, expert_groups, expert_size, experts_per_token, routing_groups
from .groups import KeptUnits, PruningGroups, StructureGroups, mask_
from .routing import RouterGates, remove_gates
from .sizes import HEAD_DIM, HEADS, HIDDEN, copy_with, get_size, head_dim_of, resized_config

Logits = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
_PER_GROUP, _KEPT_PER_GROUP = 8, 6
_DRAWS = 20
_WIDTH = 20  # of an expert, where experts have a width of their own


def tiny_experts(tiny: PretrainedConfig, config: PretrainedConfig) -> PretrainedConfig:
    """Return a tiny config with experts in all layers but the first at most, and routed in groups where they are.

    The width of a head is the real one, and the hidden size a whole number of heads: some classes can't tell them
    apart, which doesn't matter to experts.

    Args:
        tiny: the config with other sizes small already.
        config: the real one.

    Raises:
        UnsupportedStructureError: for a model without experts.
    """
    sizes = {expert_size(config): _PER_GROUP}
    head_dim, heads = head_dim_of(config), get_size(tiny, HEADS)
    if head_dim and heads:
        tiny = copy_with(tiny, {HEAD_DIM: head_dim, HIDDEN: heads * head_dim})
    if routing_groups(config)[0] > 1:
        sizes |= {expert_size(config): 2 * _PER_GROUP, "n_group": 2, "topk_group": 1}
    elif get_size(config, "topk_group"):
        sizes["topk_group"] = 1
    if (get_size(config, "num_experts_per_tok") or 0) > 2:
        sizes["num_experts_per_tok"] = 2
    if (get_size(config, "first_k_dense_replace") or 0) > 1:
        sizes["first_k_dense_replace"] = 1
    if get_size(config, "moe_intermediate_size"):
        sizes["moe_intermediate_size"] = _WIDTH
    return resized_config(tiny, sizes)


@torch.no_grad()
def expert_error(model: PreTrainedModel, input_ids: torch.Tensor, logits: Logits, seed: int) -> float:
    """Prune random experts of a tiny model, cut them out, and return the relative error of the cut model's logits.

    Raises:
        UnsupportedStructureError: where its experts or routers can't be found, or pruning them changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    structure = expert_groups(type(model), model.config)
    buffers = dict(model.named_buffers())
    for axes in structure.buffers:
        for axis in axes:  # zeros would hide that they are cut wrongly
            buffers[axis.parameter].normal_(0.0, 0.5, generator=generator)
    pruned = _used_experts(model, structure, input_ids, logits, generator)
    parameters = dict(model.named_parameters())
    for layer, axis in structure.all_axes():
        mask_(parameters[axis.parameter].data, axis, pruned[layer])
    expected = logits(model, input_ids)
    kept = tuple(tuple((~layer).nonzero().flatten().tolist()) for layer in pruned)
    groups = PruningGroups({EXPERTS: structure})
    small = cut_model(model, groups, KeptUnits({EXPERTS: structure.num_units}, {EXPERTS: kept}), torch.float32)
    remove_gates(model)
    return float((logits(small, input_ids) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _used_experts(
    model: PreTrainedModel,
    structure: StructureGroups,
    input_ids: torch.Tensor,
    logits: Logits,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw experts until the router misses some of them, and gate the model's routers against these."""
    before = logits(model, input_ids)
    gates = RouterGates.attach(model, structure)
    for _ in range(_DRAWS):
        pruned = random_experts(structure, model.config, generator)
        gates.set_scales((~pruned).float())
        if (logits(model, input_ids) - before).abs().max() > 1e-3 * before.abs().max():
            return pruned
    raise UnsupportedStructureError(f"{EXPERTS}: keeping the routers from some of them changes nothing")


def random_experts(
    structure: StructureGroups, config: PretrainedConfig, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Choose a quarter of the experts of each layer and routing group to prune: shape (L, U), bool."""
    pools = structure.allowed.multiple
    size = structure.num_units // pools
    top_k = experts_per_token(config) or 1
    least = max(math.ceil(structure.allowed.least / pools), top_k if pools == 1 else 1)
    removed = min(max(1, size * (_PER_GROUP - _KEPT_PER_GROUP) // _PER_GROUP), size - least)
    orders = torch.rand(len(structure.layers) * pools, size, generator=generator).argsort(dim=1)
    pruned = torch.zeros(orders.shape, dtype=torch.bool)
    pruned.scatter_(1, orders[:, :removed], True)
    return pruned.view(len(structure.layers), structure.num_units)
