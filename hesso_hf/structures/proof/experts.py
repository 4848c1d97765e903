"""A trial of cutting experts: a tiny random model with gated routers against the model without those experts."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedStructureError
from ...hf_models.resize import resized_config
from ...hf_models.sizes import EXPERTS
from ...hf_models.tiny_configs import tiny_config
from ...hf_models.tiny_model import SEED, logits_of, random_model, relative_error, token_ids
from ..cut import cut_model, zero_units_
from ..experts import EXPERT_UNITS, ExpertScheme, expert_groups, experts_per_token, num_experts, routing_groups
from ..groups import KeptUnits, PruningGroups, StructureGroups
from ..router_gates import RouterGates, remove_gates
from .result import TOLERANCE, StructureProof

_PER_POOL, _KEPT_PER_POOL = 8, 6
_DRAWS = 20
_ROWS_OF_ONE_EXPERT = 6


def ids_for_all_experts(config: PretrainedConfig) -> torch.Tensor:
    """Return ids, shape (rows, T): where each token has one expert only, so many that no expert is left without any."""
    return token_ids(config, rows=_ROWS_OF_ONE_EXPERT) if experts_per_token(config) == 1 else token_ids(config)


@torch.no_grad()
def prove_experts(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, StructureProof]:
    """Prune random experts of a tiny model and cut them out; what belongs to each leaves nothing else to try.

    Raises:
        NotApplicableError: for a model without experts.
        UnsupportedStructureError: where experts or routers can't be found, or pruning them changes nothing.
    """
    config = with_enough_experts(tiny_config(model_class, config))
    structure = expert_groups(model_class, config)
    model, input_ids = random_model(model_class, config), token_ids(config)
    generator = torch.Generator().manual_seed(SEED)
    buffers = dict(model.named_buffers())
    for axes in structure.buffers:
        for axis in axes:  # zeros would hide that they are cut wrongly
            buffers[axis.parameter].normal_(0.0, 0.5, generator=generator)
    kept = _keep_used(model, structure, input_ids, generator)
    groups = PruningGroups({EXPERT_UNITS: structure})
    zero_units_(dict(model.named_parameters()), groups, kept)
    expected = logits_of(model, input_ids)
    small = cut_model(model, groups, kept, torch.float32)
    remove_gates(model)
    error = relative_error(logits_of(small, input_ids), expected)
    if error <= TOLERANCE:
        return {EXPERT_UNITS: StructureProof(EXPERT_UNITS, ExpertScheme(), error)}
    reason = f"the cut model's logits differ: relative error {error:.1e} > {TOLERANCE:.0e}"
    return {EXPERT_UNITS: StructureProof(EXPERT_UNITS, None, error, reason)}


def with_enough_experts(config: PretrainedConfig) -> PretrainedConfig:
    """Return a tiny model's config with so many experts, where it has any, that there are some to choose from."""
    if not num_experts(config):
        return config
    return resized_config(config, {EXPERTS: _PER_POOL * routing_groups(config)[0]})


def _keep_used(
    model: PreTrainedModel, structure: StructureGroups, input_ids: torch.Tensor, generator: torch.Generator
) -> KeptUnits:
    """Draw experts to prune until the router misses some of them, and gate the model's routers against these."""
    before = logits_of(model, input_ids)
    gates = RouterGates.attach(model, structure)
    for _ in range(_DRAWS):
        pruned = random_experts(structure, generator)
        gates.set_scales((~pruned).float())
        if relative_error(logits_of(model, input_ids), before) > 1e-3:
            return KeptUnits.of({EXPERT_UNITS: ~pruned})
    raise UnsupportedStructureError(f"{EXPERT_UNITS}: keeping the routers from some of them changes nothing")


def random_experts(structure: StructureGroups, generator: torch.Generator | None = None) -> torch.Tensor:
    """Choose a quarter of the experts of each layer and routing group to prune, or fewer: shape (L, U), bool."""
    size, least = structure.pool_size, math.ceil(structure.least / structure.pools)
    removed = min(max(1, size * (_PER_POOL - _KEPT_PER_POOL) // _PER_POOL), size - least)
    orders = torch.rand(len(structure.layers) * structure.pools, size, generator=generator).argsort(dim=1)
    pruned = torch.zeros(orders.shape, dtype=torch.bool)
    pruned.scatter_(1, orders[:, :removed], True)
    return pruned.view(len(structure.layers), structure.num_units)
