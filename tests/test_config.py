"""HessoConfig: what it takes, from Python and from a command line, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import HfArgumentParser

from hesso_hf.config import DEFAULT_STRUCTURES, SALIENCIES, STRUCTURES, HessoConfig
from hesso_hf.errors import HessoError


def from_command_line(*arguments: str) -> HessoConfig:
    return HfArgumentParser(HessoConfig).parse_args_into_dataclasses(list(arguments))[0]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 50, float("nan"), float("inf")])
def test_a_ratio_outside_zero_and_one_is_refused(ratio: float) -> None:
    with pytest.raises(HessoError, match=rf"`pruning_ratio` \({ratio}\) must lie strictly between 0 and 1"):
        HessoConfig(pruning_ratio=ratio)


def test_errors_are_value_errors() -> None:
    assert issubclass(HessoError, ValueError)


def test_neither_ratio_nor_sizes_is_refused() -> None:
    with pytest.raises(HessoError, match=r"`pruning_ratio`.* or `target_sizes`"):
        HessoConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"saliency": "taylor_secnd_order"}, r"`saliency`: unknown name 'taylor_secnd_order'.*'taylor_second_order'"),
        ({"saliency": {"magnitud": 1.0}}, r"`saliency`: unknown name 'magnitud' \(did you mean 'magnitude'\?\)"),
        ({"saliency": ["magnitude", "cosine"]}, r"`saliency`: unknown name 'cosine'"),
        ({"saliency": {"magnitude": 0}}, r"`saliency\['magnitude'\]` \(0\) must be a positive number"),
        ({"saliency": {"magnitude": -1}}, r"`saliency\['magnitude'\]` \(-1\)"),
        ({"saliency": {"magnitude": "a lot"}}, r"`saliency\['magnitude'\]` \('a lot'\)"),
        ({"structures": ["query_heads", "attention_heads"]}, r"`structures`.*'query_heads' and 'attention_heads'"),
        (
            {"structures": {"attention_heads": 1, "query_heads": 2}},
            r"`structures`.*'query_heads' and 'attention_heads'",
        ),
        ({"structures": "atention_heads"}, r"`structures`: unknown name 'atention_heads'.*'attention_heads'"),
        ({"structures": ["mlp_channels", "layer"]}, r"`structures`: unknown name 'layer'"),
        ({"structures": {"mlp": 1.0}}, r"`structures`: unknown name 'mlp'"),
        ({"structures": {"mlp_channels": 0.0}}, r"`structures\['mlp_channels'\]` \(0.0\)"),
        ({"budget_metric": "params"}, r"`budget_metric` \('params'\).*parameters.*flops"),
        ({"layer_widths": "per-layer"}, r"`layer_widths` \('per-layer'\).*uniform.*per_layer"),
        ({"target_sizes": {"intermediate_size": 0}}, r"`target_sizes\['intermediate_size'\]` \(0\)"),
        ({"target_sizes": {"intermediate_size": 0.5}}, r"`target_sizes\['intermediate_size'\]` \(0.5\)"),
        ({"target_sizes": {"intermediate_size": True}}, r"`target_sizes\['intermediate_size'\]` \(True\)"),
        ({"target_sizes": "intermediate_size"}, r"`target_sizes` \('intermediate_size'\) must map"),
        ({"round_to": 0}, r"`round_to` \(0\)"),
        ({"tensor_parallel_size": 0}, r"`tensor_parallel_size` \(0\)"),
        ({"saliency_batches": 0}, r"`saliency_batches` \(0\)"),
        ({"calibration_examples": -1}, r"`calibration_examples` \(-1\)"),
        ({"export_dtype": "fp8"}, r"`export_dtype` \('fp8'\).*bfloat16"),
        ({"warmup_steps": -1}, r"`warmup_steps` \(-1\)"),
        ({"warmup_steps": 10.5}, r"`warmup_steps` \(10.5\) must be a whole number"),
        ({"pruning_steps": 0}, r"`pruning_steps` \(0\).*positive"),
        ({"pruning_steps": float("nan")}, r"`pruning_steps` \(nan\)"),
        ({"pruning_periods": 0}, r"`pruning_periods` \(0\)"),
        ({"pruning_steps": 8, "pruning_periods": 10}, r"`pruning_steps` \(8\).*`pruning_periods` \(10\)"),
        ({"saliency": '{"magnitude": 1'}, r"not valid JSON"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_with_argument_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HessoError, match=message):
        HessoConfig(**{"pruning_ratio": 0.5, **values})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pruning_ratio", "half"),
        ("pruning_ratio", "5e-1"),  # YAML 1.1 reads 5e-1 as a string
        ("pruning_periods", 2.5),
        ("pruning_periods", "3"),
        ("pruning_steps", "10"),
        ("warmup_steps", None),
        ("calibration_examples", "2"),
        ("calibration_examples", 1.5),
        ("saliency_batches", 2.5),
    ],
)
def test_values_of_the_wrong_type_are_refused_with_argument_and_value(name: str, value: Any) -> None:
    with pytest.raises(HessoError, match=name):
        HessoConfig(**{"pruning_ratio": 0.5, name: value})


@pytest.mark.parametrize("name", ["structures", "saliency"])
@pytest.mark.parametrize("empty", [[], {}])
def test_choosing_nothing_is_refused(name: str, empty: Any) -> None:
    with pytest.raises(HessoError, match=f"`{name}`"):
        HessoConfig(**{"pruning_ratio": 0.5, name: empty})


def test_the_papers_method_is_hesso_with_cric_and_nothing_beside() -> None:
    config = HessoConfig.paper(0.5, structures="mlp_channels")
    assert (config.pruning_ratio, config.cric, config.cric_mode) == (0.5, True, "path")
    assert (config.stream_basis, config.healing, config.replay_share) == ("given", "off", 0.0)
    assert (config.distillation_alpha, config.structures) == (0.0, "mlp_channels")


def test_unknown_keys_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(HessoError, match=r"unknown key `prunning_ratio`.*did you mean 'pruning_ratio'"):
        HessoConfig.from_dict({"prunning_ratio": 0.5})


def test_saliency_weights_of_a_name_a_list_and_a_dict() -> None:
    assert HessoConfig(0.5).saliency_weights == {"reconstruction": 1.0}
    assert HessoConfig(0.5, healing="off").saliency_weights == {"taylor_second_order": 1.0}
    assert HessoConfig(0.5, saliency="magnitude").saliency_weights == {"magnitude": 1.0}
    both = {"magnitude": 1.0, "cosine_similarity": 1.0}
    assert HessoConfig(0.5, saliency=list(both)).saliency_weights == both
    mixed = {"magnitude": 0.25, "cosine_similarity": 2}
    assert HessoConfig(0.5, saliency=mixed).saliency_weights == {"magnitude": 0.25, "cosine_similarity": 2.0}
    for name in SALIENCIES:
        assert HessoConfig(0.5, saliency=name).saliency_weights == {name: 1.0}


def test_structures_of_all_a_list_and_a_dict_of_shares() -> None:
    assert HessoConfig(0.5).structure_names == DEFAULT_STRUCTURES
    assert set(STRUCTURES) - set(DEFAULT_STRUCTURES) == {"query_heads", "experts", "layers"}
    assert HessoConfig(0.5).structure_shares is None
    named = HessoConfig(0.5, structures=["mlp_channels", "attention_heads"])
    assert named.structure_names == ("mlp_channels", "attention_heads")
    assert named.structure_shares is None
    shares = HessoConfig(0.5, structures={"mlp_channels": 3, "attention_heads": 1})
    assert shares.structure_names == ("mlp_channels", "attention_heads")
    assert shares.structure_shares == {"mlp_channels": 0.75, "attention_heads": 0.25}


@pytest.mark.parametrize(
    "config",
    [
        HessoConfig(0.5),
        HessoConfig(target_sizes={"intermediate_size": 32}, layer_widths="per_layer"),
        HessoConfig(
            0.25,
            structures={"mlp_channels": 2, "attention_heads": 1},
            saliency={"magnitude": 0.5, "cosine_similarity": 1.5},
            warmup_steps=100,
            pruning_steps=300,
            pruning_periods=5,
            export_dtype="bfloat16",
        ),
    ],
)
def test_json_round_trip(config: HessoConfig) -> None:
    assert HessoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_is_no_view_of_the_config() -> None:
    config = HessoConfig(0.5, saliency={"magnitude": 1.0})
    config.to_dict()["saliency"]["magnitude"] = 9.0
    assert config.saliency_weights == {"magnitude": 1.0}


def test_strings_as_a_command_line_gives_them() -> None:
    assert HessoConfig(0.5, structures='["mlp_channels"]').structure_names == ("mlp_channels",)
    commas = HessoConfig(0.5, structures="attention_heads, mlp_channels", saliency="magnitude,cosine_similarity")
    assert commas.structure_names == ("attention_heads", "mlp_channels")
    assert commas.saliency_weights == {"magnitude": 1.0, "cosine_similarity": 1.0}
    assert HessoConfig(0.5, saliency='{"magnitude": 2}').saliency_weights == {"magnitude": 2.0}
    assert HessoConfig(target_sizes='{"intermediate_size": 32}').pinned_sizes == {"intermediate_size": 32}


def test_the_argument_parser_takes_the_dataclass() -> None:
    assert from_command_line("--pruning_ratio", "0.5") == HessoConfig(0.5)
    parsed = from_command_line(
        *("--pruning_ratio", "0.3", "--structures", "attention_heads,mlp_channels"),
        *("--saliency", '{"magnitude": 0.5, "taylor_first_order": 1}', "--warmup_steps", "0.1"),
        *("--pruning_steps", "40", "--pruning_periods", "4", "--layer_widths", "uniform", "--round_to", "16"),
    )
    assert parsed == HessoConfig(
        0.3,
        structures=["attention_heads", "mlp_channels"],
        saliency={"magnitude": 0.5, "taylor_first_order": 1},
        warmup_steps=0.1,
        pruning_steps=40,
        pruning_periods=4,
        layer_widths="uniform",
        round_to=16,
    )
    assert from_command_line("--target_sizes", '{"hidden_size": 48}').pinned_sizes == {"hidden_size": 48}
    assert from_command_line("--pruning_ratio", "0.5", "--saliency", "magnitude").saliency_weights == {"magnitude": 1}


def test_every_field_has_a_help_text() -> None:
    helps = [field.metadata.get("help") for field in HessoConfig.__dataclass_fields__.values()]
    assert all(helps)


def test_a_tolerance_of_a_basis_that_is_not_turned_is_refused():
    with pytest.raises(HessoError, match=r"`stream_basis_tolerance` \(0.2\) does nothing with `stream_basis`"):
        HessoConfig(pruning_ratio=0.5, stream_basis="given", stream_basis_tolerance=0.2)
    assert HessoConfig(pruning_ratio=0.5, stream_basis_tolerance=0.2).stream_basis == "auto"


def test_tokens_to_heal_on_are_refused_where_no_unit_is_judged_or_healed_on_any():
    with pytest.raises(HessoError, match=r"`healing_tokens` \(64\) does nothing with `healing` \('off'\) where units"):
        HessoConfig(pruning_ratio=0.5, healing="off", healing_tokens=64)
    with pytest.raises(HessoError, match=r"`healing_tokens` \(0\) must be an integer of at least 1"):
        HessoConfig(pruning_ratio=0.5, healing_tokens=0)
    assert HessoConfig(0.5, healing="off", saliency="reconstruction", healing_tokens=64).reads_examples
