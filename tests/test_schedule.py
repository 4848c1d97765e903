"""Schedule: phases, periods, scoring windows, shares and counts, and what doesn't fit."""

from __future__ import annotations

import json

import pytest

from hesso_hf.config import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.schedule import Schedule, resolve_schedule


def resolved(total_steps: int, **steps: float) -> Schedule:
    return resolve_schedule(HessoConfig(pruning_ratio=0.5, **steps), total_steps)


def test_phases() -> None:
    schedule = Schedule(warmup_steps=2, pruning_steps=7, pruning_periods=3, total_steps=12)
    phases = [schedule.phase(step) for step in range(13)]
    assert phases == ["warmup"] * 2 + ["pruning"] * 7 + ["recovery"] * 4
    assert schedule.end == 9


def test_the_last_period_takes_the_remainder() -> None:
    schedule = Schedule(warmup_steps=2, pruning_steps=11, pruning_periods=3, total_steps=20)
    assert schedule.scoring_steps() == [2, 5, 8]
    steps = [schedule.period_step(step) for step in range(20)]
    assert [step for step in steps[:2] + steps[13:] if step is not None] == []
    found = [(step.index, step.t, step.length) for step in steps[2:13] if step is not None]
    assert found == [(p, t, length) for p, length in enumerate((3, 3, 5)) for t in range(length)]


def test_factors_multiply_up_to_what_is_left_of_the_period() -> None:
    schedule = Schedule(warmup_steps=0, pruning_steps=5, pruning_periods=1, total_steps=5)
    left = 1.0
    for t in range(5):
        position = schedule.period_step(t)
        assert position is not None
        left *= position.factor
        assert left == pytest.approx((5 - t - 1) / 5)
    assert left == 0.0


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 8, 100])
@pytest.mark.parametrize("schedule", [Schedule(4, 11, 3, 20), Schedule(0, 6, 2, 6), Schedule(9, 2, 2, 30)])
def test_scoring_windows_end_with_the_scoring_step_and_do_not_overlap(schedule: Schedule, batches: int) -> None:
    starts = schedule.scoring_steps()
    windows: list[list[int]] = []
    previous = -1
    for start in starts:
        windows.append([step for step in range(start + 1) if step > previous and step > start - batches])
        previous = start
    expected = sorted(step for window in windows for step in window)
    assert [step for step in range(schedule.total_steps) if schedule.scoring_window(step, batches)] == expected
    assert len(expected) == len(set(expected))
    for window, start in zip(windows, starts, strict=True):
        assert window[-1] == start
        assert len(window) <= batches


def test_shares_and_counts() -> None:
    assert resolved(1000) == Schedule(50, 150, 3, 1000)  # the defaults: 5% and 15%
    assert resolved(1000, warmup_steps=7, pruning_steps=21, pruning_periods=5) == Schedule(7, 21, 5, 1000)
    assert resolved(200, warmup_steps=0.1, pruning_steps=31) == Schedule(20, 31, 3, 200)
    assert resolved(200, warmup_steps=0, pruning_steps=0.5, pruning_periods=7) == Schedule(0, 100, 7, 200)


def test_very_short_runs_get_fewer_periods_by_default() -> None:
    assert resolved(10) == Schedule(0, 2, 2, 10)
    assert resolved(1) == Schedule(0, 1, 1, 1)


def test_a_schedule_may_fill_the_run_exactly() -> None:
    assert resolved(30, warmup_steps=10, pruning_steps=20).end == 30


def test_a_schedule_longer_than_the_run_is_refused_with_the_numbers() -> None:
    with pytest.raises(HessoError, match=r"`warmup_steps` \(10\) \+ `pruning_steps` \(21\) = 31 .* 30 steps"):
        resolved(30, warmup_steps=10, pruning_steps=21)
    with pytest.raises(HessoError, match=r"`warmup_steps` \(6\) \+ `pruning_steps` \(5\) = 11 .* 10 steps"):
        resolved(10, warmup_steps=0.6, pruning_steps=0.5)


def test_fewer_steps_than_periods_are_refused_with_the_numbers() -> None:
    with pytest.raises(HessoError, match=r"`pruning_steps` \(2\) must be at least `pruning_periods` \(3\)"):
        resolved(10, pruning_steps=0.2, pruning_periods=3)
    with pytest.raises(HessoError, match=r"`pruning_steps` \(8\) must be at least `pruning_periods` \(10\)"):
        HessoConfig(pruning_ratio=0.5, pruning_steps=8, pruning_periods=10)


def test_json_round_trip() -> None:
    schedule = Schedule(4, 11, 3, 20)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
