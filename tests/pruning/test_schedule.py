"""Schedule: phases, periods, scoring windows, shares and counts, and what doesn't fit."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hesso_hf.config import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.pruning.schedule import PHASES, PeriodStep, Schedule, resolve_schedule
from tests.support.checks import propagated


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
    assert resolved(1000) == Schedule(20, 80, 3, 1000)  # the defaults: 2% and 8%
    assert resolved(1000, warmup_steps=7, pruning_steps=21, pruning_periods=5) == Schedule(7, 21, 5, 1000)
    assert resolved(200, warmup_steps=0.1, pruning_steps=31) == Schedule(20, 31, 3, 200)
    assert resolved(200, warmup_steps=0, pruning_steps=0.5, pruning_periods=7) == Schedule(0, 100, 7, 200)


def test_very_short_runs_get_fewer_periods_by_default() -> None:
    assert resolved(25) == Schedule(0, 2, 2, 25)
    assert resolved(10) == Schedule(0, 1, 1, 10)
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


# -- models on the way ------------------------------------------------------------------------------------------------


def climbing(total_steps: int, export_at: list[float], **steps: float) -> Schedule:
    return resolve_schedule(HessoConfig(pruning_ratio=0.5, export_at=export_at, **steps), total_steps)  # type: ignore[arg-type]


def test_models_are_saved_when_equal_parts_of_the_periods_are_over_and_after_some_recovery() -> None:
    schedule = climbing(60, [0.2], warmup_steps=2, pruning_steps=8, ladder_recovery=3)
    assert [(p.start, p.end, p.share) for p in schedule.periods] == [
        (2, 4, Fraction(1, 4)), (4, 6, Fraction(1, 2)), (9, 11, Fraction(3, 4)), (11, 13, Fraction(1)),
    ]  # fmt: skip
    assert schedule.rung_saves == (9,)
    phases = [schedule.phase(step) for step in range(14)]
    assert phases == ["warmup"] * 2 + ["pruning"] * 4 + ["recovery"] * 3 + ["pruning"] * 4 + ["recovery"]
    assert schedule.end == 13


@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 30), st.integers(6, 60), st.integers(0, 2))
def test_the_periods_of_a_ladder_take_the_pruning_steps_and_recovery_lies_between(
    rungs: int, recovery: int, warmup: int, pruning: int, pauses: int
) -> None:
    shares = [0.1 * (index + 1) for index in range(rungs)]
    schedule = climbing(1000, shares, warmup_steps=warmup, pruning_steps=pruning, ladder_recovery=recovery)
    assert sum(schedule.phase(step) == "pruning" for step in range(1000)) == pruning
    assert schedule.end == warmup + pruning + rungs * recovery
    for _ in range(pauses):
        schedule = schedule.after_pause(schedule.periods[-1].start) or schedule
    ends = {period.end: period.share for period in schedule.periods}
    assert [ends[step - recovery] for step in schedule.rung_saves] == [
        Fraction(index + 1, rungs + 1) for index in range(rungs)
    ]
    assert all(step >= schedule.end or schedule.period_step(step) is None or step in
               [period.start for period in schedule.periods] for step in schedule.rung_saves)  # fmt: skip
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_a_pause_puts_off_what_is_saved_after_it_and_nothing_before() -> None:
    schedule = climbing(100, [0.1, 0.2], warmup_steps=2, pruning_steps=6, ladder_recovery=2)
    assert schedule.rung_saves == (6, 10)
    paused = schedule.after_pause(6)  # the first step of the second period
    assert paused is not None
    assert paused.rung_saves == (6, 10 + 3)


def test_recovery_that_the_run_has_no_steps_for_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        HessoError, match=r"`ladder_recovery` \(4 steps\) for each of .*\[0.2, 0.3\].* the 7 steps .* 20"
    ):
        climbing(20, [0.2, 0.3], warmup_steps=4, pruning_steps=9, ladder_recovery=4)
    with pytest.raises(
        HessoError, match=r"`pruning_steps` \(2 of .* 20\) must be at least 3: one for each of `export_at`"
    ):
        climbing(20, [0.2, 0.3], warmup_steps=4, pruning_steps=2)


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling(total_steps: int, **config: float | str) -> Schedule:
    return resolve_schedule(HessoConfig(pruning_ratio=0.5, cric=True, **config), total_steps)  # type: ignore[arg-type]


def room(schedule: Schedule) -> int:
    """Steps that sampling may take: half of what warm-up and pruning leave."""
    return (schedule.total_steps - schedule.warmup_steps - schedule.pruning_steps) // 2


CYCLES = Schedule(warmup_steps=2, pruning_steps=5, pruning_periods=2, total_steps=20, cycle_steps=3, cycles=2)


def test_sampling_lies_between_warm_up_and_pruning() -> None:
    phases = [CYCLES.phase(step) for step in range(20)]
    assert phases == ["warmup"] * 2 + ["sampling"] * 6 + ["pruning"] * 5 + ["recovery"] * 7
    assert (CYCLES.sampling_end, CYCLES.end) == (8, 13)
    found = [CYCLES.sampling_step(step) for step in range(20)]
    assert found[2:8] == [PeriodStep(cycle, t, 3) for cycle in range(2) for t in range(3)]
    assert found[:2] + found[8:] == [None] * 14
    assert [step.last for step in found if step is not None] == [False, False, True] * 2
    assert [CYCLES.period_step(step) for step in range(8)] == [None] * 8
    assert [(period.start, period.length, period.share) for period in CYCLES.periods] == [
        (8, 2, Fraction(1, 2)),
        (10, 3, Fraction(1)),
    ]


def test_sampling_scales_go_from_one_to_a_last_part() -> None:
    left = [1.0]
    for t in range(3):
        position = CYCLES.sampling_step(2 + t)
        assert position is not None
        left.append(left[-1] * position.factor)
    assert left == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_with_cycles_units_are_scored_by_gradients_once() -> None:
    assert CYCLES.scoring_steps() == [2]
    assert [step for step in range(20) if CYCLES.scoring_window(step, 2)] == [1, 2]
    assert [step for step in range(20) if CYCLES.scoring_window(step, 8)] == [0, 1, 2]
    assert CYCLES.after_cycles(1).scoring_steps() == [2]


def test_periods_begin_where_the_cycles_ended() -> None:
    ended = CYCLES.after_cycles(1)
    assert [ended.phase(step) for step in range(20)] == (
        ["warmup"] * 2 + ["sampling"] * 3 + ["pruning"] * 5 + ["recovery"] * 10
    )
    assert [period.start for period in ended.periods] == [5, 7]
    assert [step.share for step in ended.periods] == [step.share for step in CYCLES.periods]


def test_without_cric_or_with_probing_there_is_no_sampling() -> None:
    for schedule in (resolved(1000), sampling(1000, cric_mode="probe")):
        assert (schedule.cycle_steps, schedule.cycles) == (0, 0)
        assert schedule == Schedule(20, 80, 3, 1000)
        assert "sampling" not in {schedule.phase(step) for step in range(1000)}
        assert schedule.sampling_step(50) is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"warmup_steps": 0},
        {"warmup_steps": 0.3, "pruning_steps": 0.3},
        {"cric_max_cycles": 1},
        {"cric_max_cycles": 3},
        {"cric_sampling_steps": 2},
    ],
    ids=str,
)
def test_default_cycles_fit_every_run_that_has_room(config: dict[str, float]) -> None:
    least = 2 * (int(config.get("cric_max_cycles", 2)))  # two samples in each of two cycles
    fitted, refused = [], []
    for total in [*range(1, 300), 500, 999, 1000, 5000, 10**6]:
        without = resolved(total, **{k: v for k, v in config.items() if "cric" not in k})
        if room(without) < least:
            with pytest.raises(HessoError, match="cric"):
                sampling(total, **config)
            refused.append(total)
            continue
        schedule = sampling(total, **config)
        fitted.append(total)
        assert schedule.cycle_steps * schedule.cycles <= room(schedule), total
        assert schedule.cycle_steps >= 2, total
        assert schedule.cycles >= int(config.get("cric_max_cycles", 2)), total
        assert schedule.end <= total
        assert (schedule.warmup_steps, schedule.pruning_steps) == (without.warmup_steps, without.pruning_steps)
    assert refused
    assert len(fitted) > 280


def test_longer_runs_sample_no_less_by_default() -> None:
    samples = [sampling(total).cycle_steps * sampling(total).cycles for total in range(20, 600)]
    assert max(samples) <= 32
    assert samples[0] >= 4
    assert samples == sorted(samples)
    assert all(count <= max(9, 0.05 * total) for total, count in zip(range(20, 600), samples, strict=True))


def test_cycles_that_were_asked_for_are_taken() -> None:
    schedule = sampling(1000, cric_sampling_steps=20, cric_max_cycles=7)
    assert (schedule.cycle_steps, schedule.cycles) == (20, 7)
    exact = sampling(100, warmup_steps=10, pruning_steps=30, cric_sampling_steps=10, cric_max_cycles=3)
    assert exact.sampling_end == 40  # 30 of 60 that are left
    assert sampling(1000, cric_sampling_steps=9).cycle_steps == 9
    assert sampling(1000, cric_max_cycles=5).cycles == 5


def test_sampling_that_does_not_fit_is_refused_with_the_numbers() -> None:
    counts = {"warmup_steps": 10, "pruning_steps": 30}
    message = r"`cric_sampling_steps` \(10\) times `cric_max_cycles` \(4\) = 40 .* 30 steps .* 100"
    with pytest.raises(HessoError, match=message):
        sampling(100, **counts, cric_sampling_steps=10, cric_max_cycles=4)
    with pytest.raises(HessoError, match=r"\(31\) times .* = 31 .* 30 steps"):
        sampling(100, **counts, cric_sampling_steps=31, cric_max_cycles=1)
    with pytest.raises(HessoError, match=r"`cric_sampling_steps` \(16\) .* 30 steps"):
        sampling(100, **counts, cric_sampling_steps=16)
    with pytest.raises(HessoError, match=r"`cric_max_cycles` \(16\) = 32 .* 30 steps"):
        sampling(100, **counts, cric_max_cycles=16)


def test_a_run_too_short_for_two_cycles_is_refused() -> None:
    with pytest.raises(HessoError, match=r"= 4 .* 3 steps .* run's 10"):
        sampling(10, warmup_steps=1, pruning_steps=2)
    assert sampling(11, warmup_steps=1, pruning_steps=2).sampling_end == 1 + 4
    with pytest.raises(HessoError, match="0 steps"):
        sampling(30, warmup_steps=10, pruning_steps=20)


# -- pauses -----------------------------------------------------------------------------------------------------------


def spans(schedule: Schedule) -> list[tuple[int, int, Fraction]]:
    return [(period.start, period.length, period.share) for period in schedule.periods]


def test_a_period_that_is_given_up_starts_anew_as_two_of_its_length() -> None:
    schedule = Schedule(2, 9, 3, 60)
    paused = schedule.after_pause(6)  # the second step of the second period
    assert paused is not None
    assert spans(paused) == [
        (2, 3, Fraction(1, 3)),
        (5, 2, Fraction(1, 3)),  # given up: marks what was marked before
        (7, 3, Fraction(1, 2)),
        (10, 3, Fraction(2, 3)),
        (13, 3, Fraction(1)),
    ]
    assert spans(schedule) == [(2, 3, Fraction(1, 3)), (5, 3, Fraction(2, 3)), (8, 3, Fraction(1))]
    assert paused.end == 16
    assert [paused.phase(step) for step in (1, 2, 15, 16)] == ["warmup", "pruning", "pruning", "recovery"]
    again = paused.after_pause(8)  # the first half of it
    assert again is not None
    assert spans(again)[2:5] == [
        (7, 2, Fraction(1, 3)),
        (9, 3, Fraction(5, 12)),
        (12, 3, Fraction(1, 2)),
    ]


def test_the_first_period_may_be_given_up() -> None:
    paused = Schedule(0, 4, 1, 60).after_pause(0)
    assert paused is not None
    assert spans(paused) == [(0, 1, Fraction(0)), (1, 4, Fraction(1, 2)), (5, 4, Fraction(1))]


@pytest.mark.parametrize("schedule", [Schedule(2, 11, 3, 200), Schedule(2, 5, 2, 90, 3, 2), Schedule(0, 1, 1, 50)])
def test_pauses_keep_shares_order_and_lengths(schedule: Schedule) -> None:
    planned = schedule
    lengths = {period.length for period in schedule.periods}
    for count in range(1, 5):
        begin = next(p for p in schedule.periods if p.start > (schedule.pauses[-1] if schedule.pauses else -1))
        paused = schedule.after_pause(begin.start + begin.length // 2)
        if paused is None:
            break
        schedule = paused
        assert len(schedule.pauses) == count
        periods = schedule.periods
        assert len(periods) == len(planned.periods) + 2 * count
        assert periods[0].start == schedule.sampling_end
        assert all(one.end == two.start for one, two in pairwise(periods))
        assert [p.share for p in periods] == sorted(p.share for p in periods)
        assert periods[-1].share == 1
        assert {p.share for p in planned.periods} <= {p.share for p in periods}
        given_up = [p for p in periods if p.end - 1 in schedule.pauses]
        assert len(given_up) == count
        assert {p.length for p in periods if p not in given_up} <= lengths
        assert [schedule.period_step(step) is None for step in range(schedule.end)] == (
            [True] * schedule.sampling_end + [False] * (schedule.end - schedule.sampling_end)
        )
    assert schedule.pauses


def test_pauses_end_where_they_would_take_half_of_what_remains() -> None:
    assert Schedule(0, 4, 1, 14).after_pause(0) is not None  # ends at 9 = 4 + 10 / 2
    assert Schedule(0, 4, 1, 14).after_pause(1) is None  # would end at 10
    assert Schedule(0, 4, 1, 13).after_pause(0) is None
    paused = Schedule(0, 4, 1, 14).after_pause(0)
    assert paused is not None
    assert paused.after_pause(1) is None  # counted from the plan, not anew


@pytest.mark.parametrize("schedule", [CYCLES, Schedule(2, 9, 3, 60, pauses=(6, 8)), CYCLES.after_cycles(1)])
def test_json_round_trip_with_cycles_and_pauses(schedule: Schedule) -> None:
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.periods == schedule.periods


# -- any schedule ------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    periods, cycle_steps = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    counts = {"warmup_steps": draw(st.integers(0, 9)), "pruning_steps": periods + draw(st.integers(0, 20))}
    cycles = draw(st.integers(1, 4)) if cycle_steps else 0
    least = sum(counts.values()) + cycle_steps * cycles
    total = least + draw(st.integers(0, 40))
    schedule = Schedule(**counts, pruning_periods=periods, total_steps=total, cycle_steps=cycle_steps, cycles=cycles)
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(schedule.sampling_end, schedule.end - 1))
        schedule = schedule.after_pause(step) or schedule
    return schedule


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_every_step_of_any_schedule_lies_in_one_phase_and_phases_come_in_order(schedule: Schedule) -> None:
    phases = [schedule.phase(step) for step in range(schedule.total_steps)]
    assert phases == sorted(phases, key=PHASES.index)
    for step, phase in enumerate(phases):
        inside = [period for period in schedule.periods if period.start <= step < period.end]
        assert len(inside) == (phase == "pruning")
        assert (schedule.sampling_step(step) is not None) == (phase == "sampling")
        assert (schedule.period_step(step) is not None) == (phase == "pruning")
    assert schedule.end <= schedule.total_steps


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_scales_of_any_schedule_fall_to_exactly_zero_in_every_period_and_shares_rise_to_one(schedule: Schedule) -> None:
    for index, period in enumerate(schedule.periods):
        steps = [schedule.period_step(step) for step in range(period.start, period.end)]
        assert [(step.index, step.t) for step in steps if step] == [(index, t) for t in range(period.length)]
        factors = [step.factor for step in steps if step]
        scales = list(accumulate(factors, mul, initial=1.0))
        assert all(after < before for before, after in pairwise(scales))
        assert scales[-1] == 0.0
        assert [step.last for step in steps if step] == [False] * (period.length - 1) + [True]
    shares = [period.share for period in schedule.periods]
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("share", [0.08, 0.1, 0.3])
def test_a_run_that_is_too_short_for_the_periods_names_the_steps_that_are_enough(
    share: float, caplog: pytest.LogCaptureFixture
) -> None:
    with propagated(caplog):
        resolved(4, pruning_steps=share)
        named = re.search(r"train for (\d+) steps or more, or set `pruning_steps` to 3 or more", caplog.text)
        assert named is not None
        enough = int(named.group(1))
        for steps, few in ((enough - 1, True), (enough, False)):
            caplog.clear()
            schedule = resolved(steps, pruning_steps=share)
            assert (schedule.pruning_periods < 3) == few
            assert ("the run is short" in caplog.text) == few


@pytest.mark.parametrize(("steps", "said"), [(1, "1 step, so"), (1, "and no steps rec"), (2, "and 1 step recovers;")])
def test_steps_are_counted_in_words_that_fit_their_number(
    steps: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with propagated(caplog):
        resolved(steps, pruning_steps=0.08)
    assert said in caplog.text


def test_a_run_that_ends_with_pruning_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with propagated(caplog):
        resolved(10, warmup_steps=2, pruning_steps=8)
        assert "pruning ends with the run's last step (10): nothing is trained without the pruned units" in caplog.text
        caplog.clear()
        resolved(11, warmup_steps=2, pruning_steps=8)
        assert caplog.text == ""
