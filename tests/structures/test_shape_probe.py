"""The shape probe: axes and slopes from parameter shapes alone, on the meta device."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hesso_hf.hf_models.build import build_meta, model_class_of
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.structures.proof.prove import prove
from hesso_hf.structures.shape_probe import AxisMap, ParameterInfo, describe_parameters, probe_axes
from tests.support import forks
from tests.support.families import ALL, OTHERS

HEADS, KV, MLP, HIDDEN = "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"


def probed(name: str, **changes: int) -> AxisMap:
    config = ALL[name].config(**changes)
    return probe_axes(model_class_of(config), config)


def slopes_in_layer(axis_map: AxisMap, layer: int = 1) -> dict[str, dict[int, dict[str, int]]]:
    prefix, found = f"model.layers.{layer}.", {}
    for (name, dim), slopes in axis_map.slopes.items():
        if name.startswith(prefix):
            found.setdefault(name.removeprefix(prefix).removesuffix(".weight"), {})[dim] = slopes
    return found


def test_llama_slopes_are_exactly_these():
    axis_map = probed("llama")  # head_dim 10, 6 heads over 3 key-value heads
    assert not axis_map.failed
    assert slopes_in_layer(axis_map) == {
        "self_attn.q_proj": {0: {HEADS: 10}, 1: {HIDDEN: 1}},
        "self_attn.k_proj": {0: {KV: 10}, 1: {HIDDEN: 1}},
        "self_attn.v_proj": {0: {KV: 10}, 1: {HIDDEN: 1}},
        "self_attn.o_proj": {0: {HIDDEN: 1}, 1: {HEADS: 10}},
        "mlp.gate_proj": {0: {MLP: 1}, 1: {HIDDEN: 1}},
        "mlp.up_proj": {0: {MLP: 1}, 1: {HIDDEN: 1}},
        "mlp.down_proj": {0: {HIDDEN: 1}, 1: {MLP: 1}},
        "input_layernorm": {0: {HIDDEN: 1}},
        "post_attention_layernorm": {0: {HIDDEN: 1}},
    }
    outside = {axis: slopes for axis, slopes in axis_map.slopes.items() if ".layers." not in axis[0]}
    assert outside == {
        ("model.embed_tokens.weight", 1): {HIDDEN: 1},
        ("model.norm.weight", 0): {HIDDEN: 1},
        ("lm_head.weight", 1): {HIDDEN: 1},
    }


def test_phi3_slopes_count_both_key_and_value_and_both_gate_and_up():
    slopes = slopes_in_layer(probed("phi3"))  # head_dim 72 / 6 = 12, written explicitly by the probe
    assert slopes["self_attn.qkv_proj"] == {0: {HEADS: 12, KV: 24}, 1: {HIDDEN: 1}}
    assert slopes["mlp.gate_up_proj"] == {0: {MLP: 2}, 1: {HIDDEN: 1}}
    assert slopes["self_attn.o_proj"] == {0: {HIDDEN: 1}, 1: {HEADS: 12}}


@pytest.mark.parametrize("name", ["llama-square", "qwen2", "phi", "olmo", "granite", "starcoder2", "exaone4"])
def test_heads_and_width_are_independent_once_head_dim_is_written(name: str):
    for axis, slopes in probed(name).slopes.items():
        assert HIDDEN not in slopes or set(slopes) == {HIDDEN}, axis


@pytest.mark.parametrize(
    ("name", "parameter", "role"),
    [
        ("llama-biases", "model.embed_tokens.weight", "embedding"),
        ("llama-biases", "lm_head.weight", "output"),
        ("llama-biases", "model.norm.weight", "norm"),
        ("llama-biases", "model.layers.0.input_layernorm.weight", "norm"),
        ("llama-biases", "model.layers.0.self_attn.q_proj.weight", "matrix"),
        ("llama-biases", "model.layers.0.self_attn.q_proj.bias", "bias"),
        ("llama-biases", "model.layers.0.mlp.down_proj.bias", "bias"),
        ("phi", "model.layers.0.input_layernorm.weight", "norm"),
        ("phi", "lm_head.bias", "bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", "norm"),
    ],
)
def test_roles(name: str, parameter: str, role: str):
    assert probed(name).parameters[parameter].role == role


def test_a_tied_matrix_is_one_parameter_with_the_role_of_the_embedding():
    parameters = probed("llama-tied").parameters
    assert "lm_head.weight" not in parameters
    assert parameters["model.embed_tokens.weight"].role == "embedding"


def test_layers_are_the_outermost_list_entries_also_inside_experts():
    parameters = probed("mixtral").parameters
    for name, info in parameters.items():
        expected = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        assert info.layer == expected, name
        assert info.module == name.rpartition(".")[0]
    assert {info.layer for info in parameters.values()} == {"", "model.layers.0", "model.layers.1"}


OTHER = {family.name: family for family in OTHERS}


def described(name: str, **changes: int) -> dict[str, ParameterInfo]:
    config = OTHER[name].config(**changes)
    return describe_parameters(build_meta(model_class_of(config), config))


def test_patterns_are_the_same_in_every_layer_of_a_kind():
    """GLM-4-MoE's first layers have an MLP, the others experts: their parameters aren't the same, so nor patterns."""
    parameters = described("glm4_moe", num_hidden_layers=4, first_k_dense_replace=2)
    kinds = {}
    for info in parameters.values():
        if info.layer:
            kinds.setdefault(info.layer, set()).add(info.kind)
    dense, experts = ({kinds[f"model.layers.{i}"].pop(), kinds[f"model.layers.{i + 1}"].pop()} for i in (0, 2))
    assert len(dense) == len(experts) == 1
    assert len(dense | experts) == 2
    assert all(kind.startswith("model.layers.*") for kind in dense | experts)
    patterns = {parameters[f"model.layers.{i}.self_attn.q_proj.weight"].pattern for i in range(4)}
    assert patterns == {f"{kind}.self_attn.q_proj.weight" for kind in dense | experts}
    assert parameters["model.norm.weight"].kind == ""


def test_patterns_leave_out_every_index_where_all_layers_are_alike():
    parameters = probed("mixtral").parameters
    assert {info.kind for info in parameters.values()} == {"", "model.layers.*"}
    for name, info in parameters.items():
        assert info.pattern == name.replace("layers.0", "layers.*").replace("layers.1", "layers.*")


@pytest.mark.parametrize(("name", "head_dim"), [("gpt2", 12), ("gptj", 12), ("opt", 12), ("falcon-grouped", 12)])
def test_where_head_dim_follows_the_width_the_probe_says_so(name: str, head_dim: int):
    config = OTHER[name].config()
    axis_map = probe_axes(model_class_of(config), config)
    assert axis_map.coupled_head_dim == head_dim
    assert probe_axes(model_class_of(config), config, couple=False).coupled_head_dim is None


@pytest.mark.parametrize("name", ["llama", "llama-square", "phi", "olmo2", "gemma2", "phi3"])
def test_where_head_dim_can_be_written_heads_and_width_are_not_coupled(name: str):
    assert probed(name).coupled_head_dim is None


def test_the_axes_of_a_coupled_width_are_those_of_heads_and_channels_together():
    axis_map = probe_axes(model_class_of(OTHER["gpt2"].config()), OTHER["gpt2"].config())
    layer = "transformer.h.1."
    assert {
        (name.removeprefix(layer), dim): slopes
        for (name, dim), slopes in axis_map.slopes.items()
        if name.startswith(layer) and name.endswith("weight")
    } == {
        ("ln_1.weight", 0): {HIDDEN: 1},
        ("ln_2.weight", 0): {HIDDEN: 1},
        ("attn.c_attn.weight", 0): {HIDDEN: 1},
        ("attn.c_attn.weight", 1): {HIDDEN: 3},
        ("attn.c_proj.weight", 0): {HIDDEN: 1},
        ("attn.c_proj.weight", 1): {HIDDEN: 1},
        ("mlp.c_fc.weight", 0): {HIDDEN: 1},
        ("mlp.c_fc.weight", 1): {MLP: 1},
        ("mlp.c_proj.weight", 0): {MLP: 1},
        ("mlp.c_proj.weight", 1): {HIDDEN: 1},
    }


def test_a_key_value_head_of_a_coupled_width_stays_as_it_is():
    """GPT-BigCode: the rows of its one key and one value don't grow when heads and width do."""
    axis_map = probe_axes(model_class_of(OTHER["gpt_bigcode"].config()), OTHER["gpt_bigcode"].config())
    assert axis_map.slopes["transformer.h.0.attn.c_attn.weight", 0][HIDDEN] == 1
    assert axis_map.parameters["transformer.h.0.attn.c_attn.weight"].shape[0] == 72 + 2 * 12


@pytest.mark.parametrize(
    ("config", "axis", "slopes"),
    [
        (
            transformers.GPT2Config(n_layer=2, n_head=4, n_embd=48, vocab_size=99, n_inner=100),
            ("transformer.wte.weight", 1),
            {HIDDEN: 1},
        ),
        (
            transformers.GPTJConfig(n_layer=2, n_head=4, n_embd=48, vocab_size=99, rotary_dim=8),
            ("transformer.h.0.mlp.fc_in.weight", 0),
            {MLP: 1},  # None in the config, so 4 * n_embd until it is written
        ),
    ],
)
def test_sizes_that_the_class_calls_differently_are_found(config, axis: tuple[str, int], slopes: dict[str, int]):
    """`hidden_size` is GPT-2's `n_embd`: the class' attribute_map says so."""
    assert type(config).attribute_map[HIDDEN] == "n_embd"
    assert probe_axes(model_class_of(config), config).slopes[axis] == slopes


class ExtraWithWidth(LlamaForCausalLM):
    """Grows a parameter, not a dimension, with the MLP size."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index in range(max(0, config.intermediate_size - 40)):
            self.register_parameter(f"extra_{index}", nn.Parameter(torch.zeros(3)))


class SquareOfWidth(LlamaForCausalLM):
    """Has a dimension that isn't linear in the MLP size."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros(config.intermediate_size**2 // 7))


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(ExtraWithWidth, f"`{MLP}` can't be changed in the model code"), (SquareOfWidth, "table dimension 0")],
)
def test_shapes_that_do_not_follow_are_a_reason_for_this_size_only(model_class: type[LlamaForCausalLM], reason: str):
    proved = prove(model_class, ALL["llama"].config()).structures
    assert proved["mlp_channels"].scheme is None
    assert reason in proved["mlp_channels"].reason
    assert proved["attention_heads"].scheme is not None
    assert proved["embedding_channels"].scheme is not None


def test_a_size_that_changes_the_set_of_parameters_is_recorded_as_failed():
    axis_map = probe_axes(ExtraWithWidth, ALL["llama"].config())
    assert list(axis_map.failed) == [MLP]
    assert "the set of parameters itself changes" in axis_map.failed[MLP]


def probed_type(model_type: str) -> AxisMap:
    model_class, config = default_config(model_type)
    return probe_axes(model_class, tiny_config(model_class, config))


def test_an_mlp_that_reads_half_of_its_size_has_a_half_for_a_slope():
    found = probed_type("moshi").slopes
    assert found["model.layers.0.mlp.fc1.weight", 0] == {MLP: 1}
    assert found["model.layers.0.mlp.fc2.weight", 1] == {MLP: Fraction(1, 2)}


@pytest.mark.parametrize(("model_type", "picky"), [("moshi", True), ("llama", False)])
def test_a_class_that_refuses_what_its_config_accepts_is_picky(model_type: str, picky: bool):
    assert probed_type(model_type).picky is picky


def test_heads_of_another_name_do_not_follow_the_width():
    """JetMoE's shapes depend on the key-value heads alone; no weight follows the width on both of its sides."""
    axis_map = probed_type("jetmoe")
    assert axis_map.coupled_head_dim is None
    assert not any(HEADS in slopes for slopes in axis_map.slopes.values())


def test_nothing_is_allocated():
    config = ALL["llama"].config()
    model = build_meta(LlamaForCausalLM, config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert describe_parameters(model).keys() == dict(model.named_parameters()).keys()


def test_the_probe_leaves_the_config_alone():
    config = ALL["llama-square"].config()
    before = config.to_dict()
    probe_axes(LlamaForCausalLM, config)
    assert config.to_dict() == before


def test_inspecting_llama_405b_takes_less_than_two_gigabytes():
    code = (
        "import resource\n"
        "from transformers import LlamaConfig\n"
        "from hesso_hf import inspect_model\n"
        "found = inspect_model(LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248,\n"
        "    num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8))\n"
        "found_all = {name: s.status for name, s in found.structures.items()}\n"
        "absent = {found_all.pop(n) for n in ('expert_channels', 'experts', 'mixer_channels')}\n"
        "assert absent == {'not_applicable'}, absent\n"
        "assert list(found_all.values()) == ['proved'] * len(found_all), found.structures\n"
        "print(found.parameters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    ran = forks.run(code)
    assert ran.returncode == 0, ran.stderr[-2000:]
    parameters, peak_kib = map(int, ran.stdout.split())
    assert parameters == 405_853_388_800
    assert peak_kib < 2 * 1024**2
