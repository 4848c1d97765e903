"""Tiny models: every class gets one that builds and runs, with sizes that tell its axes apart."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hesso_hf.errors import HessoError, UnsupportedStructureError
from hesso_hf.hf_models.build import build_meta, model_class_of
from hesso_hf.hf_models.resize import buildable_config, resized_config
from hesso_hf.hf_models.sizes import (
    EXPERT_MLP,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MLP,
    VOCAB,
    ConfigSizes,
    get_size,
    set_sizes,
    size_places,
)
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.hf_models.tiny_model import ieee_fp32, logits_of, random_model, token_ids
from hesso_hf.structures.proof.tiny_case import covering_config
from tests.support import forks
from tests.support.checks import known
from tests.support.families import ALL

TYPES = (
    "llama", "qwen2", "gemma3_text", "gemma4_text", "gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "phi3",
    "mixtral", "qwen3_moe", "deepseek_v3", "dbrx", "jamba", "mamba2", "zamba", "qwen3_next", "lfm2", "nemotron_h",
    "bart", "xlnet", "qwen3_5", "mllama", "granitemoehybrid", "longcat_flash", known("dots3_note_text"),
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


REFUSED = {
    "gemma3n": "timm",
    "gemma4_assistant": "another model",
    "gemma4_unified_assistant": "another model",
}


def check(model_type: str) -> None:
    """Assert that a tiny model of the type runs, always gives the same, and has sizes that tell axes apart."""
    model_class, config = default_config(model_type)
    tiny = tiny_config(model_class, config)
    model, ids = random_model(model_class, tiny), token_ids(tiny)
    logits = logits_of(model, ids)
    assert logits.shape == (2, 12, get_size(tiny, VOCAB)) == (2, 12, 67)
    assert logits.isfinite().all()
    assert torch.equal(logits, logits_of(model, ids))
    assert torch.equal(logits, logits_of(random_model(model_class, tiny), ids))
    sizes = [get_size(tiny, name) for name in (VOCAB, HIDDEN, MLP, HEADS, EXPERTS)]
    if get_size(tiny, EXPERT_MLP) != get_size(tiny, MLP):
        sizes.append(get_size(tiny, EXPERT_MLP))
    known = [size for size in sizes if size is not None]
    assert len(set(known)) == len(known), known
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tiny_model_builds_and_runs(model_type: str):
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*REFUSED}))
def test_every_causal_language_model_has_a_tiny_one(model_type: str):
    check(model_type)


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_what_cannot_run_alone_is_refused_by_name(model_type: str, reason: str):
    if model_type == "gemma3n" and importlib.util.find_spec("timm"):
        pytest.skip("timm is installed")
    with pytest.raises(UnsupportedStructureError, match=reason):
        tiny_config(*default_config(model_type))


def test_an_unknown_type_is_named():
    with pytest.raises(HessoError, match="'no_such_type'"):
        default_config("no_such_type")


def test_the_number_of_query_heads_a_key_value_head_has_stays():
    config = transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8)
    tiny = tiny_config(transformers.LlamaForCausalLM, config)
    assert (get_size(tiny, HEADS), get_size(tiny, KV_HEADS)) == (12, 3)
    hidden = get_size(tiny, HIDDEN)
    assert hidden != get_size(tiny, HEAD_DIM) * 12
    assert hidden % 8 == 0  # the class accepts one unit less, too


def test_dense_and_expert_layers_stay():
    tiny = tiny_config(*default_config("deepseek_v3"))
    assert (tiny.first_k_dense_replace, get_size(tiny, LAYERS)) == (1, 2)


def test_layers_that_share_key_value_states_stay():
    model_class, config = default_config("gemma3n_text")
    tiny = tiny_config(model_class, config)
    assert 0 < tiny.num_kv_shared_layers < get_size(tiny, LAYERS)


def test_an_mlp_size_that_follows_the_width_becomes_its_own():
    model_class, config = default_config("gpt2")
    assert config.n_inner is None
    assert ConfigSizes.of(config).get(MLP) == 4 * config.n_embd
    assert get_size(config, MLP) is None  # which builds no models
    set_sizes(config, {MLP: 100, HIDDEN: 48})
    assert (config.n_inner, config.n_embd) == (100, 48)
    assert tiny_config(model_class, config).n_inner == 44


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (transformers.BartForConditionalGeneration, transformers.BartConfig()),
        (transformers.T5ForConditionalGeneration, transformers.T5Config()),
    ],
    ids=["bart", "t5"],
)
def test_an_encoder_decoder_reads_the_ids_on_both_sides(model_class, config):
    tiny = tiny_config(model_class, config)
    assert logits_of(random_model(model_class, tiny), token_ids(tiny)).shape == (2, 12, 67)


def test_a_model_without_an_output_matrix_gives_hidden_states():
    tiny = tiny_config(transformers.LlamaModel, transformers.LlamaConfig())
    assert logits_of(random_model(transformers.LlamaModel, tiny), token_ids(tiny)).shape == (2, 12, tiny.hidden_size)


@pytest.mark.parametrize(
    ("model_type", "name", "attributes"),
    [
        ("gpt2", HIDDEN, ["n_embd"]),
        ("opt", MLP, ["ffn_dim"]),
        ("bart", MLP, ["decoder_ffn_dim", "encoder_ffn_dim"]),
        ("dbrx", HIDDEN, ["hidden_size", "d_model"]),
        ("dbrx", MLP, ["ffn_hidden_size"]),
        ("dbrx", KV_HEADS, ["kv_n_heads", "num_key_value_heads"]),
        ("falcon", KV_HEADS, ["num_kv_heads"]),
        ("qwen2_moe", EXPERTS, ["num_experts"]),
        ("mamba2", HEADS, []),
    ],
)
def test_sizes_are_found_under_the_class_own_names(model_type: str, name: str, attributes: list[str]):
    _, config = default_config(model_type)
    assert [attribute for _, attribute in size_places(config, name)] == attributes


def test_a_size_that_the_code_adjusts_is_the_one_that_the_model_has():
    model_class, config = default_config("lfm2")
    assert (config.intermediate_size, config.block_auto_adjust_ff_dim) == (12288, True)
    assert ConfigSizes.of(config).get(MLP) == 8192  # two thirds, to a multiple of 256
    small = resized_config(config, {MLP: 5000})
    assert (small.intermediate_size, small.block_auto_adjust_ff_dim, get_size(small, MLP)) == (5000, False, 5000)
    rows = {p.shape[0] for name, p in build_meta(model_class, small).named_parameters() if name.endswith("w1.weight")}
    assert rows == {5000}
    whole = resized_config(config, {})  # written out, since any other change would leave two thirds of it
    assert (whole.intermediate_size, whole.block_auto_adjust_ff_dim) == (8192, False)


@pytest.mark.parametrize(
    ("by_layer", "heads", "expected"),
    [
        ([48, 48, 48], 12, [12, 12, 12]),
        ([48, 64, 48], 36, [36, 48, 36]),
        ([48, 64, 48], 40, [48, 64, 48]),  # 64 * 40 / 48 are no heads: the shapes won't fit, and the proof says so
    ],
)
def test_a_list_of_one_size_a_layer_follows_the_size(by_layer: list[int], heads: int, expected: list[int]):
    config = transformers.LagunaConfig(
        num_hidden_layers=3, num_attention_heads=48, num_key_value_heads=4, num_attention_heads_per_layer=by_layer
    )
    set_sizes(config, {HEADS: heads})
    assert (config.num_attention_heads, config.num_attention_heads_per_layer) == (heads, expected)


def test_a_list_of_one_size_a_layer_shrinks_with_it():
    model_class, config = default_config("laguna")
    config.num_attention_heads_per_layer = [48, 64] * 20
    tiny = tiny_config(model_class, config)
    ratio = {layer / tiny.num_attention_heads for layer in tiny.num_attention_heads_per_layer}
    assert ratio <= {1.0, 64 / 48}
    assert max(tiny.num_attention_heads_per_layer) < 48


def test_sizes_that_only_the_model_class_refuses_are_named():
    model_class, config = default_config("moshi")
    tiny = tiny_config(model_class, config)
    resized_config(tiny, {HIDDEN: tiny.num_attention_heads * 11 + 1})  # which the config class takes
    with pytest.raises(HessoError, match=r"MoshiForCausalLM refuses \{'hidden_size': 56\}.*divisible"):
        buildable_config(model_class, tiny, {HIDDEN: tiny.num_attention_heads * 11 + 1})
    assert buildable_config(model_class, tiny, {HIDDEN: 55}).hidden_size == 55


def test_layers_that_follow_a_rule_on_their_index_are_covered_by_the_first_of_them():
    """Jamba has attention in every eighth layer from the fifth on: one layer of each kind in a row can't be said."""
    model_class, config = default_config("jamba")
    found = covering_config(model_class, config)
    assert (found.num_hidden_layers, found.attn_layer_period, found.expert_layer_period) == (5, 8, 2)
    assert found.layers_block_type == ["mamba"] * 4 + ["attention"]


def test_where_one_layer_of_each_kind_will_do_it_covers_all():
    model_class, config = default_config("deepseek_v3")
    assert covering_config(model_class, config).to_dict() == tiny_config(model_class, config).to_dict()


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "ministral"])
def test_a_default_config_that_leaves_head_dim_out_is_covered(model_type: str):
    model_class, config = default_config(model_type)
    assert config.head_dim is None
    assert covering_config(model_class, config).head_dim == tiny_config(model_class, config).head_dim


def precisions() -> list[str]:
    """Read every setting of how fp32 products are computed, through torch's old interface where that answers."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    settings = (
        torch.backends,
        cudnn,
        mkldnn,
        cuda.matmul,
        cudnn.conv,
        cudnn.rnn,
        mkldnn.matmul,
        mkldnn.conv,
        mkldnn.rnn,
    )
    found = [setting.fp32_precision for setting in settings]
    for read in (lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(str(read()))
        except RuntimeError:  # what it raises where the new interface says otherwise
            found.append("mixed")
    return found


ALLOWED = {
    "nothing": "pass",
    "trainer": "torch.backends.fp32_precision = 'tf32'",
    "trainer forbids": "torch.backends.fp32_precision = 'ieee'",
    "bf16": "torch.backends.fp32_precision = 'bf16'",
    "old": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "old forbids": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "one": "torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "both": "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.allow_tf32 = True",
    "cudnn": "torch.backends.cudnn.fp32_precision = 'tf32'; torch.backends.fp32_precision = 'ieee'",
    "mkldnn": "torch.backends.mkldnn.set_flags(_fp32_precision='bf16')",
}


@pytest.mark.parametrize("case", ALLOWED)
def test_fp32_is_fp32_for_a_while_and_all_settings_are_as_before(case: str):
    """In a process of its own: what torch has been told once can't be unsaid."""
    inside, (before, after), (then, expected) = forks.call(_settings, ALLOWED[case])
    assert inside[3:9] == ["ieee"] * 6
    assert after == before
    assert then == expected


def _settings(code: str) -> tuple[list[str], tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Return what is set inside, before and after; and what follows from a later change, with and without it."""
    later = ["tf32", "none", "ieee", "none"]

    def changed() -> list[str]:
        found = []
        for value in later:
            torch.backends.fp32_precision = value
            found += precisions()
        return found

    exec(code)
    before = precisions()
    first = torch.backends.fp32_precision
    expected = changed()
    torch.backends.fp32_precision = first
    with ieee_fp32():
        inside = precisions()
    after = precisions()
    return inside, (before, after), (changed(), expected)
