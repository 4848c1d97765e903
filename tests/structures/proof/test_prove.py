"""The proof catches what is wrong, refuses with a reason, and settles what the tables of the literature would say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations import sdpa_attention

from hesso_hf.budget.inspect import inspect_model
from hesso_hf.hf_models.build import model_class_of
from hesso_hf.hf_models.tiny_configs import tiny_config
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.structures.groups import AxisName, Scheme, StructureGroups
from hesso_hf.structures.layout import Layout, Segment
from hesso_hf.structures.proof import residual_stream as streams
from hesso_hf.structures.proof import schemes, tiny_case
from hesso_hf.structures.proof.norms import VectorRole
from hesso_hf.structures.proof.prove import prove, proved_groups
from hesso_hf.structures.proof.result import Proof, StructureProof
from hesso_hf.structures.shape_probe import ParameterInfo
from tests.support.families import ALL, HEADS, MLP, QUERIES, QUERY, SIZES, STREAM

Change = Callable[[Scheme], Scheme | None]
SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
COUPLED = {
    "gpt2": transformers.GPT2Config(vocab_size=99, n_layer=2, n_head=4, n_embd=48, n_inner=100),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=100),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=100),
}
REFUSED = {
    "bert": transformers.BertConfig(**SMALL, intermediate_size=100, is_decoder=True),
    "bart": transformers.BartConfig(
        vocab_size=99, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=100, decoder_ffn_dim=100,
    ),
    "bloom": transformers.BloomConfig(vocab_size=99, n_layer=2, n_head=4, hidden_size=48),
    "mpt": transformers.MptConfig(vocab_size=99, n_layers=2, n_heads=4, d_model=48),
    "falcon-alibi": transformers.FalconConfig(**SMALL, alibi=True, ffn_hidden_size=100),
}  # fmt: skip
REASONS = {  # of those whose norms lie on the stream: the first such norm
    "bert": "is the output of a norm (bert.embeddings.LayerNorm)",
    "bart": "is the output of a norm (model.decoder.layernorm_embedding)",
    "bloom": "is the output of a norm (transformer.word_embeddings_layernorm)",
}
FALCONS = {
    "multi-query": transformers.FalconConfig(**SMALL),
    "multi-head": transformers.FalconConfig(**SMALL, multi_query=False),
    "grouped": transformers.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2),
}


def found(config: PretrainedConfig) -> Proof:
    return prove(model_class_of(config), config)


@cache
def proof_of(name: str) -> Proof:
    return found(ALL[name].config())


def proved_scheme(name: str, structure: str) -> Scheme:
    proved = proof_of(name).structures[structure]
    assert proved.scheme is not None, proved.reason
    return proved.scheme


def layouts_of(scheme: Scheme) -> dict[AxisName, Layout]:
    return {axis: layout for branch in scheme.branches for axis, layout in branch.layouts.items()}


def prove_only(monkeypatch: pytest.MonkeyPatch, name: str, structure: str, change: Change) -> StructureProof:
    """Prove with candidate schemes changed; those for which `change` returns None and repetitions are left out."""
    function = "stream_schemes" if structure == STREAM else "schemes_of"
    original = getattr(schemes, function)
    tried: list[str] = []

    def changed(*args: Any, **options: Any) -> Iterator[Scheme]:
        for scheme in original(*args, **options):
            other = change(scheme)
            if other is not None and repr(other) not in tried:
                tried.append(repr(other))
                yield other

    monkeypatch.setattr(schemes, function, changed)
    config = ALL[name].config()
    refused = prove(model_class_of(config), config, (structure,)).structures[structure]
    assert tried
    return refused


def with_layout(pattern: str, layout: Layout) -> Change:
    def change(scheme: Scheme) -> Scheme:
        assert any(axis[0].endswith(pattern) for axis in layouts_of(scheme))
        branches = []
        for branch in scheme.branches:
            changed = {axis: layout for axis in branch.layouts if axis[0].endswith(pattern)}
            branches.append(replace(branch, layouts=branch.layouts | changed))
        return replace(scheme, branches=tuple(branches))

    return change


@pytest.mark.parametrize(
    ("name", "structure", "pattern", "right", "wrong"),
    [
        ("phi3", MLP, "gate_up_proj.weight", "stride(2x1)", (1, 2)),
        ("phi3", HEADS, "qkv_proj.weight", "segments(16, 2x8)", (1, 32)),
        ("phi3", HEADS, "qkv_proj.weight", "segments(16, 2x8)", (4, 8)),
        ("llama", HEADS, "q_proj.weight", "block(16)", (2, 8)),
        ("llama", HEADS, "o_proj.weight", "block(16)", (2, 8)),
        ("llama-biases", HEADS, "q_proj.bias", "block(16)", (2, 8)),
        ("glm4", MLP, "gate_up_proj.weight", "stride(2x1)", (1, 2)),
    ],
)
def test_a_wrong_layout_is_caught(
    name: str, structure: str, pattern: str, right: str, wrong: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    layouts = layouts_of(proved_scheme(name, structure))
    assert {str(layout) for (parameter, _), layout in layouts.items() if parameter.endswith(pattern)} == {right}
    refused = prove_only(monkeypatch, name, structure, with_layout(pattern, Layout((Segment(*wrong),))))
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-2
    assert "however they are cut out of a tiny random model, its logits change" in refused.reason


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
    scheme = proved_scheme(name, STREAM)
    norms = [pattern for pattern in scheme.powers if "norm" in pattern]
    assert {scheme.shifts.get(pattern, 0.0) for pattern in norms} == {right}
    swapped = replace(scheme, shifts=dict.fromkeys(norms, 1.0 - right))
    refused = prove_only(monkeypatch, name, STREAM, lambda _: swapped)
    assert refused.scheme is None
    assert "best relative error" in refused.reason


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma"])
def test_a_changed_epsilon_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    original = tiny_case.buildable_config

    def changed(model_class: Any, config: PretrainedConfig, sizes: dict[str, int], known: Any) -> PretrainedConfig:
        small = original(model_class, config, sizes, known)
        small.rms_norm_eps *= sizes["hidden_size"] / config.hidden_size if "hidden_size" in sizes else 1.0
        return small

    monkeypatch.setattr(tiny_case, "buildable_config", changed)
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


@pytest.mark.parametrize("name", ["phi", "olmo", "cohere2"])
def test_without_centring_a_norm_that_subtracts_the_mean_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    assert proved_scheme(name, STREAM).centred
    refused = prove_only(monkeypatch, name, STREAM, lambda scheme: replace(scheme, centred=frozenset()))
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-2


@pytest.mark.parametrize("left_out", ["embed_tokens.weight", "dense.weight", "fc2.bias"])
def test_every_writer_must_be_centred(left_out: str, monkeypatch: pytest.MonkeyPatch):
    def but_one(scheme: Scheme) -> Scheme:
        assert any(pattern.endswith(left_out) for pattern in scheme.centred)
        return replace(scheme, centred=frozenset(name for name in scheme.centred if not name.endswith(left_out)))

    refused = prove_only(monkeypatch, "phi", STREAM, but_one)
    assert refused.scheme is None
    assert refused.relative_error is not None
    assert refused.relative_error > 1e-3


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "olmo2"])
def test_nothing_is_centred_where_norms_leave_the_mean_alone(name: str):
    config = ALL[name].config()
    assert not proved_scheme(name, STREAM).centred
    groups, _, _ = proved_groups(model_class_of(config), config)
    assert not any(axis.centred for _, axis in groups.structures[STREAM].all_axes())
    parameters = dict(random_model(model_class_of(config), config).named_parameters())
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    BoundGroups(parameters, groups).centre_({STREAM: torch.ones(1, config.hidden_size)})
    assert all(torch.equal(parameter, before[key]) for key, parameter in parameters.items())


def test_norms_of_both_kinds_on_one_stream_are_refused(monkeypatch: pytest.MonkeyPatch):
    original = streams.vector_role

    def mixed(info: ParameterInfo, module: nn.Module) -> VectorRole:
        role = original(info, module)
        return replace(role, subtracts_mean=True) if info.name.endswith("input_layernorm.weight") else role

    monkeypatch.setattr(streams, "vector_role", mixed)
    refused = found(ALL["llama"].config()).structures[STREAM]
    assert refused.scheme is None
    assert "input_layernorm) , others don't" in refused.reason.replace(")", ") ", 1)
    assert refused.reason.startswith("some norms of the stream subtract its mean")


@pytest.mark.parametrize("name", COUPLED)
def test_where_head_dim_follows_the_width_heads_and_channels_are_proved_together(name: str):
    groups, proved, axis_map = proved_groups(model_class_of(COUPLED[name]), COUPLED[name])
    assert sorted(groups.structures) == sorted((HEADS, MLP, STREAM)), groups.refused
    assert proved.coupled
    assert proved.joint_error is not None
    assert proved.joint_error <= 1e-5
    assert axis_map.coupled_head_dim == 12
    assert groups.coupled == {HEADS: 1, STREAM: 12}
    assert groups.structures[MLP].num_units == 100
    assert set(groups.independent) == {HEADS, MLP}
    assert groups.with_coupled({HEADS: 3, MLP: 5}) == {HEADS: 3, MLP: 5, STREAM: 36}
    assert groups.with_coupled({MLP: 5}) == {MLP: 5}


def test_a_coupled_group_size_counts_the_heads_of_a_key_value_head():
    groups, _, _ = proved_groups(model_class_of(FALCONS["grouped"]), FALCONS["grouped"])
    assert (groups.structures[HEADS].num_units, groups.coupled) == (2, {HEADS: 1, STREAM: 24})


@pytest.mark.parametrize("pattern", ["c_attn.weight", "query_key_value.weight"])
def test_a_wrong_layout_of_coupled_heads_is_caught(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """GPT-2 keeps all queries, then all keys, then all values; GPT-NeoX each head's three together."""
    name, wrong = ("gpt2", (1, 36)) if pattern.startswith("c_attn") else ("gpt_neox", (3, 12))
    proved = found(COUPLED[name]).structures[HEADS].scheme
    assert proved is not None
    (right,) = {layout for (axis, _), layout in layouts_of(proved).items() if axis.endswith(pattern)}
    assert str(right) == {"gpt2": "stride(3x12)", "gpt_neox": "block(36)"}[name]
    original, change = schemes.schemes_of, with_layout(pattern, Layout((Segment(*wrong),)))

    def changed(bench: Any, branches: Any, units: int, axes: Any, granule: int = 1, **more: int) -> Iterator[Scheme]:
        for scheme in original(bench, branches, units, axes, granule, **more):
            yield change(scheme) if granule > 1 else scheme

    monkeypatch.setattr(schemes, "schemes_of", changed)
    structures = found(COUPLED[name]).structures
    assert structures[HEADS].scheme is structures[STREAM].scheme is None
    assert structures[MLP].scheme is not None
    assert "however they are cut out of a tiny random model, its logits change" in structures[HEADS].reason


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_the_error_and_the_rest_kept(name: str):
    """Post-norm models norm the stream itself; ALiBi's slopes follow the number of heads."""
    groups, _, _ = proved_groups(model_class_of(REFUSED[name]), REFUSED[name])
    for structure in (HEADS, STREAM):
        assert structure not in groups.structures
        assert "best relative error" in groups.refused[structure]
        assert REASONS.get(name, "however they are cut out") in groups.refused[structure]
    if name in ("bert", "bart", "falcon-alibi"):
        assert list(groups.structures) == [MLP]


def test_units_that_stay_are_never_just_the_first_ones():
    """Else what depends on a unit's position (the slopes of ALiBi) would look exact."""
    structure = StructureGroups(HEADS, {}, 3, ("",), ())
    for seed in range(20):
        kept = tiny_case._random_units(structure, 2, torch.Generator().manual_seed(seed))
        assert kept != (0, 1), seed


@pytest.mark.parametrize("config", FALCONS.values(), ids=FALCONS)
def test_inspecting_a_coupled_architecture_answers_for_every_structure(config: PretrainedConfig):
    for name, structure in inspect_model(config).structures.items():
        assert (structure.status == "proved") == (not structure.reason), name


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


def test_rotary_scaling_with_one_factor_per_frequency_makes_heads_and_width_shrink_together():
    """Phi-3-mini-128k, Phi-3.5-mini and Phi-4-mini: longrope lists of head_dim / 2 factors.

    Phi3Config checks the lists against hidden_size // num_attention_heads, which either cut alone would change.
    """
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.5] * 6}  # head_dim 72 / 6 = 12
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    config = transformers.Phi3Config(**SIZES, rope_parameters=rope, pad_token_id=0)
    random_model(model_class_of(config), config)  # the class accepts it
    groups, proved, _ = proved_groups(model_class_of(config), config)
    assert sorted(groups.structures) == sorted((HEADS, MLP, STREAM)), groups.refused
    assert groups.coupled == {HEADS: 1, STREAM: 24}
    assert proved.joint_error is not None
    assert proved.joint_error <= 1e-5


def test_layers_of_several_widths_are_refused_not_crashed_on():
    """Gemma 4 has per-layer head sizes, which its config refuses to give as one number."""
    config = transformers.Gemma4TextConfig(**SIZES | {"num_hidden_layers": 6}, vocab_size_per_layer_input=97)
    random_model(model_class_of(config), config)  # the class accepts it
    for structure in inspect_model(config).structures.values():
        assert (structure.status == "proved") == (not structure.reason)


def test_a_proof_depends_on_neither_its_callers_random_numbers_nor_its_mode():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=100, num_key_value_heads=2)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.no_grad():
            found.append(prove(transformers.LlamaForCausalLM, config))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
