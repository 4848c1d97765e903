"""Experts as units: a pruned one is never routed to, and what is saved routes as the trained model did."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import logits, relative_difference, zero_pruned_
from moe import FAMILIES, KEPT, moe_model, moe_tokens
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hesso_hf import HessoConfig, HessoError, export_pruned
from hesso_hf.cut import cut_model
from hesso_hf.expert_trial import random_experts
from hesso_hf.experts import EXPERTS, expert_groups
from hesso_hf.groups import KeptUnits, PruningGroups, StructureGroups
from hesso_hf.routing import RouterGates, is_gated, remove_gates, routed_by
from hesso_hf.verify import kept_mask


def random_kept(structure: StructureGroups, count: int, seed: int = 1) -> KeptUnits:
    """Keep random experts, others in every layer, as many of each routing group."""
    stretches = structure.allowed.multiple
    size, generator = structure.num_units // stretches, torch.Generator().manual_seed(seed)
    layers = []
    for _ in structure.layers:
        orders = torch.stack([torch.randperm(size, generator=generator) + size * s for s in range(stretches)])
        layers.append(tuple(sorted(orders[:, : count // stretches].flatten().tolist())))
    return KeptUnits({EXPERTS: structure.num_units}, {EXPERTS: tuple(layers)})


def pruned_model(name: str) -> tuple[PreTrainedModel, PreTrainedModel, PruningGroups, KeptUnits]:
    """Return the original, and the same with experts at zero and gates on."""
    original = moe_model(name)
    structure = expert_groups(type(original), original.config)
    kept = random_kept(structure, KEPT.get(name, 4))
    groups = PruningGroups({EXPERTS: structure})
    model = copy.deepcopy(original)
    zero_pruned_(model, groups, kept)
    gates = RouterGates.attach(model, structure)
    gates.set_scales(kept_mask(kept, EXPERTS).float())
    return original, model, groups, kept


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_model_routes_as_the_gated_one(name: str, tmp_path: Path):
    original, model, groups, kept = pruned_model(name)
    tokens = moe_tokens()
    expected = logits(model, tokens)
    assert relative_difference(expected, logits(original, tokens)) > 1e-2
    cut_model(model, groups, kept, torch.float32).save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path).eval()
    assert small.num_parameters() < model.num_parameters()
    assert relative_difference(logits(small, tokens), expected) < 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens[:, :5], **options), small.generate(tokens[:, :5], **options))
    remove_gates(model)  # weights at zero alone aren't removal
    assert relative_difference(logits(model, tokens), expected) > 1e-3
