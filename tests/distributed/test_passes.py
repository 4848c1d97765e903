"""Passes beside training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hesso_hf.distributed.passes import evaluating


class Layer(nn.Module):
    """A layer of more than one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(rows)


def test_what_was_compiled_in_place_runs_as_it_is_written_so_that_hooks_see_it() -> None:
    """A graph that was made before there were hooks would be run again, without them."""
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            runs.append(1)
            return graph(*given)

        return run

    model = nn.Sequential(Layer()).eval()
    model[0].compile(backend=backend)
    rows = torch.ones(1, 3)
    with torch.no_grad():
        model(rows)
        assert runs == [1]
        with evaluating(model):
            model(rows)
        assert runs == [1]
        model(rows)
    assert runs == [1, 1]
    torch.compiler.reset()
