"""The sizes of models on the way to the target."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hesso_hf.budget.cost import build_cost
from hesso_hf.budget.ladder import solve_ladder
from hesso_hf.budget.target_sizes import TargetSizes
from hesso_hf.config import HessoConfig
from hesso_hf.errors import BudgetError
from tests.budget.test_solver import CONFIGS, ONE_B, proved


def solved(hesso: HessoConfig) -> list[TargetSizes]:
    config, (groups, axis_map) = CONFIGS[ONE_B], proved(ONE_B)
    return solve_ladder(hesso, config, groups, build_cost("parameters", groups, axis_map, config))


@given(steps=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
@settings(max_examples=10, deadline=None)
def test_what_a_model_on_the_way_keeps_of_each_structure_the_later_ones_keep_no_more_of(steps: list[int]) -> None:
    shares = [4 * step / 100 for step in sorted(steps)]
    hesso = HessoConfig(pruning_ratio=0.5, export_at=shares)
    target, *rungs = solved(hesso)
    for share, rung in zip(shares, rungs, strict=True):
        assert abs(rung.ratio - share) <= 0.01
    for larger, smaller in pairwise((*rungs, target)):
        assert all(larger.kept_units[structure] >= count for structure, count in smaller.kept_units.items())
        assert larger.parameters_after > smaller.parameters_after


def test_sizes_that_the_last_model_ends_with_are_no_smaller_on_the_way() -> None:
    target, rung = solved(HessoConfig(pruning_ratio=0.5, export_at=[0.2], target_sizes={"intermediate_size": 3072}))
    assert target.sizes["intermediate_size"] == 3072
    assert rung.sizes.get("intermediate_size", 8192) > 3072
    assert abs(rung.ratio - 0.2) <= 0.01


def test_a_share_on_the_way_that_cannot_be_met_is_named_as_such() -> None:
    pinned = {"num_key_value_heads": 8, "hidden_size": 2048}
    with pytest.raises(BudgetError, match=r"`export_at` \(0.1\) is too small: the least that can go"):
        solved(HessoConfig(pruning_ratio=0.326, export_at=[0.1], target_sizes=pinned, round_to=4096))


def test_shares_on_the_way_between_which_nothing_goes_are_refused() -> None:
    hesso = HessoConfig(pruning_ratio=0.3, export_at=[0.2999])
    with pytest.raises(BudgetError, match=r"`export_at` \(0.2999\): the sizes nearest to it are those of the next"):
        solved(hesso)
