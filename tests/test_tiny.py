"""Tiny models: every class gets one that builds and runs, with sizes that tell its axes apart."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ALL

from hesso_hf.sizes import (
    EXPERT_MLP,
    EXPERTS,
    HEADS,
    HIDDEN,
    MLP,
    VOCAB,
    get_size,
    model_class_of,
)  # fmt: skip
from hesso_hf.tiny import default_config, logits_of, random_model, tiny_config, token_ids

TYPES = (
    "llama", "qwen2", "gemma3_text", "gemma4_text", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "phi3",
    "mixtral", "qwen3_moe", "deepseek_v3", "dbrx", "jamba", "mamba2", "zamba", "qwen3_next", "lfm2", "nemotron_h",
    "bart", "xlnet", "qwen3_5", "mllama", "granitemoehybrid", "longcat_flash", "dots3_note_text",
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi", "cohere2", "mixtral"])
def test_the_tiny_config_has_distinct_sizes_a_large_epsilon_and_leaves_the_original_alone(name: str):
    config = ALL[name].config(num_hidden_layers=4)
    before = copy.deepcopy(config.to_dict())
    tiny = tiny_config(model_class_of(config), config)
    assert config.to_dict() == before
    sizes = [tiny.vocab_size, tiny.hidden_size, tiny.intermediate_size, tiny.num_attention_heads]
    sizes += [tiny.num_key_value_heads, tiny.hidden_size // tiny.num_attention_heads]
    assert len(set(sizes)) == len(sizes)
    epsilons = [value for key, value in tiny.to_dict().items() if "eps" in key and isinstance(value, float)]
    assert epsilons
    assert set(epsilons) == {0.05}


def test_the_models_of_the_proof_are_random_everywhere_and_reproducible():
    original = ALL["llama-biases"].config()
    config = tiny_config(model_class_of(original), original)
    model = random_model(model_class_of(config), config)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name
    again = random_model(model_class_of(config), config)
    assert all(bool((a == b).all()) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def check(model_type: str) -> None:
    """Assert that a tiny model of the type runs, always gives the same, and has sizes that tell axes apart."""
    model_class, config = default_config(model_type)
    tiny = tiny_config(model_class, config)
    model, ids = random_model(model_class, tiny), token_ids(tiny)
    logits = logits_of(model, ids)
    assert logits.shape == (2, 12, get_size(tiny, VOCAB))
    assert logits.isfinite().all()
    assert torch.equal(logits, logits_of(model, ids))
    assert torch.equal(logits, logits_of(random_model(model_class, tiny), ids))
    sizes = [get_size(tiny, name) for name in (VOCAB, HIDDEN, MLP, HEADS, EXPERTS)]
    if get_size(tiny, EXPERT_MLP) != get_size(tiny, MLP):
        sizes.append(get_size(tiny, EXPERT_MLP))
    known = [size for size in sizes if size is not None]
    assert len(set(known)) == len(known), known
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tiny_model_builds_and_runs(model_type: str):
    check(model_type)
