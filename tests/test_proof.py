"""The proof catches what is wrong, refuses with a reason, and settles what the tables of the literature would say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import ALL, HEADS, MLP, QUERIES, QUERY, SIZES, STREAM
from transformers import PretrainedConfig
from transformers.integrations import sdpa_attention

from hesso_hf import proof
from hesso_hf.groups import Scheme
from hesso_hf.inspection import inspect_model
from hesso_hf.proof import Proof, StructureProof, prove, proved_groups
from hesso_hf.sizes import model_class_of
from hesso_hf.tiny import random_model, tiny_config

Change = Callable[[Scheme], Scheme | None]
SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
COUPLED = {
    "gpt2": transformers.GPT2Config(vocab_size=99, n_layer=2, n_head=4, n_embd=48, n_inner=100),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=100),
    "bloom": transformers.BloomConfig(vocab_size=99, n_layer=2, n_head=4, hidden_size=48),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=100, word_embed_proj_dim=48),
}
FALCONS = {
    "multi-query": transformers.FalconConfig(**SMALL),
    "multi-head": transformers.FalconConfig(**SMALL, multi_query=False),
    "grouped": transformers.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),
}


def found(config: PretrainedConfig) -> Proof:
    return prove(model_class_of(config), config)


def proved_scheme(name: str, structure: str) -> Scheme:
    scheme = found(ALL[name].config()).structures[structure].scheme
    assert scheme is not None
    return scheme


def prove_only(monkeypatch: pytest.MonkeyPatch, name: str, structure: str, change: Change) -> StructureProof:
    """Prove with candidate schemes changed; those for which `change` returns None and repetitions are left out."""
    original = proof.candidate_schemes
    tried: list[Scheme] = []

    def changed(wanted: str, *args: Any) -> Iterator[Scheme]:
        for scheme in original(wanted, *args):
            other = change(scheme) if wanted == structure else scheme
            if other is not None and other not in tried:
                tried.append(other)
                yield other

    monkeypatch.setattr(proof, "candidate_schemes", changed)
    return found(ALL[name].config()).structures[structure]


def with_layout(pattern: str, kind: str) -> Change:
    def change(scheme: Scheme) -> Scheme:
        axis = next(axis for axis in scheme.layouts if axis[0].endswith(pattern))
        return replace(scheme, layouts=scheme.layouts | {axis: kind})

    return change


@pytest.mark.parametrize(
    ("name", "structure", "pattern", "right", "wrong"),
    [
        ("phi3", MLP, "gate_up_proj.weight", "stride", "block"),
        ("phi3", HEADS, "qkv_proj.weight", "segments", "block"),
        ("phi3", HEADS, "qkv_proj.weight", "segments", "stride"),
        ("llama", HEADS, "q_proj.weight", "block", "stride"),
        ("llama", HEADS, "o_proj.weight", "block", "stride"),
        ("llama-biases", HEADS, "q_proj.bias", "block", "stride"),
        ("glm4", MLP, "gate_up_proj.weight", "stride", "block"),
    ],
)
def test_a_wrong_layout_is_caught(
    name: str, structure: str, pattern: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
):
    layouts = proved_scheme(name, structure).layouts
    assert {kind for (parameter, _), kind in layouts.items() if parameter.endswith(pattern)} == {right}
    refused = prove_only(monkeypatch, name, structure, with_layout(pattern, wrong))
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-2
    assert "no layout reproduces the logits" in refused.reason


@pytest.mark.parametrize(
    ("name", "pattern", "right", "wrong"),
    [
        ("llama", "embed_tokens.weight", 1, 0),
        ("llama", "model.norm.weight", -1, -2),
        ("llama", "input_layernorm.weight", -1, 0),
        ("llama", "down_proj.weight", 1, 0),
        ("llama", "gate_proj.weight", 0, -1),
        ("llama-tied", "model.norm.weight", -2, -1),
        ("olmo2", "q_proj.weight", -1, 0),
        ("olmo2", "post_feedforward_layernorm.weight", 0, -1),
        ("exaone4", "up_proj.weight", -1, 0),
        ("gemma", "embed_tokens.weight", 0, 1),
        ("gemma2", "post_attention_layernorm.weight", 0, -1),
        ("gemma3_text", "model.norm.weight", -1, -2),
    ],
)
def test_a_wrong_power_is_caught(name: str, pattern: str, right: int, wrong: int, monkeypatch: pytest.MonkeyPatch):
    proved = proved_scheme(name, STREAM)
    powers = {parameter: power for parameter, power in proved.powers.items() if parameter.endswith(pattern)}
    assert set(powers.values()) == {right}

    def change(_: Scheme) -> Scheme:
        return replace(proved, powers=proved.powers | dict.fromkeys(powers, wrong))

    refused = prove_only(monkeypatch, name, STREAM, change)
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-3


def test_the_pre_norm_rule_is_refused_on_a_post_norm_model(monkeypatch: pytest.MonkeyPatch):
    def readers_alone(scheme: Scheme) -> Scheme | None:
        readers = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        return None if any(power for name, power in scheme.powers.items() if name.endswith(readers)) else scheme

    refused = prove_only(monkeypatch, "olmo2", STREAM, readers_alone)
    assert refused.scheme is None
    assert "best relative error" in refused.reason


@pytest.mark.parametrize(("name", "right"), [("gemma", 1.0), ("gemma2", 1.0), ("llama", 0.0), ("glm4", 0.0)])
def test_whether_a_norm_uses_w_or_one_plus_w_is_found_and_the_other_caught(
    name: str, right: float, monkeypatch: pytest.MonkeyPatch
):
    assert set(proved_scheme(name, STREAM).shifts.values()) == {right}
    monkeypatch.setattr(proof, "_norm_shift", lambda info, module: 1.0 - right)
    refused = found(ALL[name].config()).structures[STREAM]
    assert refused.scheme is None
    assert "best relative error" in refused.reason


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma"])
def test_a_changed_epsilon_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    original = proof.resized_config

    def changed(config: PretrainedConfig, sizes: dict[str, int]) -> PretrainedConfig:
        small = original(config, sizes)
        small.rms_norm_eps *= sizes["hidden_size"] / config.hidden_size if "hidden_size" in sizes else 1.0
        return small

    monkeypatch.setattr(proof, "resized_config", changed)
    structures = found(ALL[name].config()).structures
    assert structures[STREAM].scheme is None
    assert structures[MLP].scheme is not None  # whose sizes leave the width, and so the epsilon here, alone


def test_one_layer_of_each_kind_is_tried():
    config = ALL["gemma3_text"].config(num_hidden_layers=6)
    assert len(set(config.layer_types)) == 2
    tiny = tiny_config(model_class_of(config), config)
    assert tiny.num_hidden_layers == len(tiny.layer_types) == 2
    assert set(tiny.layer_types) == set(config.layer_types)
    groups, _, _ = proved_groups(model_class_of(config), config)
    assert sorted(groups.structures) == sorted((HEADS, MLP, STREAM))
    assert len(groups.structures[HEADS].layers) == 6


@pytest.mark.parametrize("config", COUPLED.values(), ids=COUPLED)
def test_where_head_dim_follows_the_width_heads_and_channels_are_refused_by_name(config: PretrainedConfig):
    groups, _, axis_map = proved_groups(model_class_of(config), config)
    assert "head_dim follows hidden_size / num_attention_heads" in groups.refused[HEADS]
    named = groups.refused[STREAM].split(" ")[0]
    assert named in {*axis_map.parameters, *(info.module for info in axis_map.parameters.values())}


def test_gpt_neox_keeps_its_mlp_channels():
    config = COUPLED["gpt_neox"]
    groups, proved, _ = proved_groups(model_class_of(config), config)
    assert list(groups.structures) == [MLP]
    assert groups.structures[MLP].num_units == 100
    assert proved.structures[MLP].relative_error is not None
    assert proved.structures[MLP].relative_error <= 1e-5


@pytest.mark.parametrize("config", [*COUPLED.values(), *FALCONS.values()], ids=[*COUPLED, *FALCONS])
def test_inspecting_a_coupled_architecture_answers_for_every_structure(config: PretrainedConfig):
    for name, structure in inspect_model(config).structures.items():
        assert structure.status == ("refused" if structure.reason else "proved"), name


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("phi", "model.layers.0.input_layernorm", "LayerNorm"),
        ("olmo", "model.layers.0.input_layernorm", "OlmoLayerNorm"),
        ("starcoder2", "model.layers.0.input_layernorm", "LayerNorm"),
        ("cohere2", "model.layers.0.input_layernorm", "Cohere2LayerNorm"),
    ],
)
def test_a_norm_that_subtracts_the_mean_is_named(name: str, module: str, kind: str):
    refused = found(ALL[name].config()).structures[STREAM]
    assert refused.scheme is None
    assert refused.reason.startswith(f"{module} ({kind}) subtracts the mean")


def test_query_heads_are_proved_with_the_other_structures_in_place_of_attention_heads():
    config = QUERIES["phi3-queries"].config()
    proved = prove(model_class_of(config), config, (QUERY, MLP, STREAM))
    assert [found.scheme is not None for found in proved.structures.values()] == [True, True, True]
    assert proved.joint_error is not None
    assert proved.joint_error <= 1e-5


def test_query_heads_of_another_grouping_are_not_proved(monkeypatch: pytest.MonkeyPatch):
    """Where query head h uses key-value head h % K, keeping as many of each run of heads mixes them up."""

    def repeated(states: torch.Tensor, times: int) -> torch.Tensor:
        return states.repeat(1, times, 1, 1)

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args: False)
    config = QUERIES["llama-queries"].config()
    assert prove(model_class_of(config), config, (QUERY,)).structures[QUERY].scheme is not None
    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeated)
    refused = prove(model_class_of(config), config, (QUERY,)).structures[QUERY]
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-2


def test_more_experts_per_token_than_the_tiny_model_has_experts_do_not_matter():
    """Qwen3-30B-A3B takes 8 of 128 experts, OLMoE 8 of 64, GPT-OSS 4 of 32."""
    sizes = SIZES | {"head_dim": 10, "num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 20}
    proved = found(transformers.Qwen3MoeConfig(**sizes, pad_token_id=0)).structures
    assert proved[HEADS].scheme is not None, proved[HEADS].reason
    assert proved[STREAM].scheme is not None, proved[STREAM].reason


def test_rotary_scaling_with_one_factor_per_frequency_leaves_the_mlp_channels():
    """Phi-3-mini-128k, Phi-3.5-mini and Phi-4-mini: longrope lists of head_dim / 2 factors."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.5] * 6}  # head_dim 72 / 6 = 12
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    config = transformers.Phi3Config(**SIZES, rope_parameters=rope, pad_token_id=0)
    random_model(model_class_of(config), config)  # the class accepts it
    structures = found(config).structures
    assert structures["mlp_channels"].scheme is not None, structures["mlp_channels"].reason
    # Phi3Config checks the lists against hidden_size // num_attention_heads, which either cut alone would change
    for name in ("attention_heads", "embedding_channels"):
        assert "short_factor" in structures[name].reason


def test_layers_of_several_widths_are_refused_not_crashed_on():
    """Gemma 4 has per-layer head sizes, which its config refuses to give as one number."""
    config = transformers.Gemma4TextConfig(**SIZES | {"num_hidden_layers": 6}, vocab_size_per_layer_input=97)
    random_model(model_class_of(config), config)  # the class accepts it
    for structure in inspect_model(config).structures.values():
        assert structure.status == ("refused" if structure.reason else "proved")
