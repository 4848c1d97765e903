"""Cutting, whatever is kept: the smaller model is the model in which the other units are at zero."""

from __future__ import annotations

import copy
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hesso_hf.hf_models.tiny_model import logits_of, random_model, relative_error, token_ids
from hesso_hf.structures.cut import cut_model, zero_units_
from hesso_hf.structures.groups import KeptUnits, PruningGroups
from hesso_hf.structures.proof.prove import proved_groups

GROUP, STREAM = 2, "embedding_channels"  # query heads of a key-value head
CONFIG = LlamaConfig(
    hidden_size=36, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
    head_dim=4, vocab_size=37, rms_norm_eps=0.05, attention_bias=True,
)  # fmt: skip


@cache
def case() -> tuple[LlamaForCausalLM, PruningGroups]:
    return random_model(LlamaForCausalLM, CONFIG), proved_groups(LlamaForCausalLM, CONFIG)[0]


@st.composite
def kept_units(draw: st.DrawFn) -> KeptUnits:
    """Draw, of some structures, equally many units in every layer; the class wants the heads to divide the width."""
    groups = case()[1].structures
    names = draw(
        st.lists(st.sampled_from(["attention_heads", "embedding_channels", "mlp_channels"]), min_size=1, unique=True)
    )
    counts = {name: draw(st.integers(1, groups[name].num_units), label=name) for name in sorted(names)}
    if STREAM in counts:
        heads = GROUP * counts.get("attention_heads", groups["attention_heads"].num_units)
        counts[STREAM] = max(heads, counts[STREAM] // heads * heads)
    kept = {}
    for name, count in counts.items():
        order = st.permutations(range(groups[name].num_units))
        kept[name] = tuple(tuple(sorted(draw(order)[:count])) for _ in groups[name].layers)
    return KeptUnits({name: groups[name].num_units for name in counts}, kept)


@settings(max_examples=25, deadline=None)
@given(kept=kept_units())
def test_a_cut_model_computes_what_the_zeroed_one_does(kept: KeptUnits) -> None:
    model, groups = case()
    zeroed = copy.deepcopy(model)
    zero_units_(dict(zeroed.named_parameters()), groups, kept)
    small = cut_model(zeroed, groups, kept, torch.float32)
    ids = token_ids(CONFIG)
    assert relative_error(logits_of(small, ids), logits_of(zeroed, ids)) < 1e-5
    assert KeptUnits.from_dict(kept.to_dict()) == kept
    dropped = any(len(layer) < kept.num_units[name] for name, layers in kept.kept.items() for layer in layers)
    assert (small.num_parameters() < model.num_parameters()) == dropped
