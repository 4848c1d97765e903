"""Budgets of any Llama and any ratio: what comes out can be built, is near the ratio, and is what was asked for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hesso_hf.budget.cost import build_cost
from hesso_hf.budget.solver import solve_budget
from hesso_hf.config import HessoConfig
from hesso_hf.errors import BudgetError
from hesso_hf.hf_models.build import build_meta
from hesso_hf.hf_models.resize import copy_with
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.properties import few

STRUCTURES = ("attention_heads", "mlp_channels", "embedding_channels")


@st.composite
def llamas(draw: st.DrawFn) -> LlamaConfig:
    """Draw a Llama whose sizes have nothing in common but what its class asks for."""
    kv_heads = draw(st.integers(2, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    return LlamaConfig(
        vocab_size=draw(st.integers(50, 900)), num_hidden_layers=draw(st.integers(1, 5)), num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=2 * draw(st.integers(3, 9)),
        intermediate_size=draw(st.integers(40, 500)),
        hidden_size=heads * draw(st.integers(6, 30)), tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip


def built(config: LlamaConfig, sizes: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in build_meta(LlamaForCausalLM, copy_with(config, sizes)).parameters())


@few
@given(llamas(), st.integers(5, 80), st.sets(st.sampled_from(STRUCTURES), min_size=1), st.sampled_from([1, 2, 8]))
def test_what_is_solved_can_be_built_and_has_the_parameters_that_it_says(
    config: LlamaConfig, percent: int, structures: set[str], round_to: int
) -> None:
    groups, _, axis_map = proved_groups(LlamaForCausalLM, config)
    chosen = groups.select(tuple(sorted(structures)), explicit=True)
    cost = build_cost("parameters", chosen, axis_map, config)
    hesso = HessoConfig(pruning_ratio=percent / 100, structures=sorted(structures), round_to=round_to)
    try:
        target = solve_budget(hesso, config, chosen, cost)
    except BudgetError as error:
        if "nearest feasible" not in str(error):
            raise
        return
    assert set(target.kept_units) == structures
    assert target.parameters_before == built(config, {})
    assert target.parameters_after == built(config, target.sizes) <= target.parameters_before
    assert abs(target.ratio - percent / 100) <= 0.05
    for size, structure in (("intermediate_size", "mlp_channels"), ("hidden_size", "embedding_channels")):
        if structure in structures:
            assert target.sizes[size] % round_to == 0 or target.sizes[size] == getattr(config, size)
        else:
            assert target.sizes.get(size, getattr(config, size)) == getattr(config, size)
    assert target.sizes.get("hidden_size", config.hidden_size) % target.sizes.get("num_attention_heads", 1) == 0
