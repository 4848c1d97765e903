"""What a matrix reads of tokens: a few rows at a time come to what all at once do."""

from __future__ import annotations

import pytest
import torch

from hesso_hf.pruning import refit, token_rows
from hesso_hf.pruning.refit import StandIn
from hesso_hf.pruning.token_rows import TokenRows
from tests.support.tiny import all_rows


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_rows, refit):
        monkeypatch.setattr(module, "CHUNK", 4)


def test_sums_over_a_few_rows_at_a_time_are_those_of_all_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, scale = (torch.randn(*shape, generator=generator) for shape in ((13, 5), (11,)))
    places = torch.tensor([0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12])
    tokens = TokenRows(rows, places, scale)
    whole = rows[places] * scale[:, None]
    assert [len(few) for few in tokens.chunks()] == [4, 4, 3]
    assert torch.equal(tokens.all(torch.float32), whole)
    assert tokens.gram().dtype == torch.float64
    assert float((tokens.gram() - whole.double().T @ whole.double()).abs().max()) < 1e-5
    some = torch.tensor([1, 3, 8])
    assert torch.equal(tokens.chosen(some).all(torch.float32), whole[some])
    assert torch.equal(all_rows(rows).all(torch.float32), rows)


def test_what_stands_in_for_columns_is_put_in_their_place_in_every_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, said = (torch.randn(*shape, generator=generator) for shape in ((13, 5), (2, 3)))
    gone, stays = torch.tensor([1, 4]), torch.tensor([0, 2, 3])
    found = StandIn(said, gone, stays).healed(rows)
    assert torch.equal(found[:, stays], rows[:, stays])
    assert float((found[:, gone] - rows[:, stays] @ said.T).abs().max()) < 1e-6
    assert not StandIn(None, gone, stays).healed(rows)[:, gone].any()
