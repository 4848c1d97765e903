"""The state of a run: it prints, goes through a file, and states of format 2 that earlier code wrote still load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from hesso_hf.export.decision import Compaction
from hesso_hf.pruning import phases
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.pruning.state import PruningState
from tests.support.tiny import backward, process_for, tiny_llama, token_batches

# Written by the code that first had format 2: {case: {hesso: state, weights, kept: units at the end, config}}.
SAVED = Path(__file__).parent / "data" / "format_2.pt"
KEPT = {"attention_heads": 2, "mlp_channels": 33}
STEPS = {"period": 6, "cric": 2, "watched": 4, "paused": 4}
PHASES = {"cric": phases.CricCycle}  # else a period


def assert_same(mine: Any, its: Any, where: str = "") -> None:
    assert type(mine) is type(its), where
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, its), where
    elif isinstance(mine, dict):
        assert mine.keys() == its.keys(), where
        for key in mine:
            assert_same(mine[key], its[key], f"{where}/{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(its), where
        for index, (one, other) in enumerate(zip(mine, its, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert mine == its, where


@pytest.mark.parametrize("case", list(STEPS))
def test_a_state_of_format_2_loads_and_the_run_ends_as_it_did(case: str) -> None:
    saved = torch.load(SAVED, weights_only=True)[case]
    model = tiny_llama(seed=99)
    model.load_state_dict(saved["weights"])
    process = process_for(model, KEPT, Schedule(1, 2, 1, 3), **({"healing": "off"} | saved["config"]))
    optimizer = HessoOptimizer(SGD(model.parameters(), lr=1e-2), process)
    optimizer.load_pruning_state(saved["hesso"])
    assert process.step == STEPS[case]
    assert isinstance(phases.phase_of(process.run), PHASES.get(case, phases.PruningPeriod))
    # what it held is what is saved again; of the two keys about the order, one follows from the other by now
    assert_same(process.state_dict() | {"reorder": None}, saved["hesso"] | {"reorder": None})
    total = process.schedule.total_steps
    for batch in token_batches(total)[process.step :]:
        backward(model, batch)
        optimizer.report_loss(2.0)
        optimizer.step()
    assert process.finished
    assert process.kept_units().to_dict() == saved["kept"]


def test_a_state_prints_what_it_holds() -> None:
    model = tiny_llama()
    schedule = Schedule(1, 4, 2, 12, cycle_steps=2, cycles=2)
    optimizer = HessoOptimizer(SGD(model.parameters(), lr=1e-2), process_for(model, KEPT, schedule, cric=True))
    state = optimizer.process.state
    assert str(state).splitlines()[:2] == ["step 0 of 12 (warmup)", "attention_heads: 6 kept, 0 redundant, 0 pruned"]
    for batch in token_batches(2):
        backward(model, batch)
        optimizer.step()
    assert "step 2 of 12 (sampling)" in str(state)
    assert "CRIC: not decided, 1 of at most 2 cycles begun" in str(state)
    assert str(state).endswith("snapshots: trial")


def test_a_pruned_unit_keeps_the_score_that_it_went_by() -> None:
    model = tiny_llama()
    optimizer = HessoOptimizer(SGD(model.parameters(), lr=1e-2), process_for(model, KEPT, Schedule(1, 4, 2, 6)))
    state, judged = optimizer.process.state, []
    for batch in token_batches(5):
        backward(model, batch)
        optimizer.step()
        judged.append({name: score.clone() for name, score in state.judged.items()})
    assert judged[0] == {}
    first, then, second = (judged[step]["mlp_channels"] for step in (1, 2, 4))  # steps 1 and 3 mark
    assert torch.equal(first, then)
    unchanged, gone = first == second, state.scales["mlp_channels"] == 0
    assert unchanged.sum(1).tolist() == [6, 6]  # half of the 11 that go
    assert (gone | ~unchanged).all()


def test_every_field_is_saved() -> None:
    process = process_for(tiny_llama(), KEPT, Schedule(1, 2, 1, 3))
    process.state.healing = {"a matrix": [torch.zeros(2)]}  # is saved where there is some
    process.state.compaction = Compaction(2, 0.0, 10, {}, process.kept_units())  # and this
    process.state.judged = {"mlp_channels": torch.zeros(2, 44)}  # and this
    process.state.corrections.sizes.append({})  # and this
    assert {field.name for field in dataclasses.fields(PruningState)} <= process.state_dict().keys()
