"""Sizes: what the model code derives, mixers that fill the width times a whole number, sizes of single layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hesso_hf import export_pruned
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.resize import resized_config
from hesso_hf.hf_models.sizes import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    ConfigSizes,
    common_size,
    get_size,
    set_common_size,
    set_common_value,
    set_sizes,
)
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.structures.build import num_units, unit_increments
from hesso_hf.structures.cut import zero_units_
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.shape_probe import probe_axes
from tests.support.checks import needs
from tests.support.tiny import tiny_gpt2

MLP_UNITS = "mlp_channels"


@pytest.mark.parametrize(
    ("model_type", "expansion", "heads"),
    [
        ("bamba", "mamba_expand", "mamba_n_heads"),
        ("granitemoehybrid", "mamba_expand", "mamba_n_heads"),
        ("mamba2", "expand", "num_heads"),
    ],
)
def test_the_mixer_stays_where_a_whole_number_of_widths_makes_it_up(
    model_type: str, expansion: str, heads: str
) -> None:
    _, config = default_config(model_type)
    small = resized_config(config, {HIDDEN: config.hidden_size // 2})
    assert getattr(small, expansion) == 2 * getattr(config, expansion)
    assert getattr(small, heads) == getattr(config, heads)
    with pytest.raises(HessoError, match="refuses"):
        resized_config(config, {HIDDEN: config.hidden_size - 128})


@pytest.mark.parametrize("model_type", ["nemotron_h", "falcon_h1", "mamba", "zamba"])
def test_other_classes_keep_what_they_say(model_type: str) -> None:
    _, config = default_config(model_type)
    small = resized_config(config, {HIDDEN: config.hidden_size // 2})
    for name in ("expand", "mamba_expand"):
        assert getattr(small, name, None) == getattr(config, name, None)


def test_the_probe_sees_the_mixer_at_rest() -> None:
    model_class, config = default_config("bamba")
    tiny = tiny_config(model_class, config)
    moved = {name for name, dim in probe_axes(model_class, tiny).moving((HIDDEN,)) if "mamba" in name}
    assert {name.partition("mamba.")[2] for name in moved} == {"in_proj.weight", "out_proj.weight"}
    assert all(
        dim == {"in_proj.weight": 1, "out_proj.weight": 0}[name.partition("mamba.")[2]]
        for name, dim in probe_axes(model_class, tiny).moving((HIDDEN,))
        if "mamba" in name
    )


def test_resolved_sizes_are_found_once_and_do_not_change_with_the_config() -> None:
    _, config = default_config("gpt2")
    sizes = ConfigSizes.of(config)
    config.n_embd, config.n_inner = 48, 20
    assert (sizes.get(HIDDEN), sizes.get(MLP), sizes.mlp_is_derived) == (768, 3072, True)
    assert ConfigSizes.of(config).mlp_is_derived is False


def test_a_report_says_the_size_that_the_code_derived(tmp_path: Path) -> None:
    model = tiny_gpt2(n_inner=None)
    layers = tuple(tuple(range(100)) for _ in range(model.config.n_layer))
    kept = KeptUnits({MLP_UNITS: 240}, {MLP_UNITS: layers})
    groups, _, _ = proved_groups(type(model), model.config, (MLP_UNITS,))
    zero_units_(dict(model.named_parameters()), groups, kept)
    report = export_pruned(model, tmp_path / "small", kept_units=kept)
    assert (report.sizes_before, report.sizes_after) == ({MLP: 240}, {MLP: 100})


# -- sizes of single layers: heads that differ count in parts, and all layers shrink alike


def heads(config: Any) -> list[int]:
    return [layer.num_attention_heads for layer in config.per_layer_config]


@needs("dots3_note_text")
def test_a_part_is_as_many_heads_of_each_layer_as_go_with_one_of_the_fewest() -> None:
    _, config = default_config("dots3_note_text")
    assert set(heads(config)) == {128, 64}
    assert get_size(config, HEADS) == common_size(config, HEADS) == 64
    assert unit_increments("attention_heads", ConfigSizes.of(config)) == {HEADS: 1, KV_HEADS: 1}
    assert num_units("attention_heads", ConfigSizes.of(config)) == 64


@needs("dots3_note_text")
def test_all_layers_keep_their_ratio() -> None:
    _, config = default_config("dots3_note_text")
    before = heads(config)
    small = resized_config(config, {HEADS: 48, KV_HEADS: 48})
    assert heads(small) == [size * 48 // 64 for size in before]
    assert get_size(small, HEADS) == get_size(small, KV_HEADS) == 48
    again = type(small).from_dict(small.to_dict())
    assert heads(again) == heads(small)
    assert heads(config) == before


@needs("dots3_note_text")
def test_the_tiny_config_keeps_the_ratio_too() -> None:
    model_class, config = default_config("dots3_note_text")
    assert set(heads(tiny_config(model_class, config))) == {10, 5}


def test_a_size_that_no_layer_has_for_itself_is_no_part() -> None:
    _, config = default_config("llama")
    assert common_size(config, HEADS) is None
    set_sizes(config, {HEADS: 4})
    assert config.num_attention_heads == 4


@needs("dots3_note_text")
def test_sizes_are_written_once_for_each_layer() -> None:
    _, config = default_config("dots3_note_text")
    set_common_size(config, HEADS, 3)
    set_common_size(config, KV_HEADS, 3)
    assert set(heads(config)) == {6, 3}
    values = {"n": 12, "per_layer_config": {"1": {"n": 8}, "2": {"other": 5}}}
    set_common_value(values, "n", 5)
    assert values == {"n": 15, "per_layer_config": {"1": {"n": 10}, "2": {"other": 5}}}
