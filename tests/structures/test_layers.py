"""Whole layers as a structure: what is found, what is dropped, what it costs, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from hesso_hf import HessoConfig, export_pruned, inspect_model
from hesso_hf.budget.cost import CONTEXT, build_cost
from hesso_hf.budget.latency import build_latency
from hesso_hf.budget.solver import solve_budget
from hesso_hf.config import structures_around
from hesso_hf.errors import BudgetError, HessoError, UnsupportedStructureError
from hesso_hf.hf_models.build import build_meta, model_class_of
from hesso_hf.hf_models.by_layer import keep_layers_
from hesso_hf.hf_models.resize import resized_config
from hesso_hf.hf_models.sizes import HIDDEN
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.cut import cut_model, zero_units_
from hesso_hf.structures.groups import KeptUnits, PruningGroups
from hesso_hf.structures.layers import LAYER_UNITS
from hesso_hf.structures.proof import layers as depth_proof
from hesso_hf.structures.proof.layers import writer_schemes
from hesso_hf.structures.proof.prove import prove, proved_groups
from hesso_hf.structures.proof.residual_stream import stream_axes
from hesso_hf.structures.proof.result import StructureProof
from hesso_hf.structures.shape_probe import AxisMap
from tests.support.families import (
    HEADS,
    MLP,
    STREAM,
    Family,
    logits,
    random_model,
    random_units,
    relative_difference,
    token_ids,
)
from tests.support.tiny import tiny_llama
from tests.support.training import hesso_config, trainer

L = 6
EVERYTHING = structures_around([LAYER_UNITS])
KEPT_LAYERS = (0, 3, 5)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
KINDS = ["full_attention", "sliding_attention"] * 3
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama"),
        Family("llama-tied-biases", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        Family("qwen3", "qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        Family("gemma2", "gemma2", {"query_pre_attn_scalar": 10, "sliding_window": 4, "layer_types": KINDS}),
        Family("gemma3_text", "gemma3_text", {"query_pre_attn_scalar": 10, "sliding_window": 4}),
        Family("olmo2", "olmo2", {"head_dim": None}),
        Family("smollm3", "smollm3", {"head_dim": None, "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
        Family("cohere2", "cohere2", {"head_dim": None, "sliding_window": 4}),
        Family("phi", "phi", {"head_dim": None, "partial_rotary_factor": 0.5}),
        Family("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, kept={MLP: 40}),
        Family("qwen3_moe", "qwen3_moe", MOE, refused={MLP: "experts"}),
    )
}

SLOW = ("qwen3", "gemma3_text", "olmo2", "cohere2", "qwen3_moe", "smollm3")


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    return FAMILIES[name].config(**({"num_hidden_layers": L} | changes))


@cache
def proved(name: str) -> tuple[PruningGroups, AxisMap]:
    config = config_of(name)
    groups, _, axis_map = proved_groups(model_class_of(config), config, EVERYTHING)
    return groups, axis_map


def decided(name: str, structures: tuple[str, ...] = ()) -> KeptUnits:
    """Keep three layers, and of the other structures random units in every layer."""
    groups = proved(name)[0]
    units = random_units(groups, FAMILIES[name].units_to_keep(structures))
    return KeptUnits(units.num_units | {LAYER_UNITS: L}, units.kept | {LAYER_UNITS: (KEPT_LAYERS,)})


def zeroed(name: str, structures: tuple[str, ...] = ()) -> tuple[PreTrainedModel, KeptUnits]:
    model, kept = random_model(config_of(name)), decided(name, structures)
    zero_units_(dict(model.named_parameters()), proved(name)[0], kept)
    return model, kept


def continuation(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8 greedily generated tokens, with the cache, and their logits."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def proof_of_layers(model_class: type[PreTrainedModel], config: PretrainedConfig) -> StructureProof:
    return prove(model_class, config, (LAYER_UNITS,)).structures[LAYER_UNITS]


def refusal(config: PretrainedConfig) -> str:
    """Return why layers can't be dropped, by way of the error that asking for them raises."""
    groups, _, _ = proved_groups(model_class_of(config), config, (LAYER_UNITS,))
    with pytest.raises(UnsupportedStructureError) as caught:
        groups.select([LAYER_UNITS], explicit=True)
    return str(caught.value).partition("(reason: ")[2]


@pytest.mark.parametrize(
    ("name", "together"),
    [
        *((name, True) for name in FAMILIES if name not in SLOW),
        ("llama-tied-biases", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_model_without_some_layers_is_the_one_in_which_they_write_nothing(
    name: str, together: bool, tmp_path: Path
) -> None:
    structures = tuple(s for s in (HEADS, MLP, STREAM) if together and s in proved(name)[0].structures)
    assert not together or structures == FAMILIES[name].proved
    model, kept = zeroed(name, structures)
    report = export_pruned(model, tmp_path, kept_units=kept, groups=proved(name)[0])
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(small) is type(model)
    assert small.config.num_hidden_layers == len(small.model.layers) == 3
    assert report.sizes_after["num_hidden_layers"] == 3
    ids = token_ids(model.config)
    expected = logits(model, ids)
    assert relative_difference(logits(small, ids), expected) <= 1e-5
    assert relative_difference(logits(random_model(config_of(name)), ids), expected) > 1e-2
    (tokens, scores), (other_tokens, other_scores) = continuation(small, ids), continuation(model, ids)
    assert torch.equal(tokens, other_tokens)
    assert relative_difference(scores, other_scores) <= 1e-5


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("gemma2", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
        ("gemma3_text", "layer_types", ["sliding_attention", "sliding_attention", "full_attention"]),
        ("cohere2", "layer_types", ["sliding_attention", "full_attention", "sliding_attention"]),
        ("smollm3", "no_rope_layers", [1, 1, 1]),
    ],
)
def test_what_the_config_says_of_each_layer_is_that_of_the_kept_ones(name: str, field: str, expected: list) -> None:
    config = config_of(name)
    small = resized_config(config, {"num_hidden_layers": 3}, KEPT_LAYERS)
    assert getattr(small, field) == expected == [getattr(config, field)[index] for index in KEPT_LAYERS]


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_without_its_layers_kinds_the_proof_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_ones(config: PretrainedConfig, sizes: dict[str, int], layers: Any, known: Any) -> PretrainedConfig:
        return resized_config(config, sizes)

    config = config_of(name, sliding_window=64)  # longer than what the proof tries it on
    assert proof_of_layers(model_class_of(config), config).scheme is not None
    monkeypatch.setattr(depth_proof, "resized_config", first_ones)
    assert "layers use one another or their index" in proof_of_layers(model_class_of(config), config).reason


def test_lists_and_dicts_by_layer_are_renumbered_and_others_left_alone() -> None:
    config = config_of("llama")
    before = {
        "layer_types": ["a", "b", "c", "d", "e", "f"], "mlp_only_layers": [0, 2, 5], "full_attn_idxs": [1, 2],
        "all_ids": [*range(L)], "layer_scale_by_index": {"0": 1.0, "3": 2.0, "4": 3.0}, "windows": {5: 7},
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "id2label": {0: "x", 1: "y"}, "betas": [0, 3], "rope_parameters": {"long_factor": [1.0] * L}, "depth": L,
    }  # fmt: skip
    for name, value in before.items():
        vars(config)[name] = copy.deepcopy(value)
    keep_layers_(config, KEPT_LAYERS, L)
    assert {name: vars(config)[name] for name in before} == before | {
        "layer_types": ["a", "d", "f"], "mlp_only_layers": [0, 2], "full_attn_idxs": [], "all_ids": [0, 1, 2],
        "layer_scale_by_index": {"0": 1.0, "1": 2.0}, "windows": {2: 7},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("llama", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
        ("llama-tied-biases",
         {"self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.bias"}),
        ("gemma2", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
        ("phi", {"self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc2.weight", "mlp.fc2.bias"}),
        ("mixtral", {"self_attn.o_proj.weight", "mlp.experts.down_proj"}),
    ],
)  # fmt: skip
def test_the_writers_of_a_layer_are_one_unit(name: str, writers: set[str]) -> None:
    groups = proved(name)[0].structures[LAYER_UNITS]
    found: dict[int, set[str]] = {}
    for _, axis in groups.all_axes():
        (segment,) = axis.layout.segments
        assert axis.parameter.startswith(f"model.layers.{segment.unit}.")
        found.setdefault(segment.unit or 0, set()).add(axis.parameter.split(".", 3)[3])
    assert groups.stack == "model.layers"
    parameters = dict(build_meta(model_class_of(config_of(name)), config_of(name)).named_parameters())
    elements = sum(parameters[f"model.layers.0.{writer}"].numel() for writer in writers)
    assert groups.elements_per_unit({key: tuple(p.shape) for key, p in parameters.items()}) == elements
    assert found == dict.fromkeys(range(L), writers)


def test_readers_that_look_like_writers_are_left_out() -> None:
    """GPT-2's head_dim follows the width, so all its matrices move with it."""
    family = Family("gpt2", "gpt2", dict.fromkeys(
        ("head_dim", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    ))  # fmt: skip
    config = family.config(num_hidden_layers=4)
    groups, proof, axis_map = proved_groups(model_class_of(config), config, EVERYTHING)
    stream = stream_axes(random_model(config), axis_map, list(axis_map.moving((HIDDEN,))))
    assert len(next(writer_schemes(stream)).writers) > 4
    patterns = {pattern for pattern, _ in proof.structures[LAYER_UNITS].scheme.writers}  # type: ignore[union-attr]
    stem = "transformer.h.*"
    assert patterns == {f"{stem}.{part}.c_proj.{leaf}" for part in ("attn", "mlp") for leaf in ("weight", "bias")}
    assert groups.structures[LAYER_UNITS].num_units == 4


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Family("opt", "opt", {"head_dim": None, "num_key_value_heads": None, "word_embed_proj_dim": 40,
                               "do_layer_norm_before": False}), "layers use one another or their index"),
        (Family("qwen3_moe", "qwen3_moe", MOE | {"mlp_only_layers": [1, 3]}), "layers.0 and model.layers.1 differ"),
        (Family("jamba", "jamba", {"head_dim": None}), "differ in"),
        (Family("gemma3n", "gemma3n_text", {"vocab_size_per_layer_input": 97,
                                            "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2}),
         "not through one list"),
        (Family("llama", "llama", {"num_hidden_layers": 1}), "only one layer"),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)  # fmt: skip
def test_what_cannot_be_dropped_is_refused_with_the_reason(family: Family, reason: str) -> None:
    config = family.config(**({"num_hidden_layers": 4} | family.sizes))
    assert reason in refusal(config)


class ScaledByIndex(LlamaForCausalLM):
    """Each MLP's output is divided by its layer's number."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.mlp.register_forward_hook(lambda module, args, output, number=index + 1: output / number)


class ValuesOfTheFirstLayer(LlamaForCausalLM):
    """Every layer adds the first one's values to its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        first: list[torch.Tensor] = []

        def share(module: nn.Module, args: Any, output: torch.Tensor, index: int) -> torch.Tensor:
            first[:] = first if index else [output]
            return output + first[0]

        for index, layer in enumerate(self.model.layers):
            layer.self_attn.v_proj.register_forward_hook(partial(share, index=index))


class NormsWithABiasAfterTheWriters(LlamaForCausalLM):
    """A LayerNorm follows each MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.norm = nn.LayerNorm(config.hidden_size)
            layer.mlp.register_forward_hook(lambda module, args, output: module.norm(output))


class ScaledByABuffer(LlamaForCausalLM):
    """Each layer's output is multiplied by a saved scalar that starts as one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_buffer("layer_scalar", torch.ones(1))
            layer.register_forward_hook(lambda module, args, output: output * module.layer_scalar)


@pytest.mark.parametrize("model_class", [ScaledByIndex, ValuesOfTheFirstLayer, ScaledByABuffer])
def test_layers_that_use_one_another_or_their_index_are_refused(model_class: type[LlamaForCausalLM]) -> None:
    found = proof_of_layers(model_class, config_of("llama"))
    assert found.scheme is None
    assert "layers use one another or their index" in found.reason


def test_the_bias_of_a_norm_after_a_writer_writes_too() -> None:
    found = proof_of_layers(NormsWithABiasAfterTheWriters, config_of("llama"))
    assert found.scheme is not None
    assert {pattern.partition("*.")[2] for pattern, _ in found.scheme.writers} == {
        "self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.norm.bias",
    }  # fmt: skip


def test_what_was_decided_in_dropped_layers_is_not_reported(tmp_path: Path) -> None:
    model, kept = zeroed("llama", (HEADS, MLP, STREAM))
    export_pruned(model, tmp_path, kept_units=kept, groups=proved("llama")[0])
    saved = json.loads((tmp_path / "pruning_report.json").read_text())["kept_units"]
    assert saved[LAYER_UNITS] == {"num_units": L, "kept": [list(KEPT_LAYERS)]}
    for name in (HEADS, MLP):
        assert saved[name]["kept"] == [list(kept.kept[name][layer]) for layer in KEPT_LAYERS]
    assert saved[STREAM]["kept"] == [list(kept.kept[STREAM][0])]


def test_layers_whose_writers_are_zero_are_found_in_a_bare_model(tmp_path: Path) -> None:
    model, _ = zeroed("llama")
    report = export_pruned(model, tmp_path)
    assert report.kept_units.kept[LAYER_UNITS] == (KEPT_LAYERS,)
    assert report.sizes_after["num_hidden_layers"] == 3
    whole = random_model(config_of("llama"))
    zero_units_(dict(whole.named_parameters()), proved("llama")[0], random_units(proved("llama")[0], {MLP: 37}))
    assert LAYER_UNITS not in export_pruned(whole, tmp_path).kept_units.kept


def test_a_layer_that_still_writes_is_not_cut(tmp_path: Path) -> None:
    model, kept = zeroed("llama")
    model.model.layers[4].mlp.down_proj.weight.data[3, 5] = 1e-3
    with pytest.raises(HessoError, match=r"layers: unit 4 of layer 0 is to be cut but its weights aren't zero"):
        export_pruned(model, tmp_path, kept_units=kept, groups=proved("llama")[0])


def test_saved_buffers_follow_their_layer() -> None:
    class WithBuffers(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.register_buffer("steps", torch.zeros(2))

    model = WithBuffers(config_of("llama"))
    for index, layer in enumerate(model.model.layers):
        layer.steps.fill_(index)
    small = cut_model(model, proved("llama")[0], decided("llama"), torch.float32)
    assert [int(layer.steps[0]) for layer in small.model.layers] == list(KEPT_LAYERS)


def test_layers_of_different_widths_are_dropped_too(tmp_path: Path) -> None:
    """Not by training, but by a decision that is given."""
    groups = proved("llama")[0]
    units = tuple(tuple(range(10 + layer)) for layer in range(L))
    kept = KeptUnits({MLP: 52, LAYER_UNITS: L}, {MLP: units, LAYER_UNITS: (KEPT_LAYERS,)})
    model = random_model(config_of("llama"))
    zero_units_(dict(model.named_parameters()), groups, kept)
    export_pruned(model, tmp_path, kept_units=kept, groups=groups)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert [layer.mlp.down_proj.in_features for layer in small.model.layers] == [10 + layer for layer in KEPT_LAYERS]
    ids = token_ids(model.config)
    assert relative_difference(logits(small, ids), logits(model, ids)) <= 1e-5


@pytest.mark.parametrize("name", ["llama-tied-biases", "gemma2", "mixtral"])
def test_parameters_of_all_sizes_are_counted_exactly(name: str) -> None:
    groups, axis_map = proved(name)
    config = config_of(name)
    cost = build_cost("parameters", groups, axis_map, config)
    for heads, channels, width, layers in itertools.product((1, 3), (8, 52), (48, 72), (1, 4, 6)):
        kept = {HEADS: heads, MLP: channels, STREAM: width, LAYER_UNITS: layers}
        sizes: dict[str, int] = {}
        for structure, count in kept.items():
            sizes |= groups.structures[structure].config_sizes(count)
        small = build_meta(model_class_of(config), resized_config(config, sizes))
        assert float(cost(kept)) == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("metric", ["flops", "memory"])
def test_costs_of_fewer_layers_are_those_of_a_model_that_has_fewer(metric: str) -> None:
    groups, axis_map = proved("llama")
    kept = {HEADS: 2, MLP: 40, LAYER_UNITS: 4}
    found = float(build_cost(metric, groups, axis_map, config_of("llama"))(kept))
    shallow = config_of("llama", num_hidden_layers=4)
    usual, _, shallow_map = proved_groups(model_class_of(shallow), shallow)
    assert found == float(build_cost(metric, usual, shallow_map, shallow)({HEADS: 2, MLP: 40}))
    without = PruningGroups({LAYER_UNITS: groups.structures[LAYER_UNITS]})
    alone = build_cost(metric, without, axis_map, config_of("llama"))
    assert float(alone({LAYER_UNITS: 4})) == float(build_cost(metric, usual, shallow_map, shallow)({}))
    per_token = 4 * 4 * 6 * 10 * CONTEXT if metric == "flops" else 4 * 2 * 2 * 3 * 10 * CONTEXT
    assert float(alone({LAYER_UNITS: 4})) > per_token


def test_latency_counts_the_products_of_kept_layers() -> None:
    groups, axis_map = proved("llama")
    table = build_latency(groups, axis_map, torch.device("cpu"), torch.float32, 128)
    table._time = lambda rows, columns: float(rows * columns)  # type: ignore[method-assign]
    weights = {name: info for name, info in axis_map.parameters.items() if info.role in ("matrix", "output")}
    sizes = {name: np.prod(info.shape) for name, info in weights.items()}
    assert float(table({})) == sum(sizes.values())
    fewer = [size for name, size in sizes.items() if not weights[name].layer or int(name.split(".")[2]) < 2]
    assert float(table({LAYER_UNITS: 2})) == sum(fewer)


def test_the_budget_is_met_by_layers_alone_and_with_others() -> None:
    groups, axis_map = proved("llama")
    config = config_of("llama")
    cost = build_cost("parameters", groups, axis_map, config)
    only = PruningGroups({LAYER_UNITS: groups.structures[LAYER_UNITS]})
    alone = build_cost("parameters", only, axis_map, config)
    ratio = 1 - float(alone({LAYER_UNITS: 4})) / alone.full
    target = solve_budget(HessoConfig(ratio, structures="layers"), config, only, alone)
    assert target.sizes == {"num_hidden_layers": 4}
    assert target.ratio == ratio
    pinned = HessoConfig(0.5, structures=["layers", "mlp_channels"], target_sizes={"num_hidden_layers": 5})
    target = solve_budget(pinned, config, groups.select(["layers", MLP], True), cost)
    assert target.sizes["num_hidden_layers"] == 5
    assert target.ratio == pytest.approx(0.5, abs=0.01)
    with pytest.raises(BudgetError, match=r"nearest feasible: .* with \{'num_hidden_layers': 1\}"):
        solve_budget(HessoConfig(0.95, structures="layers"), config, only, alone)
    with pytest.raises(HessoError, match="an integer between 1 and 6"):
        solve_budget(HessoConfig(target_sizes={"num_hidden_layers": 7}, structures="layers"), config, only, alone)


def test_tensor_parallelism_and_rounding_say_nothing_about_layers() -> None:
    groups, axis_map = proved("llama")
    config = HessoConfig(0.5, structures="layers", tensor_parallel_size=4, round_to=64)
    only = groups.select(["layers"], True)
    cost = build_cost("parameters", only, axis_map, config_of("llama"))
    assert solve_budget(config, config_of("llama"), only, cost).sizes == {"num_hidden_layers": 3}


def test_layers_are_opt_in() -> None:
    assert LAYER_UNITS not in HessoConfig(0.5).structure_names
    assert LAYER_UNITS not in PruningPlan.prepare(tiny_llama(), HessoConfig(0.3)).groups.structures
    with pytest.raises(HessoError, match="can't be combined with `structures` 'layers'"):
        HessoConfig(0.5, structures=["layers", "mlp_channels"], layer_widths="per_layer")


def test_inspection_counts_whole_layers_and_lists_the_usual_sizes() -> None:
    model = random_model(config_of("llama-tied-biases"))
    found = inspect_model(model)
    layers = found.structures[LAYER_UNITS]
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert (layers.status, layers.units, layers.layers) == ("proved", L, 1)
    assert (layers.parameters_per_unit, layers.prunable_parameters) == (per_layer, L * per_layer)
    assert layers.config_sizes == {"num_hidden_layers": L}
    assert set(layers.layouts.values()) == {"owned(72)"}
    assert not any("num_hidden_layers" in option.get("sizes", {}) for option in found.feasible.values())


def run_config(**changes: Any) -> HessoConfig:
    sizes = {"num_hidden_layers": 3, "intermediate_size": 28}
    return hesso_config(**({"structures": ["layers", "mlp_channels"], "target_sizes": sizes} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cric": True, "cric_mode": "probe", "cric_max_cycles": 1},
        pytest.param({"on_collapse": "pause", "collapse_threshold": 1e-6}, marks=pytest.mark.slow),
    ],
    ids=["hesso", "cric", "pause"],
)
def test_training_drops_layers_and_saves_a_stock_model(changes: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", tiny_llama(num_hidden_layers=5), run_config(**changes))
    run.train()
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (3, 28)
    ids = token_ids(run.model.config)
    ids = ids.clamp(max=60)
    assert relative_difference(logits(small, ids), logits(run.model, ids)) <= 1e-5
    kept = run.hesso_optimizer.process.kept_units().kept
    assert len(kept[LAYER_UNITS][0]) == 3
    assert len(kept[MLP]) == 5
    for layer in set(range(5)) - set(kept[LAYER_UNITS][0]):
        block = run.model.model.layers[layer]
        assert not block.mlp.down_proj.weight.any()
        assert not block.self_attn.o_proj.bias.any()
        assert block.mlp.up_proj.weight.any()


def test_centred_writers_and_dropped_layers_go_together(tmp_path: Path) -> None:
    """Phi's norms subtract the mean of the stream, so what stays in it is centred."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 48}
    config = run_config(structures=["layers", STREAM], target_sizes=sizes)
    run = trainer(tmp_path / "out", random_model(config_of("phi", num_hidden_layers=3)), config)
    run.train()
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_hidden_layers, small.config.hidden_size) == (2, 48)
    ids = token_ids(run.model.config)
    assert relative_difference(logits(small, ids), logits(run.model, ids)) <= 1e-5
    dropped = set(range(3)) - set(run.hesso_optimizer.process.kept_units().kept[LAYER_UNITS][0])
    for index, block in enumerate(run.model.model.layers):
        written = block.mlp.fc2.weight
        assert bool(written.any()) == (index not in dropped)
        assert float(written.detach().sum(0).abs().max()) <= 1e-5


def test_a_ratio_is_split_by_measurement_and_a_checkpoint_is_exported(tmp_path: Path) -> None:
    config = HessoConfig(0.4, structures=["layers", "mlp_channels"], round_to=1, warmup_steps=1, pruning_steps=4)
    run = trainer(tmp_path / "out", tiny_llama(num_hidden_layers=4), config, max_steps=6, save_strategy="steps",
                  save_steps=6)  # fmt: skip
    run.train()
    curves = run.hesso_plan.curves
    assert curves is not None
    assert curves.removed[LAYER_UNITS] == (0.25, 0.5, 0.75)
    assert len(curves.rises[LAYER_UNITS]) == 3
    report = export_pruned(tmp_path / "out" / "checkpoint-6", tmp_path / "small")
    assert report.parameters_after == run.hesso_plan.target.parameters_after
    assert report.pruning_ratio == pytest.approx(0.4, abs=0.01)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = token_ids(run.model.config).clamp(max=60)
    assert relative_difference(logits(small, ids), logits(run.model, ids)) <= 1e-5
