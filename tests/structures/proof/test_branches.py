"""Divisions: heads that only go in pairs or fours, sizes that count twice, matrices of all experts' rows."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig, T5Config, T5ForConditionalGeneration

from hesso_hf.hf_models.sizes import ConfigSizes
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.structures.experts import EXPERT_UNITS
from hesso_hf.structures.groups import Scheme
from hesso_hf.structures.proof.branches import Division, divisions
from hesso_hf.structures.proof.ownership import GradientProbe
from hesso_hf.structures.proof.prove import prove
from hesso_hf.structures.proof.result import Proof, groups_of
from tests.support.families import HEADS, MLP, STREAM


@pytest.mark.parametrize(
    ("structure", "config", "bundles"),
    [
        (HEADS, GPT2Config(n_head=8, n_embd=96), [1, 2, 4]),
        (HEADS, GPT2Config(n_head=5, n_embd=60), [1]),
        (HEADS, GPT2Config(n_head=4, n_embd=48), [1, 2]),  # a single unit couldn't go
        (HEADS, LlamaConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=6), [1]),
        (HEADS, MambaConfig(), [1]),
        (MLP, LlamaConfig(intermediate_size=42), [1, 2]),
        (STREAM, LlamaConfig(), [1]),
    ],
)
def test_the_finest_division_comes_first_and_leaves_two_units(structure: str, config: LlamaConfig, bundles: list[int]):
    found = divisions(structure, ConfigSizes.of(config))
    assert list(dict.fromkeys(division.bundle for division in found)) == bundles
    assert found[0] == Division()


def scheme_of(model_type: str, structure: str, together: tuple[str, ...]) -> Scheme:
    model_class, config = default_config(model_type)
    found = prove(model_class, config, together).structures[structure]
    assert isinstance(found.scheme, Scheme), found.reason
    return found.scheme


@pytest.mark.parametrize(
    ("model_type", "structure", "bundle", "layouts"),
    [
        ("moshi", MLP, 2, {"fc1": "stride(2x1)", "fc2": "block(1)"}),
        ("dbrx", MLP, 1, {"w1": "stride(4x1)", "v1": "stride(4x1)", "w2": "stride(4x1)"}),
        ("jetmoe", HEADS, 1, {"kv_proj": "stride(2x8)", "input_linear": "block(8)", "output_linear": "block(8)"}),
        (
            "diffllama",
            HEADS,
            2,
            {"q_proj": "stride(2x8)", "k_proj": "stride(2x8)", "v_proj": "stride(2x8)", "o_proj": "block(16)"},
        ),
        pytest.param(
            "codegen",
            HEADS,
            4,
            {"qkv_proj": "stride(12x12)", "out_proj": "stride(4x12)"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_units_are_as_fine_as_the_code_allows(model_type: str, structure: str, bundle: int, layouts: dict[str, str]):
    scheme = scheme_of(model_type, structure, (HEADS, STREAM) if model_type == "codegen" else (structure,))
    assert scheme.bundle == bundle
    found = {
        pattern.removesuffix(".weight").rpartition(".")[2]: str(layout)
        for branch in scheme.branches
        for (pattern, _), layout in branch.layouts.items()
    }
    assert found == layouts


def test_a_bundle_of_the_tiny_model_is_one_of_every_size():
    model_class, config = default_config("moshi")
    proof = prove(model_class, config, (MLP,))
    config.num_hidden_layers = 2
    groups = groups_of(model_class, config, proof)[0].structures[MLP]
    assert (groups.num_units, groups.increments) == (config.ffn_dim // 2, {"intermediate_size": 2})
    assert groups.config_sizes(100) == {"intermediate_size": 200}


def test_more_experts_are_more_runs_and_experts_exclude_their_channels():
    model_class, config = default_config("dbrx")
    proof = prove(model_class, config, (MLP, EXPERT_UNITS))
    tiny = tiny_config(model_class, config)
    tiny.ffn_config.moe_num_experts = 6
    groups = groups_of(model_class, tiny, proof)[0]
    assert {str(axis.layout) for _, axis in groups.structures[MLP].all_axes()} == {"stride(6x1)"}
    assert "along one dimension" in groups.refused[EXPERT_UNITS]
    alone = groups_of(model_class, tiny, Proof({EXPERT_UNITS: proof.structures[EXPERT_UNITS]}))[0]
    assert EXPERT_UNITS in alone.structures


def test_the_same_readers_are_zeroed_once_however_many_branches_there_are(monkeypatch: pytest.MonkeyPatch):
    plain, zeroed = GradientProbe._found, []

    def found(probe: GradientProbe, units: int, zero, axes):
        with probe.undone():
            for parameter in probe.parameters.values():
                parameter.fill_(1.0)
            zero(torch.arange(units) == 0)
            zeroed.append(tuple((p == 0).numpy().tobytes() for p in probe.parameters.values()))
        return plain(probe, units, zero, axes)

    monkeypatch.setattr(GradientProbe, "_found", found)
    sizes = {"d_model": 60, "d_kv": 8, "d_ff": 44, "num_heads": 6, "num_layers": 1, "vocab_size": 67}
    assert prove(T5ForConditionalGeneration, T5Config(**sizes), (HEADS,)).structures[HEADS].scheme is not None
    assert len(zeroed) > 10
    assert len(set(zeroed)) == len(zeroed)
