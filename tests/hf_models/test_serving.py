"""What is said of engines that take a size for another: which, for whom, and sizes that suit."""

from __future__ import annotations

import re

import pytest
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from hesso_hf.hf_models.serving import not_served_as_they_are, served_by


def sized(kind: type[PretrainedConfig], **sizes: int) -> PretrainedConfig:
    usual = {"hidden_size": 576, "intermediate_size": 416, "num_attention_heads": 6, "num_key_value_heads": 2}
    return kind(**(usual | {"head_dim": 64} | sizes))


@pytest.mark.parametrize(
    ("kind", "engines"),
    [(LlamaConfig, ["CTranslate2"]), (Qwen2Config, ["vLLM", "llama.cpp"]), (MistralConfig, [])],
)
def test_engines_that_derive_head_dim_are_named_for_the_classes_where_they_do(
    kind: type[PretrainedConfig], engines: list[str]
) -> None:
    found = not_served_as_they_are(sized(kind))
    assert [said.split(" ")[0] for said in found] == engines
    for said in found:
        assert f"head_dim of {kind.model_type} as hidden_size / num_attention_heads (576 / 6)" in said
        assert "though the config says 64, and " in said


@pytest.mark.parametrize(
    ("kind", "sizes", "engines"),
    [
        (LlamaConfig, {}, ["vLLM", "llama.cpp"]),
        (LlamaConfig, {"head_dim": 48}, ["llama.cpp"]),  # which vLLM has no kernels for
        (Qwen2Config, {}, []),
        (Qwen2Config, {"hidden_size": 384}, ["vLLM", "llama.cpp"]),
        (Qwen3MoeConfig, {}, []),
        (ViTConfig, {}, []),
    ],
)
def test_engines_that_read_a_model_as_it_is(
    kind: type[PretrainedConfig], sizes: dict[str, int], engines: list[str]
) -> None:
    assert served_by(sized(kind, **sizes)) == engines


def test_a_model_that_an_engine_knows_by_its_layers_is_named_with_so_many_alone() -> None:
    (said,) = not_served_as_they_are(sized(Gemma3TextConfig, num_hidden_layers=62))
    assert said.startswith("llama.cpp computes head_dim of gemma3_text as hidden_size / num_attention_heads (576 / 6)")
    assert not not_served_as_they_are(sized(Gemma3TextConfig, num_hidden_layers=34))


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 320, "num_attention_heads": 8, "num_key_value_heads": 4}])
def test_the_sizes_that_are_named_suit(sizes: dict[str, int]) -> None:
    config = sized(LlamaConfig, **sizes)
    (said,) = not_served_as_they_are(config)
    named = re.search(r"num_attention_heads (\d+) and num_key_value_heads (\d+) with hidden_size (\d+)", said)
    assert named is not None
    heads, groups, hidden = map(int, named.groups())
    assert heads % (config.num_attention_heads // config.num_key_value_heads) == 0
    assert hidden <= config.hidden_size
    assert groups * config.num_attention_heads == heads * config.num_key_value_heads
    assert not not_served_as_they_are(
        sized(LlamaConfig, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups)
    )


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ((9, 3, 576), (6, 2, 576), "num_attention_heads 6 and num_key_value_heads 2 with hidden_size 384 (`target_"),
        ((9, 1, 576), (9, 1, 540), "it would serve heads and width that stay whole: leave both out of `structures`"),
    ],
    ids=["fewer heads", "one group"],
)
def test_the_full_models_own_heads_and_width_are_not_named(
    before: tuple[int, ...], after: tuple[int, ...], named: str
) -> None:
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    full, small = (dict(zip(names, sizes, strict=True)) for sizes in (before, after))
    (said,) = (line for line in not_served_as_they_are(sized(LlamaConfig, **small), full) if "CTranslate2" in line)
    assert named in said
    assert "num_attention_heads 9" not in said


def test_rows_that_no_block_of_a_quantisation_divides_are_named() -> None:
    (said,) = not_served_as_they_are(sized(MistralConfig, hidden_size=570, intermediate_size=410))
    assert "hidden_size (570) and intermediate_size (410) are no multiples of these; set `round_to` to a mult" in said
    (said,) = not_served_as_they_are(sized(MistralConfig, intermediate_size=400))
    assert "and intermediate_size (400) is no multiple of" in said
    experts = Qwen3MoeConfig(hidden_size=64, intermediate_size=96, moe_intermediate_size=100, head_dim=16)
    (said,) = not_served_as_they_are(experts)
    assert "and moe_intermediate_size (100) is no multiple of" in said
    assert not not_served_as_they_are(ViTConfig(hidden_size=90, num_attention_heads=3))
