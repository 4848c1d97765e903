"""Sizes of single layers: numbers of heads that differ count in parts, and all layers shrink alike."""

from __future__ import annotations

from typing import Any

from hesso_hf.hf_models.by_layer import common_size, set_common_size, set_common_value
from hesso_hf.hf_models.resize import resized_config
from hesso_hf.hf_models.sizes import HEADS, KV_HEADS, ConfigSizes, get_size, set_sizes
from hesso_hf.hf_models.tiny_config import default_config, tiny_config
from hesso_hf.structures.build import num_units, unit_increments


def heads(config: Any) -> list[int]:
    return [layer.num_attention_heads for layer in config.per_layer_config]


def test_a_part_is_as_many_heads_of_each_layer_as_go_with_one_of_the_fewest() -> None:
    _, config = default_config("dots3_note_text")
    assert set(heads(config)) == {128, 64}
    assert get_size(config, HEADS) == common_size(config, HEADS) == 64
    assert unit_increments("attention_heads", ConfigSizes.of(config)) == {HEADS: 1, KV_HEADS: 1}
    assert num_units("attention_heads", ConfigSizes.of(config)) == 64


def test_all_layers_keep_their_ratio() -> None:
    _, config = default_config("dots3_note_text")
    before = heads(config)
    small = resized_config(config, {HEADS: 48, KV_HEADS: 48})
    assert heads(small) == [size * 48 // 64 for size in before]
    assert get_size(small, HEADS) == get_size(small, KV_HEADS) == 48
    again = type(small).from_dict(small.to_dict())
    assert heads(again) == heads(small)
    assert heads(config) == before


def test_the_tiny_config_keeps_the_ratio_too() -> None:
    model_class, config = default_config("dots3_note_text")
    assert set(heads(tiny_config(model_class, config))) == {10, 5}


def test_a_size_that_no_layer_has_for_itself_is_no_part() -> None:
    _, config = default_config("llama")
    assert common_size(config, HEADS) is None
    set_sizes(config, {HEADS: 4})
    assert config.num_attention_heads == 4


def test_sizes_are_written_once_for_each_layer() -> None:
    _, config = default_config("dots3_note_text")
    set_common_size(config, HEADS, 3)
    set_common_size(config, KV_HEADS, 3)
    assert set(heads(config)) == {6, 3}
    values = {"n": 12, "per_layer_config": {"1": {"n": 8}, "2": {"other": 5}}}
    set_common_value(values, "n", 5)
    assert values == {"n": 15, "per_layer_config": {"1": {"n": 10}, "2": {"other": 5}}}
