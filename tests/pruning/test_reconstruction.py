"""Reconstruction: what a unit's going costs is what least squares can't put right."""

from __future__ import annotations

import pytest
import torch

from hesso_hf.pruning.reconstruction import RIDGE, removal_costs

OUT, TOKENS = 5, 60


def setting(columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed.double(), torch.randn(OUT, columns, generator=generator).double()


def ridge_error(x: torch.Tensor, weight: torch.Tensor, stays: list[int]) -> float:
    """Return |X W^T - X_S W_S'^T|^2 + ridge |W - W'|^2 of the best W' that has only the columns S."""
    ridge = RIDGE * float(x.square().sum()) / x.shape[1]
    inputs = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    target = inputs @ weight.T
    fitted = torch.linalg.lstsq(inputs[:, stays], target).solution
    return float((inputs[:, stays] @ fitted - target).square().sum())


@pytest.mark.parametrize("size", [1, 3])
def test_costs_are_what_least_squares_leaves(size: int) -> None:
    columns = 6 * size  # so few units that they go one at a time
    x, weight = setting(columns)
    units = torch.arange(6).repeat(size)  # columns of a unit don't lie together
    costs = removal_costs(x.T @ x, weight, units, torch.zeros(6, dtype=torch.bool))
    left, lost, expected = list(range(6)), 0.0, 0.0
    for unit in costs.argsort().tolist():
        rise = {
            u: ridge_error(x, weight, [c for c in range(columns) if int(units[c]) in left and int(units[c]) != u])
            - lost
            for u in left
        }
        assert min(rise, key=lambda u: rise[u]) == unit
        expected = max(expected, rise[unit])  # what goes later never costs less
        assert float(costs[unit]) == pytest.approx(expected, rel=1e-6)
        lost += rise[unit]
        left.remove(unit)


def test_a_unit_that_another_repeats_costs_little_and_one_of_the_two_stays() -> None:
    x, weight = setting(12)
    x[:, 3] = -2 * x[:, 8]
    costs = removal_costs(x.T @ x, weight, torch.arange(12), torch.zeros(12, dtype=torch.bool))
    cheap, dear = sorted((float(costs[3]), float(costs[8])))
    assert cheap < 0.02 * dear


def test_pruned_units_neither_cost_nor_help() -> None:
    x, weight = setting(9)
    pruned = torch.zeros(9, dtype=torch.bool)
    pruned[[2, 5]] = True
    rest = (~pruned).nonzero().flatten()
    found = removal_costs(x.T @ x, weight, torch.arange(9), pruned)
    alone = removal_costs((x.T @ x)[rest][:, rest], weight[:, rest], torch.arange(7), torch.zeros(7, dtype=torch.bool))
    assert found[pruned].eq(0).all()
    assert torch.allclose(found[rest], alone, rtol=1e-9)


def test_many_units_keep_the_order_in_which_they_go() -> None:
    x, weight = setting(50)
    costs = removal_costs(x.T @ x, weight, torch.arange(50), torch.zeros(50, dtype=torch.bool))
    assert len(costs.unique()) == 50
    assert (costs > 0).all()


def test_large_units_cost_the_same_on_several_threads() -> None:
    """Batched LU of blocks so large fails in some builds of torch's CPU library, as soon as it has two threads."""
    x, _ = setting(3 * 192)
    weight = torch.randn(576, 576, generator=torch.Generator().manual_seed(1)).double()
    units, none = torch.arange(3).repeat_interleave(192), torch.zeros(3, dtype=torch.bool)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(removal_costs(x.T @ x, weight, units, none))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=0.0)
