"""The budget: realized ratios, counted on models that are really built; pins; rounding; refusals."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from hesso_hf.budget.cost import CONTEXT, Cost, build_cost
from hesso_hf.budget.latency import LatencyTable
from hesso_hf.budget.rounding import allowed_counts, default_head_multiple, default_round_to
from hesso_hf.budget.solver import solve_budget
from hesso_hf.budget.target_sizes import TargetSizes
from hesso_hf.config import HessoConfig, structures_around
from hesso_hf.errors import BudgetError, HessoError, UnsupportedStructureError
from hesso_hf.hf_models.build import build_meta, model_class_of
from hesso_hf.hf_models.resize import copy_with
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.pruning.calibration import measure_curves
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.shape_probe import AxisMap
from tests.support.families import ALL, HEADS, MLP, QUERIES, QUERY, STREAM, random_model

COUPLED: dict[str, PretrainedConfig] = {
    "gpt2-tied": GPT2Config(vocab_size=400, n_embd=192, n_head=12, n_layer=3, n_inner=520, n_positions=64),
    "falcon-grouped": FalconConfig(
        vocab_size=400, hidden_size=192, num_attention_heads=12, num_kv_heads=6, num_hidden_layers=3,
        ffn_hidden_size=520, new_decoder_architecture=True,
    ),
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-small": LlamaConfig(
        vocab_size=512, hidden_size=160, intermediate_size=448, num_hidden_layers=5, num_attention_heads=10,
        num_key_value_heads=5, head_dim=24,
    ),
    "llama-multi-query": LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=1, attention_bias=True, mlp_bias=True,
    ),
    "phi3": Phi3Config(
        vocab_size=800, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=12,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=2,
    ),
    "gemma2": Gemma2Config(
        vocab_size=700, hidden_size=144, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=20,
    ),
    "qwen3-queries": Qwen3Config(
        vocab_size=400, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=24,
        num_key_value_heads=4, head_dim=16,
    ),
}  # fmt: skip
ONE_B, SINGLE = "llama-1b", "qwen3-queries"


@cache
def proved(name: str, asked: tuple[str, ...] = ()) -> tuple[PruningGroups, AxisMap]:
    config = (CONFIGS | COUPLED).get(name) or ALL[name].config()
    groups, _, axis_map = proved_groups(model_class_of(config), config, structures_around(asked))
    return groups, axis_map


def solve(name: str, **choices: Any) -> TargetSizes:
    config = (CONFIGS | COUPLED).get(name) or ALL[name].config()
    hesso = HessoConfig(**choices)
    groups, axis_map = proved(name, hesso.structure_names)
    chosen = groups.select(hesso.structure_names, explicit=hesso.structures != "all")
    parameters = build_cost("parameters", chosen, axis_map, config)
    price = None if hesso.budget_metric == "parameters" else build_cost(hesso.budget_metric, chosen, axis_map, config)
    return solve_budget(hesso, config, chosen, parameters, price)


def built(name: str, sizes: dict[str, int]) -> int:
    """Count the parameters of the stock model with these sizes, head_dim as it was (sizes alone needn't be valid)."""
    small = copy_with((CONFIGS | COUPLED).get(name) or ALL[name].config(), sizes)
    return sum(parameter.numel() for parameter in build_meta(model_class_of(small), small).parameters())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_ratio_is_that_of_the_parameters_of_the_model_that_is_built(name: str, ratio: float):
    target = solve(name, pruning_ratio=ratio)
    assert target.parameters_before == built(name, {})
    assert target.parameters_after == built(name, target.sizes)
    realized = 1 - target.parameters_after / target.parameters_before
    assert realized == pytest.approx(ratio, abs=0.01)
    assert target.ratio == target.parameter_ratio == pytest.approx(realized)


def test_half_of_a_1b_model_leaves_half_and_the_tied_matrix_counts_once():
    target = solve(ONE_B, pruning_ratio=0.5)
    assert target.parameters_before == 1_235_814_400
    assert target.parameters_after == pytest.approx(617_907_200, rel=0.02)


@pytest.mark.parametrize(("structure", "ratio"), [(HEADS, 0.05), (MLP, 0.1), (MLP, 0.3), (STREAM, 0.1), (STREAM, 0.5)])
def test_one_structure_alone_meets_the_ratio(structure: str, ratio: float):
    target = solve("llama-small", pruning_ratio=ratio, structures=[structure])
    assert list(target.kept_units) == [structure]
    assert 1 - built("llama-small", target.sizes) / built("llama-small", {}) == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("pair", [(HEADS, MLP), (MLP, STREAM), (HEADS, STREAM)])
def test_the_structures_that_are_left_out_stay_whole(pair: tuple[str, str]):
    target = solve(ONE_B, pruning_ratio=0.2, structures=list(pair))
    assert sorted(target.kept_units) == sorted(pair)
    assert 1 - built(ONE_B, target.sizes) / built(ONE_B, {}) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("name", [ONE_B, "llama-small"])
@pytest.mark.parametrize("percent", range(4, 88, 6))
def test_sizes_that_the_config_class_refuses_never_come_out(name: str, percent: int):
    sizes = solve(name, pruning_ratio=percent / 100).sizes
    assert sizes["hidden_size"] % sizes["num_attention_heads"] == 0
    LlamaConfig(**sizes, head_dim=24)


@pytest.mark.parametrize("percent", range(4, 88, 12))
def test_with_layers_of_different_widths_the_class_accepts_the_width_beside_all_heads(percent: int):
    sizes = solve("llama-small", pruning_ratio=percent / 100, layer_widths="per_layer").sizes
    assert sizes["hidden_size"] % 10 == sizes["hidden_size"] % sizes["num_attention_heads"] == 0


def test_sizes_that_only_the_model_class_refuses_never_come_out():
    """Moshi's attention wants the width divided by the heads, its config class doesn't say so."""
    model_class, config = default_config("moshi")
    config = tiny_config(model_class, config)
    groups, _, axis_map = proved_groups(model_class, config, (HEADS, STREAM))
    assert groups.picky
    chosen = groups.select((HEADS, STREAM), explicit=True)
    assert chosen.picky
    parameters = build_cost("parameters", chosen, axis_map, config)
    for ratio in (0.3, 0.6):
        sizes = solve_budget(HessoConfig(pruning_ratio=ratio), config, chosen, parameters).sizes
        assert sizes["hidden_size"] % sizes["num_attention_heads"] == 0
    pins = HessoConfig(pruning_ratio=None, target_sizes={"hidden_size": 56, "num_attention_heads": 5})
    with pytest.raises(HessoError, match="MoshiForCausalLM refuses"):
        solve_budget(pins, config, chosen, parameters)


def test_target_sizes_alone_are_exactly_what_comes_out():
    target = solve(ONE_B, target_sizes={"intermediate_size": 5000})
    assert target.sizes == {
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048, "intermediate_size": 5000,
    }  # fmt: skip
    assert target.parameters_before - target.parameters_after == 16 * 3 * 2048 * (8192 - 5000)


@pytest.mark.parametrize("pin", [{"num_attention_heads": 16}, {"num_key_value_heads": 4}])
def test_one_of_two_sizes_of_a_head_pins_both(pin: dict[str, int]):
    sizes = solve(ONE_B, target_sizes=pin).sizes
    assert (sizes["num_attention_heads"], sizes["num_key_value_heads"]) == (16, 4)


@pytest.mark.parametrize(
    ("pins", "ratio"),
    [({"intermediate_size": 6144}, 0.4), ({"hidden_size": 1536, "num_attention_heads": 24}, 0.5)],
)
def test_a_ratio_is_met_around_pinned_sizes(pins: dict[str, int], ratio: float):
    target = solve(ONE_B, pruning_ratio=ratio, target_sizes=pins)
    assert pins.items() <= target.sizes.items()
    assert 1 - built(ONE_B, target.sizes) / built(ONE_B, {}) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("pins", "named"),
    [
        ({"num_attention_heads": 16, "num_key_value_heads": 2}, ["contradict", "attention_heads", "4", "2"]),
        ({"num_attention_heads": 18}, ["num_attention_heads", "18", "multiple of 4", "32"]),
        ({"num_attention_heads": 40}, ["num_attention_heads", "40", "32"]),
        ({"intermediate_size": 8193}, ["intermediate_size", "8193", "8192"]),
        ({"intermediate_sise": 4096}, ["intermediate_sise", "did you mean 'intermediate_size'"]),
        ({"vocab_size": 1000}, ["vocab_size", "can be pinned", "hidden_size"]),
        ({"hidden_size": 1000}, ["LlamaConfig refuses", "1000"]),
    ],
)
def test_impossible_target_sizes_are_refused_with_names(pins: dict[str, int], named: list[str]):
    with pytest.raises(HessoError) as caught:
        solve(ONE_B, target_sizes=pins)
    for part in named:
        assert part in str(caught.value)


def test_a_pin_of_a_structure_that_is_left_out_is_refused():
    with pytest.raises(HessoError, match="hidden_size"):
        solve(ONE_B, target_sizes={"hidden_size": 1024}, structures=[HEADS, MLP])


@pytest.mark.parametrize("round_to", [8, 64, 128])
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.6])
def test_round_to_holds_for_channels(round_to: int, ratio: float):
    sizes = solve(ONE_B, pruning_ratio=ratio, round_to=round_to).sizes
    assert sizes["intermediate_size"] % round_to == 0
    assert sizes["hidden_size"] % round_to == 0


def test_the_default_multiple_is_128_and_less_for_smaller_models():
    sizes = (8192, 4096, 4095, 2048, 512, 511, 256, 255, 128, 64, 52)
    assert [default_round_to(size) for size in sizes] == [128, 128, 64, 64, 16, 8, 8, 4, 4, 2, 1]


def test_heads_stay_divisible_by_two_or_four_ranks_where_there_are_many():
    assert [default_head_multiple(heads) for heads in (32, 16, 14, 12, 8, 9, 6, 4)] == [4, 4, 2, 2, 2, 1, 1, 1]
    for ratio in (0.2, 0.3, 0.5, 0.6):
        assert solve(ONE_B, pruning_ratio=ratio).sizes["num_key_value_heads"] % 2 == 0
    sizes = solve(ONE_B, pruning_ratio=0.37).sizes
    assert sizes["intermediate_size"] % 8 == sizes["hidden_size"] % 8 == 0


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_heads_and_mlp_channels_stay_divisible_over_tensor_parallel_ranks(degree: int, ratio: float):
    sizes = solve(ONE_B, pruning_ratio=ratio, tensor_parallel_size=degree).sizes
    assert sizes["num_attention_heads"] % degree == 0
    assert sizes["num_key_value_heads"] % degree == 0
    assert sizes["intermediate_size"] % degree == 0


def test_a_tensor_parallel_degree_that_no_number_of_heads_meets_is_named():
    with pytest.raises(HessoError, match=r"tensor_parallel_size.*16.*attention_heads"):
        solve(ONE_B, pruning_ratio=0.3, tensor_parallel_size=16)


@pytest.mark.parametrize("shares", [{MLP: 3, HEADS: 1}, {MLP: 1, STREAM: 1}, {MLP: 5, STREAM: 3}], ids=str)
def test_shares_of_the_structures_are_met_approximately(shares: dict[str, float]):
    target = solve(ONE_B, pruning_ratio=0.3, structures=shares)
    full = built(ONE_B, {})
    assert 1 - built(ONE_B, target.sizes) / full == pytest.approx(0.3, abs=0.01)
    own = {HEADS: ("num_attention_heads", "num_key_value_heads"), MLP: ("intermediate_size",), STREAM: ("hidden_size",)}
    alone = {name: full - built(ONE_B, {size: target.sizes[size] for size in own[name]}) for name in shares}
    for name, share in shares.items():
        assert alone[name] / sum(alone.values()) == pytest.approx(share / sum(shares.values()), abs=0.05), name


def test_more_of_a_share_never_means_less_of_the_structure():
    kept = [solve(ONE_B, pruning_ratio=0.3, structures={MLP: w, STREAM: 1}).sizes["intermediate_size"] for w in (1, 4)]
    assert kept[1] < kept[0]


def test_an_unreachable_ratio_names_the_nearest_feasible_ones():
    with pytest.raises(BudgetError) as caught:
        solve(ONE_B, pruning_ratio=0.95, structures=[HEADS, MLP])
    message = str(caught.value)
    assert "`pruning_ratio` (0.95) of parameters can't be met within 5% by" in message
    assert "nearest feasible" in message
    embedding, rest = 128256 * 2048, 2048 * (2 * 16 + 1)
    least = embedding + rest + 16 * 2048 * (64 * 10 + 3 * 8)  # one key-value head with 4 query heads; 8 channels
    assert f"{1 - least / 1_235_814_400:.3f}" in message
    assert "'intermediate_size': 8" in message


def test_an_unreachable_ratio_of_one_structure_is_a_budget_error():
    with pytest.raises(BudgetError, match="nearest feasible"):
        solve(ONE_B, pruning_ratio=0.6, structures=[HEADS])


def test_no_cut_at_all_is_not_named_as_feasible():
    with pytest.raises(BudgetError) as caught:
        solve(ONE_B, pruning_ratio=0.3, structures=[HEADS], tensor_parallel_size=4)
    assert str(caught.value).partition("nearest feasible: ")[2].count(" with ") == 1


def test_a_coarse_choice_warns_and_names_what_is_used(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"):
        target = solve(ONE_B, pruning_ratio=0.14, structures=[HEADS, MLP], round_to=2048)
    realized = 1 - built(ONE_B, target.sizes) / built(ONE_B, {})
    assert 0.01 < abs(realized - 0.14) < 0.05
    (message,) = [record.getMessage() for record in caplog.records if "pruning_ratio" in record.getMessage()]
    assert f"{realized:.3f} with {target.sizes}" in message
    assert "can't be met within 1% by" in message
    caplog.clear()
    solve(ONE_B, pruning_ratio=0.28)
    assert "pruning_ratio" not in caplog.text


def test_the_feasible_sizes_that_a_warning_names_are_different_ones(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"):
        solve(ONE_B, pruning_ratio=0.14, structures=[HEADS, MLP], round_to=2048)
    (message,) = [record.getMessage() for record in caplog.records if "nearest feasible" in record.getMessage()]
    options = message.partition("nearest feasible: ")[2].partition(". The nearest")[0].split("; ")
    assert len(options) == len(set(options)) > 1


def brute_force(name: str, ratio: float, structures: list[str], round_to: int, pins: dict[str, int]) -> float:
    """Return how near the ratio any allowed size of a Llama comes, by trying all of them."""
    config, (groups, axis_map) = CONFIGS[name], proved(name)
    parameters = build_cost("parameters", groups, axis_map, config)
    heads_per_unit = groups.structures[HEADS].increments["num_attention_heads"]
    options = {}
    for structure, units in parameters.units.items():
        step = 1 if structure == HEADS else round_to
        options[structure] = [*range(step, units, step), units] if structure in structures else [units]
        options[structure] = [pins[structure]] if structure in pins else options[structure]
    grid = dict(zip(options, np.meshgrid(*options.values(), indexing="ij"), strict=True))
    off = np.abs(1 - parameters(grid) / parameters.full - ratio)
    return float(off[grid[STREAM] % (grid[HEADS] * heads_per_unit) == 0].min())


@pytest.mark.parametrize("ratio", [0.05, 0.18, 0.33, 0.55])
@pytest.mark.parametrize(
    ("name", "structures", "round_to", "pins"),
    [
        (ONE_B, [HEADS, MLP], 2048, {}),
        (ONE_B, [STREAM], 8, {}),
        (ONE_B, [HEADS, STREAM], 8, {}),
        (ONE_B, [HEADS, MLP, STREAM], 8, {HEADS: 8, MLP: 8192}),
        (ONE_B, [HEADS, MLP, STREAM], 64, {MLP: 7168}),
        ("llama-small", [MLP, STREAM], 4, {}),
        ("llama-small", [HEADS, MLP, STREAM], 8, {MLP: 440}),
    ],
)
def test_a_feasible_size_is_found_wherever_there_is_one(
    name: str, structures: list[str], round_to: int, pins: dict[str, int], ratio: float
):
    best = brute_force(name, ratio, structures, round_to, pins)
    groups = proved(name)[0]
    sizes = {size: n for structure, units in pins.items() for size, n in _sizes(groups, structure, units).items()}
    choices = {"structures": structures, "round_to": round_to, "target_sizes": sizes or None}
    if best > 0.05:
        with pytest.raises(BudgetError):
            solve(name, pruning_ratio=ratio, **choices)
    else:
        target = solve(name, pruning_ratio=ratio, **choices)
        assert abs(target.ratio - ratio) <= max(0.005, best) + 1e-9


def _sizes(groups: PruningGroups, structure: str, units: int) -> dict[str, int]:
    return groups.structures[structure].config_sizes(units)


@pytest.mark.parametrize("metric", ["flops", "memory"])
@pytest.mark.parametrize("name", [ONE_B, "llama-small", "gemma2"])
def test_the_ratio_can_be_of_operations_or_bytes(name: str, metric: str):
    target = solve(name, pruning_ratio=0.4, budget_metric=metric)
    assert target.metric == metric
    assert target.ratio == pytest.approx(0.4, abs=0.01)
    assert target.parameters_after == built(name, target.sizes)
    assert target.cost_after < target.cost_before


@pytest.mark.parametrize("metric", ["parameters", "flops", "memory"])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_query_heads_are_a_multiple_of_the_key_value_heads(ratio: float, metric: str):
    target = solve(SINGLE, pruning_ratio=ratio, structures=[QUERY, MLP], budget_metric=metric)
    assert target.sizes.keys() == {"num_attention_heads", "intermediate_size"}
    assert target.sizes["num_attention_heads"] == target.kept_units[QUERY]
    assert target.sizes["num_attention_heads"] % 4 == 0
    assert target.parameters_after == built(SINGLE, target.sizes)
    assert target.ratio == pytest.approx(ratio, abs=0.05 if metric == "flops" else 0.01)  # most flops are the scores


def test_every_multiple_of_the_key_value_heads_can_be_reached():
    four = 4 * 2 * 16 * 128 * 3 / built(SINGLE, {})  # the share of four query heads per layer
    ratios = [four * count for count in (1, 2, 3, 4, 5)]
    kept = [solve(SINGLE, pruning_ratio=ratio, structures=[QUERY]).kept_units[QUERY] for ratio in ratios]
    assert kept == [20, 16, 12, 8, 4]


@pytest.mark.parametrize(("degree", "allowed"), [(2, {4, 8, 12, 16, 20}), (8, {8, 16})])
def test_query_heads_stay_divisible_over_tensor_parallel_ranks(degree: int, allowed: set[int]):
    found = set()
    for percent in range(2, 34, 2):
        choices = {"structures": [QUERY], "tensor_parallel_size": degree}
        try:
            found.add(solve(SINGLE, pruning_ratio=percent / 100, **choices).sizes["num_attention_heads"])
        except BudgetError:
            continue
    assert found - {24} == allowed


def test_query_heads_can_be_pinned_and_an_error_names_the_multiples():
    pinned = {"num_attention_heads": 8}
    assert solve(SINGLE, target_sizes=pinned, structures=[QUERY]).sizes == pinned
    for size in (2, 10, 28):
        with pytest.raises(
            HessoError, match=rf"num_attention_heads.*\({size}\) must be a multiple of 4 between 4 and 24"
        ):
            solve(SINGLE, target_sizes={"num_attention_heads": size}, structures=[QUERY])
    with pytest.raises(HessoError, match=r"\(9999\) must be an integer between 1 and 2048"):
        solve(ONE_B, target_sizes={"hidden_size": 9999})
    with pytest.raises(HessoError, match=r"'num_key_value_heads' is no size that can be pruned"):
        solve(SINGLE, target_sizes={"num_key_value_heads": 2}, structures=[QUERY])


@pytest.mark.parametrize(("name", "why"), [("multi-head", "of its own"), ("multi-query", "share one key-value head")])
def test_query_heads_that_are_no_group_are_refused_with_what_to_use(name: str, why: str):
    with pytest.raises(UnsupportedStructureError, match=why) as caught:
        solve(f"llama-{name}", pruning_ratio=0.1, structures=[QUERY, MLP])
    assert "attention_heads" in str(caught.value)


def test_the_cache_stays_and_the_scores_shrink_with_the_query_heads():
    config, (groups, axis_map) = CONFIGS[SINGLE], proved(SINGLE, (QUERY,))
    prices = {m: build_cost(m, groups, axis_map, config) for m in ("parameters", "flops", "memory")}
    saved = {metric: price.full - float(price({QUERY: 16})) for metric, price in prices.items()}
    weights = 3 * 8 * 2 * 16 * 128  # rows of q and columns of o of eight heads in three layers
    assert saved["parameters"] == weights
    assert saved["memory"] == 2 * weights
    assert saved["flops"] == 2 * weights + 3 * CONTEXT * 2 * 2 * 8 * 16


def test_only_numbers_of_query_heads_that_can_be_are_timed(monkeypatch: pytest.MonkeyPatch):
    timed = set()
    monkeypatch.setattr(LatencyTable, "_time", lambda self, rows, columns: timed.add(rows) or 1e-6 * rows * columns)
    model = random_model(QUERIES["qwen3-queries"].config())  # four query heads of 10 for each of two key-value heads
    hesso = HessoConfig(pruning_ratio=0.05, structures=[QUERY], budget_metric="latency", latency_tokens=64)
    target = PruningPlan.prepare(model, hesso).target
    assert target.kept_units[QUERY] % 2 == 0
    assert target.ratio == pytest.approx(0.05, abs=0.05)
    assert {20, 40, 60, 80} <= timed
    assert not {10, 30, 50, 70} & timed


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("name", COUPLED)
def test_heads_and_width_that_shrink_together_meet_the_ratio(name: str, ratio: float):
    target = solve(name, pruning_ratio=ratio)
    assert target.parameters_before == built(name, {})
    assert target.parameters_after == built(name, target.sizes)
    assert target.parameter_ratio == pytest.approx(ratio, abs=0.01)
    assert target.sizes["hidden_size"] == 16 * target.sizes["num_attention_heads"]
    assert target.kept_units[STREAM] == target.sizes["hidden_size"]
    assert target.kept_units[HEADS] == target.sizes["num_attention_heads"] // (2 if name == "falcon-grouped" else 1)


@pytest.mark.parametrize(
    "pins", [{"hidden_size": 128}, {"num_attention_heads": 8}, {"hidden_size": 128, "num_attention_heads": 8}], ids=str
)
@pytest.mark.parametrize("name", COUPLED)
def test_one_of_the_coupled_sizes_pins_the_other(name: str, pins: dict[str, int]):
    sizes = solve(name, target_sizes=pins).sizes
    assert (sizes["hidden_size"], sizes["num_attention_heads"]) == (128, 8)
    assert sizes["intermediate_size"] == 520
    around = solve(name, pruning_ratio=0.5, target_sizes=pins)
    assert (around.sizes["hidden_size"], around.sizes["num_attention_heads"]) == (128, 8)
    assert around.parameter_ratio == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "pins", "named"),
    [
        ("gpt2-tied", {"hidden_size": 128, "num_attention_heads": 6}, ["contradict", "8", "6"]),
        ("gpt2-tied", {"hidden_size": 120}, ["hidden_size", "(120)", "multiple of 16", "shrink together"]),
        ("gpt2-tied", {"hidden_size": 208}, ["hidden_size", "(208)", "192"]),
        ("falcon-grouped", {"hidden_size": 144}, ["hidden_size", "(144)", "multiple of 32"]),
        ("falcon-grouped", {"num_attention_heads": 7}, ["num_attention_heads", "(7)", "multiple of 2"]),
    ],
)
def test_impossible_coupled_sizes_are_refused_with_numbers(name: str, pins: dict[str, int], named: list[str]):
    with pytest.raises(HessoError) as caught:
        solve(name, target_sizes=pins)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize("structures", [[HEADS], [STREAM], [HEADS, MLP], [STREAM, MLP]], ids=str)
def test_one_of_the_coupled_structures_alone_is_refused_with_the_reason(structures: list[str]):
    with pytest.raises(UnsupportedStructureError, match=r"only shrink together.*name all of them, or none") as caught:
        solve("gpt2-tied", pruning_ratio=0.2, structures=structures)
    other = STREAM if HEADS in structures else HEADS
    assert f"leaves out ['{other}']" in str(caught.value)


def test_the_mlp_of_a_coupled_model_can_be_pruned_alone():
    target = solve("gpt2-tied", pruning_ratio=0.2, structures=[MLP])
    assert list(target.kept_units) == [MLP]
    assert target.sizes.keys() == {"intermediate_size"}
    assert target.parameter_ratio == pytest.approx(0.2, abs=0.01)


def test_shares_of_coupled_structures_steer_the_split():
    def sizes(mlp: float) -> dict[str, int]:
        shares = {HEADS: 1, STREAM: 1, MLP: mlp}
        return solve("gpt2-tied", pruning_ratio=0.35, structures=shares, round_to=8).sizes

    more, less = sizes(6), sizes(0.2)
    assert more["intermediate_size"] < less["intermediate_size"]
    assert more["hidden_size"] >= less["hidden_size"]
    for found in (more, less):
        assert found["hidden_size"] == 16 * found["num_attention_heads"]


@pytest.mark.parametrize("name", COUPLED)
def test_the_split_of_a_coupled_model_can_be_measured(name: str):
    model = random_model(COUPLED[name])
    before = [parameter.clone() for parameter in model.parameters()]
    batches = [torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    hesso = HessoConfig(pruning_ratio=0.3)
    plan = PruningPlan.prepare(model, hesso)

    def loss(tried: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        return tried(input_ids=batch, labels=batch).loss

    assert plan.wants_calibration
    plan.settle(lambda: measure_curves(model, plan.groups, batches, loss, hesso))
    assert plan.target.parameter_ratio == pytest.approx(0.3, abs=0.01)
    assert plan.target.sizes["hidden_size"] == 16 * plan.target.sizes["num_attention_heads"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def cost(metric: str, name: str) -> Cost:
    groups, axis_map = proved(name)
    return build_cost(metric, groups, axis_map, ALL[name].config())


@pytest.mark.parametrize(
    ("kept", "heads", "kv_heads", "channels", "width"),
    [({}, 6, 3, 52, 72), ({HEADS: 2, MLP: 37, STREAM: 48}, 4, 2, 37, 48), ({MLP: 1}, 6, 3, 1, 72)],
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_costs_of_a_tiny_llama_by_hand(
    name: str, kept: dict[str, int], heads: int, kv_heads: int, channels: int, width: int
):
    vocabulary, layers, head_dim = 97, 2, 10
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    matrices = layers * (attention + 3 * width * channels)
    norms = width * (2 * layers + 1)
    copies = 1 if name == "llama-tied" else 2
    weights = matrices + norms + copies * vocabulary * width
    assert cost("parameters", name)(kept) == weights

    scores = layers * CONTEXT * 2 * 2 * heads * head_dim  # q k^T and the weighted sum of v
    assert cost("flops", name)(kept) == 2 * (matrices + vocabulary * width) + norms + scores

    cache_elements = layers * CONTEXT * 2 * kv_heads * head_dim
    assert cost("memory", name)(kept) == 2 * (weights + cache_elements)


@pytest.mark.parametrize("metric", ["parameters", "flops", "memory"])
def test_costs_fall_with_every_unit(metric: str):
    price = cost(metric, "llama")
    for structure, units in price.units.items():
        prices = [float(price({structure: count})) for count in range(1, units + 1)]
        assert prices == sorted(set(prices))
        assert prices[-1] == price.full


def test_only_the_chosen_experts_count_as_operations():
    config = ALL["mixtral"].config()  # two of four experts a token
    _, axis_map = proved("mixtral")
    dense = build_cost("flops", PruningGroups({}), axis_map, config).full
    experts = 2 * 4 * 3 * 72 * 52
    router, width = 2 * 4 * 72, 72
    attention = 2 * width * 10 * (2 * 6 + 2 * 3)
    scores = 2 * CONTEXT * 2 * 2 * 6 * 10
    assert dense == 2 * (experts / 2 + router + attention + 97 * width) + width * 5 + scores


def test_a_latency_budget_prices_every_matrix_product_not_parameters(monkeypatch: pytest.MonkeyPatch):
    """Timings are replaced by a millisecond a million elements, so that the price is known."""
    monkeypatch.setattr(LatencyTable, "_time", lambda self, rows, columns: 1e-6 * rows * columns)
    hesso = HessoConfig(pruning_ratio=0.4, budget_metric="latency", latency_tokens=64)
    target = PruningPlan.prepare(random_model(ALL["llama"].config()), hesso).target
    products = 2 * (72 * 10 * (6 + 3 + 3 + 6) + 3 * 72 * 52) + 97 * 72  # no look-up, no norm
    assert target.metric == "latency"
    assert target.cost_before == pytest.approx(1e-6 * products)
    assert target.ratio == pytest.approx(0.4, abs=0.03)


def test_target_sizes_survive_json():
    target = solve("llama-small", pruning_ratio=0.3)
    assert TargetSizes.from_dict(target.to_dict()) == target


@pytest.mark.parametrize("ratio", [1e-9, 0.001, 0.004])
def test_a_ratio_at_which_nothing_would_go_is_refused_with_the_least_that_can(ratio: float) -> None:
    message = rf"`pruning_ratio` \({ratio}\) is too small: the least that can go here is"
    with pytest.raises(BudgetError, match=message) as error:
        solve("llama-small", pruning_ratio=ratio, round_to=64)
    least = float(str(error.value).partition("; take ")[2].split()[0])
    assert solve("llama-small", pruning_ratio=least, round_to=64).ratio > 0


def test_a_small_cut_is_made_though_none_would_cost_less() -> None:
    """Among sizes that are near enough the loss decides, and nothing at all would always win."""
    target = solve("llama-1b", pruning_ratio=0.003)
    assert target.parameters_after < target.parameters_before


@pytest.mark.parametrize(("asked", "step"), [(None, 8), (1, 8), (12, 24)])
def test_channels_of_fused_experts_are_whole_rows_for_their_kernels(asked: int | None, step: int) -> None:
    groups, _ = proved("mixtral")
    channels = groups.structures["mlp_channels"]
    *fewer, whole = allowed_counts(HessoConfig(0.3, round_to=asked), channels, 128)
    assert fewer == list(range(step, channels.num_units, step))
    assert whole == channels.num_units
