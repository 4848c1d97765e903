"""The refit by columns and by tokens, and sums in fp32, as they are kept on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hesso_hf.pruning import reconstruction, refit
from hesso_hf.pruning.reconstruction import removal_costs
from hesso_hf.pruning.refit import ColumnSums, TokenSums, said_by_others
from hesso_hf.pruning.token_rows import TokenRows
from tests.support.tiny import all_rows

COLUMNS, OUT = 40, 7


def setting(tokens: int, columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations that say a lot of each other, weights of the marked ones, and which these are and which stay."""
    generator = torch.Generator().manual_seed(tokens)
    hidden, mixed = (torch.randn(*shape, generator=generator) for shape in ((tokens, 13), (13, columns)))
    rows = hidden @ mixed + 0.1 * torch.randn(tokens, columns, generator=generator)
    gone, pruned = (torch.zeros(columns, dtype=torch.bool) for _ in range(2))
    gone[3::4], pruned[::10] = True, True
    return rows, torch.randn(OUT, int(gone.sum()), generator=generator), gone, ~gone & ~pruned


def by_columns(rows: torch.Tensor, gone: torch.Tensor, stays: torch.Tensor) -> ColumnSums:
    """Columns' sums, all in fp64."""
    return ColumnSums(rows.double().T @ rows.double(), gone, stays)


@pytest.mark.parametrize("tokens", [25, 90])
def test_columns_and_tokens_give_the_same_regression(tokens: int) -> None:
    rows, weight, gone, stays = setting(tokens)
    weight = weight.double()
    columns, tokenwise = by_columns(rows[:10], gone, stays), TokenSums(rows[:10].double(), gone, stays)
    columns.add_(by_columns(rows[10:], gone, stays))
    tokenwise.add_(TokenSums(rows[10:].double(), gone, stays))
    for ridge in (1e-2, 1.0):
        assert columns.said(ridge).shape == (int(gone.sum()), int(stays.sum()))
        assert (columns.said(ridge) - tokenwise.said(ridge)).abs().max() < 1e-10
    left = rows[:, gone].double() @ weight.T
    for sums in (columns, tokenwise):
        behind = sums.behind(weight)
        added, unhealed = sums.solved(behind, 0.1), sums.unhealed(weight, behind)
        assert (added.T - weight @ sums.said(0.1)).abs().max() < 1e-10
        assert float(unhealed) == pytest.approx(float(left.square().sum()), rel=1e-10)
        rest = left - rows[:, stays].double() @ added
        assert float(sums.error(behind, unhealed, added)) == pytest.approx(float(rest.square().sum()), rel=1e-8)


def test_of_few_tokens_no_matrix_of_all_columns_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, gone, stays = setting(32)
    expected = by_columns(rows, gone, stays)

    def too_large(rows: TokenRows) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TokenRows, "gram", too_large)
    found = said_by_others(all_rows(rows), weight, gone, stays)
    assert found is not None
    nearest = min((expected.said(ridge) - found).abs().max() for ridge in refit.RIDGES)
    assert nearest < 1e-10
    with pytest.raises(torch.OutOfMemoryError):
        said_by_others(all_rows(setting(50)[0]), weight, gone, stays)


def test_sums_in_fp32_are_enough() -> None:
    """Of activations a few of which are far larger than others, so that the matrix is badly conditioned."""
    columns = 600
    rows, weight, gone, stays = setting(1500, columns)
    rows[0] *= 100
    rows[:, ::50] *= 30
    exact = ColumnSums(all_rows(rows).gram(), gone, stays)
    rounded = ColumnSums(exact.gram.float(), gone, stays)
    for ridge in refit.RIDGES:
        errors = []
        for sums in (exact, rounded):
            behind = sums.behind(weight.to(sums.dtype))
            unhealed = sums.unhealed(weight.to(sums.dtype), behind)
            errors.append(float(sums.error(behind, unhealed, sums.solved(behind, ridge))))
        assert abs(errors[0] - errors[1]) < 1e-5 * float(unhealed)
    every, none = torch.arange(columns), torch.zeros(columns, dtype=torch.bool)
    read = torch.randn(OUT, columns, generator=torch.Generator().manual_seed(1))
    wanted, found = (removal_costs(sums.gram, read.to(sums.dtype), every, none) for sums in (exact, rounded))
    for count in (75, 300, 500):
        lowest = [set(costs.argsort()[:count].tolist()) for costs in (wanted, found)]
        assert len(lowest[0] & lowest[1]) >= 0.97 * count


def test_where_fp32_is_not_enough_costs_are_those_of_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = setting(90)[0]
    gram = all_rows(rows).gram()
    units, none = torch.arange(COLUMNS), torch.zeros(COLUMNS, dtype=torch.bool)
    weight = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected, plain = removal_costs(gram.float().double(), weight.double(), units, none), torch.linalg.cholesky

    def strict(matrix: torch.Tensor) -> torch.Tensor:
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("the leading minor of order 3 is not positive-definite")
        return plain(matrix)

    monkeypatch.setattr(reconstruction.torch.linalg, "cholesky", strict)
    assert torch.equal(removal_costs(gram.float(), weight, units, none), expected)
