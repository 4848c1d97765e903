"""`inspect_model`: the same answer from a config, a model, a folder and a file; clear errors; no remote code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    CLIPVisionConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PretrainedConfig,
    SiglipVisionConfig,
)

from hesso_hf.budget.inspect import Inspection, inspect_model
from hesso_hf.config import STRUCTURES
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.build import build_meta, model_class_of
from tests.support.families import ALL, EXPERT, HEADS, MLP, OTHERS, QUERY, STREAM, random_model

KEYS = {"status", "units", "layouts", "relative_error", "reason", "layers", "parameters_per_unit"}


@pytest.fixture(scope="module")
def config() -> PretrainedConfig:
    return ALL["llama"].config(architectures=["LlamaForCausalLM"])


@pytest.fixture(scope="module")
def inspection(config: PretrainedConfig) -> Inspection:
    return inspect_model(config)


@pytest.fixture
def folder(config: PretrainedConfig, tmp_path: Path) -> Path:
    config.save_pretrained(tmp_path)
    return tmp_path


def test_to_dict_is_json_with_a_key_per_structure(inspection: Inspection):
    values = json.loads(json.dumps(inspection.to_dict()))
    assert values.keys() == {*STRUCTURES, "model", "feasible"}
    for absent in ("expert_channels", "experts"):
        assert values[absent]["status"] == "not_applicable"
    assert "LlamaConfig has no integer `moe_intermediate_size`" in values[EXPERT]["reason"]
    for structure in (HEADS, MLP, STREAM, QUERY, "layers"):
        assert values[structure].keys() >= KEYS
        assert values[structure]["status"] == "proved"
        assert values[structure]["reason"] == ""
        assert values[structure]["relative_error"] <= 1e-5
    assert values["model"]["joint_relative_error"] <= 1e-5


def llava() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=ALL["llama"].config(), image_token_index=96)
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def test_a_width_that_images_are_brought_into_stays():
    """Text doesn't reach their projector: how its channels go with the hidden state's can't be shown."""
    found = inspect_model(llava()).structures
    assert found[STREAM].status == "refused"
    assert "text alone doesn't reach model.multi_modal_projector" in found[STREAM].reason
    assert found["mixer_channels"].status == "not_applicable"
    assert {found[name].status for name in (HEADS, MLP)} == {"proved"}


def test_a_width_that_images_are_brought_into_stays_where_their_projector_has_a_size_of_its_own():
    """No axis of it moves with the hidden state's size, and cut to another one the model couldn't read an image."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = GemmaConfig(
        vocab_size=99, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=40, image_token_index=98)
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    found = inspect_model(config).structures
    assert found[STREAM].status == "refused"
    assert "text alone doesn't reach model.vision_tower" in found[STREAM].reason
    assert {found[name].status for name in (HEADS, MLP)} == {"proved"}


def test_a_tower_of_images_is_said_to_stay_whole():
    found = inspect_model(llava())
    (tower,) = found.untouched
    whole = build_meta(LlavaForConditionalGeneration, llava())
    share = whole.model.vision_tower.num_parameters() / found.parameters
    assert str(tower).startswith(f"model.vision_tower (CLIPVisionModel, {share:.0%} of the parameters) stays whole")
    assert found.to_dict()["model"]["untouched"] == [vars(tower)]


def test_units_and_elements_are_those_of_the_config(inspection: Inspection):
    heads, mlp, stream = (inspection.structures[name] for name in (HEADS, MLP, STREAM))
    assert (heads.units, heads.layers) == (3, 2)
    assert (mlp.units, mlp.layers) == (52, 2)
    assert (stream.units, stream.layers) == (72, 1)
    assert heads.parameters_per_unit == 72 * 10 * (2 + 1 + 1 + 2)  # q, k, v and o of two query heads
    assert mlp.parameters_per_unit == 72 * 3
    per_layer = 10 * (6 + 3 + 3 + 6) + 3 * 52 + 2
    assert stream.parameters_per_unit == 2 * per_layer + 2 * 97 + 1
    assert (heads.prunable_parameters, mlp.prunable_parameters) == (3 * 2 * 72 * 60, 52 * 2 * 72 * 3)
    assert heads.config_sizes == {"num_attention_heads": 6, "num_key_value_heads": 3}
    single = inspection.structures[QUERY]
    assert (single.units, single.layers, single.parameters_per_unit) == (6, 2, 72 * 10 * 2)  # q and o of one
    assert single.prunable_parameters == 6 * 2 * 72 * 20
    assert single.config_sizes == {"num_attention_heads": 6}
    assert {name.rpartition("self_attn.")[2] for name in single.layouts} == {"q_proj.weight[0]", "o_proj.weight[1]"}


def test_the_model_is_named_and_counted(config: PretrainedConfig, inspection: Inspection):
    assert (inspection.model_type, inspection.model_class) == ("llama", "LlamaForCausalLM")
    assert inspection.parameters == sum(p.numel() for p in build_meta(model_class_of(config), config).parameters())


def test_layouts_say_how_units_lie():
    layouts = inspect_model(ALL["phi3"].config()).structures
    assert layouts[MLP].layouts["model.layers.*.mlp.gate_up_proj.weight[0]"] == "stride(2x1)"
    assert layouts[HEADS].layouts["model.layers.*.self_attn.qkv_proj.weight[0]"] == "segments(24, 2x12)"
    assert layouts[QUERY].layouts["model.layers.*.self_attn.qkv_proj.weight[0]"] == "segments(12, fixed 72)"
    assert layouts[STREAM].powers["model.embed_tokens.weight"] == 1


def test_a_refused_structure_keeps_its_key_and_has_a_reason():
    values = inspect_model(ALL["llama"].config(num_hidden_layers=1)).to_dict()
    assert values["layers"]["status"] == "refused"
    assert "only one layer" in values["layers"]["reason"]
    assert values["layers"]["units"] is None


def test_heads_and_width_that_are_not_exact_are_refused_with_the_error():
    config = FalconConfig(vocab_size=97, hidden_size=48, num_attention_heads=4, num_hidden_layers=1, alibi=True)
    values = inspect_model(config).to_dict()
    for name in (HEADS, STREAM):
        assert values[name]["status"] == "refused"
        assert "best relative error" in values[name]["reason"]
        assert values[name]["units"] is None
        assert values[name]["relative_error"] > 1e-5
    assert values[MLP]["status"] == "proved"


def test_a_structure_that_the_architecture_lacks_is_not_called_refused():
    family = next(family for family in OTHERS if family.name == "qwen3_moe")
    found = inspect_model(family.config()).structures
    assert {found[name].status for name in (HEADS, STREAM, EXPERT, QUERY)} == {"proved"}
    assert found[MLP].status == "not_applicable"
    assert "no parameter's shape depends on `intermediate_size`" in found[MLP].reason
    assert (found[MLP].units, found[MLP].relative_error) == (None, None)
    assert (found[EXPERT].units, found[EXPERT].layers) == (28, 2)
    assert found[EXPERT].parameters_per_unit == 4 * 3 * 72  # of four experts
    assert found[EXPERT].config_sizes == {"moe_intermediate_size": 28}


def test_heads_and_width_that_shrink_together_are_both_described():
    family = next(family for family in OTHERS if family.name == "gpt2")
    found = inspect_model(family.config(), pruning_ratios=(0.3,))
    assert found.structures[HEADS].layouts["transformer.h.*.attn.c_attn.weight[1]"] == "stride(3x12)"
    assert found.structures[HEADS].config_sizes == {"num_attention_heads": 6}
    assert found.structures[STREAM].config_sizes == {"hidden_size": 72}
    sizes = found.feasible["0.3"]["sizes"]
    assert sizes["hidden_size"] == 12 * sizes["num_attention_heads"] < 72


@pytest.mark.parametrize(("name", "why"), [("multi-head", "a key-value head of its own"), ("multi-query", "share one")])
def test_query_heads_do_not_apply_where_attention_heads_are_single_ones_already(name: str, why: str):
    found = inspect_model(ALL[f"llama-{name}"].config()).structures
    assert (found[HEADS].status, found[QUERY].status) == ("proved", "not_applicable")
    assert why in found[QUERY].reason
    assert "attention_heads" in found[QUERY].reason


@pytest.mark.parametrize("kind", ["folder", "config.json", "model"])
def test_every_source_gives_the_same_answer(kind: str, config: PretrainedConfig, inspection: Inspection, folder: Path):
    sources = {"folder": str(folder), "config.json": str(folder / "config.json"), "model": None}
    assert inspect_model(sources[kind] or random_model(config)) == inspection


def test_feasible_sizes_are_listed_for_the_ratios_asked_for():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=2)  # width follows the two heads
    feasible = inspect_model(config, pruning_ratios=(0.25, 0.97)).feasible
    assert feasible["0.25"]["ratio"] == pytest.approx(0.25, abs=0.05)
    assert "nearest feasible" in feasible["0.97"]["reason"]


def test_an_unknown_path_is_an_error_that_names_it(tmp_path: Path):
    missing = tmp_path / "nowhere"
    with pytest.raises(HessoError, match="nowhere"):
        inspect_model(str(missing))


@pytest.mark.parametrize("text", ["{not json", "{}", '{"model_type": "no-such-model"}'])
def test_an_unreadable_config_is_an_error_that_names_it(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HessoError, match="no model config found"):
        inspect_model(str(tmp_path))


def test_an_encoder_decoder_or_encoder_config_is_a_named_error(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(HessoError, match="vit"):
        inspect_model(str(tmp_path))


def test_remote_code_does_not_run_unless_asked_for(tmp_path: Path):
    """The folder's own code would leave a file behind."""
    ran = tmp_path / "ran"
    code = f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w')\nclass Mine(LlamaConfig):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    values = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HessoError):
        inspect_model(str(tmp_path))
    assert not ran.exists()


def test_a_known_type_with_remote_code_uses_the_installed_class(folder: Path, inspection: Inspection):
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(values))
    assert inspect_model(str(folder)).structures == inspection.structures


def test_inspecting_leaves_the_config_alone(config: PretrainedConfig):
    before = json.dumps(config.to_dict(), sort_keys=True, default=str)
    inspect_model(config)
    assert json.dumps(config.to_dict(), sort_keys=True, default=str) == before
