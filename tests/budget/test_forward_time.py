"""A budget of latency: sizes are timed as whole models until they take what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hesso_hf import HessoConfig, wrap_optimizer
from hesso_hf.budget import forward_time
from hesso_hf.budget.forward_time import ForwardTimes
from hesso_hf.budget.latency import LatencyTable
from hesso_hf.errors import BudgetError, HessoError
from hesso_hf.pruning.calibration import LossCurves
from hesso_hf.pruning.plan import PruningPlan
from tests.support import ROOT, forks
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama

SIZES = ["hidden_size", "intermediate_size", "num_attention_heads"]
Share = Callable[[ForwardTimes, dict[str, int]], float | None]


def settled(model: PreTrainedModel, config: HessoConfig) -> PruningPlan:
    """Make a plan as a loop of one's own does, without examples."""
    plan = PruningPlan.prepare(model, config)
    plan.settle(lambda: LossCurves({}, {}))
    return plan


def elements(config: Any, sizes: dict[str, int]) -> float:
    """Return what matrices of these sizes hold, as a share of those of the full model."""
    hidden, inner, heads = (sizes.get(name, getattr(config, name)) for name in SIZES)
    groups = config.num_attention_heads // config.num_key_value_heads
    attention = 2 * hidden * config.head_dim * heads * (1 + 1 / groups)
    found = config.num_hidden_layers * (attention + 3 * hidden * inner) + config.vocab_size * hidden
    return found / elements(config, {}) if sizes else found


def slowed(beside: float) -> Share:
    """Make a clock by which a pass takes its elements' time, and beside it a share of the full model's that stays."""
    return lambda times, sizes: (elements(times.config, sizes) + beside) / (1 + beside)


@pytest.fixture
def by_elements(monkeypatch: pytest.MonkeyPatch) -> Callable[[Share], list[dict[str, int]]]:
    """Replace both clocks; what is timed is kept in the list that comes back."""

    def replaced(share: Share) -> list[dict[str, int]]:
        monkeypatch.setattr(ForwardTimes, "share", lambda self, sizes: timed.append(sizes) or share(self, sizes))
        return timed

    timed: list[dict[str, int]] = []
    monkeypatch.setattr(LatencyTable, "_time", lambda self, rows, columns: 1e-6 * rows * columns)
    return replaced


@pytest.mark.parametrize("beside", [0.3, 0.0, -0.2])
def test_sizes_take_the_share_of_the_time_that_is_asked_for(beside: float, by_elements: Any) -> None:
    """Some time stays whatever goes, or more goes than the products alone would have it."""
    model, timed = tiny_llama(), by_elements(slowed(beside))
    target = settled(model, HessoConfig(0.4, budget_metric="latency", round_to=1)).target
    took = slowed(beside)(ForwardTimes(type(model), model.config, model.device, model.dtype, 1), target.sizes)
    assert took == pytest.approx(0.6, abs=0.02)
    assert target.ratio == pytest.approx(1 - took, abs=1e-6), "the report has what was timed"
    assert len(timed) <= forward_time.MOST_LOOKS


def test_given_sizes_are_timed_once_and_reported_as_timed(by_elements: Any) -> None:
    model, timed = tiny_llama(), by_elements(slowed(0.5))
    config = HessoConfig(target_sizes={"intermediate_size": 28}, budget_metric="latency")
    target = settled(model, config).target
    assert [sizes["intermediate_size"] for sizes in timed] == [28]
    took = slowed(0.5)(ForwardTimes(type(model), model.config, model.device, model.dtype, 1), target.sizes)
    assert target.ratio == pytest.approx(1 - took, abs=1e-6)


@pytest.mark.parametrize("share", [1.01, 0.97])
def test_where_nothing_gets_faster_the_nearest_that_was_timed_is_named(share: float, by_elements: Any) -> None:
    by_elements(lambda times, sizes: share)
    with pytest.raises(BudgetError, match=r"`pruning_ratio` \(0.4\) of latency can't be met within 5%"):
        settled(tiny_llama(), HessoConfig(0.4, budget_metric="latency", round_to=1))


def test_of_sizes_timed_alike_one_is_taken_where_no_others_are_near(by_elements: Any, monkeypatch: Any) -> None:
    """The same times twice, then a budget that can't be met by them."""
    timed = by_elements(lambda times, sizes: 0.63)
    plan = PruningPlan.prepare(tiny_llama(), HessoConfig(0.4, budget_metric="latency", round_to=1))
    first, found = plan.target, []

    def solve() -> list[Any]:
        found.append(replace(first, sizes={"hidden_size": 50 + len(found)}))
        if len(found) > 2:
            raise BudgetError("no sizes")
        return [found[-1]]

    times = ForwardTimes(LlamaForCausalLM, plan.model.config, torch.device("cpu"), torch.float32, 8)
    (taken,) = forward_time.solve_by_time(solve, plan.price, times, 0.4)
    assert (len(timed), taken.ratio) == (2, pytest.approx(0.37))


def test_given_sizes_that_are_slower_are_reported_so(by_elements: Any) -> None:
    by_elements(lambda times, sizes: 1.01)
    config = HessoConfig(target_sizes={"intermediate_size": 28}, budget_metric="latency")
    assert settled(tiny_llama(), config).target.ratio == pytest.approx(-0.01)


def test_sizes_that_were_timed_a_little_off_are_taken_with_a_warning(
    by_elements: Any, caplog: pytest.LogCaptureFixture
) -> None:
    timed = by_elements(lambda times, sizes: 0.6 + (0.03 if len(timed) == 2 else 0.04))
    with propagated(caplog):
        target = settled(tiny_llama(), HessoConfig(0.4, budget_metric="latency", round_to=1)).target
    assert target.sizes == timed[1]
    assert target.ratio == pytest.approx(0.37)
    assert "of latency can't be met within 1%: of the sizes that were timed the nearest save 37.0%" in caplog.text


def test_nothing_is_timed_twice_or_before_the_sizes_are_settled(by_elements: Any) -> None:
    timed = by_elements(slowed(0.3))
    plan = PruningPlan.prepare(tiny_llama(), HessoConfig(0.4, budget_metric="latency", round_to=1))
    assert timed == []
    for _ in range(2):
        plan.settle(lambda: LossCurves({}, {}))
    assert len(timed) <= forward_time.MOST_LOOKS


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    config = HessoConfig(0.3, budget_metric="latency", latency_tokens=129)
    with pytest.raises(HessoError, match=r"`latency_tokens` \(129\) is longer than the context of the model \(128 tok"):
        PruningPlan.prepare(tiny_llama(), config)


def test_the_model_s_own_config_and_the_default_dtype_stay_as_they_were() -> None:
    model = tiny_llama()
    before = model.config.to_dict()
    ForwardTimes(type(model), model.config, model.device, torch.bfloat16, 8).share({"intermediate_size": 28})
    assert model.config.to_dict() == before
    assert torch.get_default_dtype() == torch.float32


def test_a_ratio_that_what_stays_leaves_no_room_for_is_refused(by_elements: Any) -> None:
    by_elements(slowed(4.0))
    with pytest.raises(BudgetError, match=r"`pruning_ratio` \(0.4\) of latency can't be met within 5%"):
        settled(tiny_llama(), HessoConfig(0.4, budget_metric="latency", round_to=1))


def test_sizes_on_the_way_are_priced_by_the_same_times(by_elements: Any) -> None:
    by_elements(slowed(0.3))
    config = HessoConfig(0.4, budget_metric="latency", export_at=[0.2], round_to=1)
    plan = settled(tiny_llama(), config)
    (rung,) = plan.rungs
    assert rung.ratio == pytest.approx(0.2, abs=0.02)
    assert rung.cost_before == plan.target.cost_before


def test_layers_of_different_widths_count_their_products_alone(by_elements: Any) -> None:
    timed = by_elements(slowed(0.3))
    settled(tiny_llama(), HessoConfig(0.3, budget_metric="latency", layer_widths="per_layer"))
    assert timed == []


def encoder_decoder() -> PreTrainedModel:
    config = T5Config(
        vocab_size=67, d_model=60, d_kv=12, d_ff=44, num_layers=2, num_heads=5, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [tiny_llama, encoder_decoder])
def test_models_are_built_and_timed_in_turns(make: Callable[[], PreTrainedModel], monkeypatch: Any) -> None:
    """The smaller one takes a third of the time by this clock; the first round, a warm-up, doesn't count."""
    model = make()
    full, passes = model.num_parameters(), []

    def on_host(timed: PreTrainedModel, ids: torch.Tensor) -> float:
        forward_time._forward(timed, ids)
        passes.append(timed.num_parameters() == full)
        return 100.0 if len(passes) <= 2 else 3.0 if passes[-1] else 1.0

    monkeypatch.setattr(forward_time, "_on_host", on_host)
    times = ForwardTimes(type(model), model.config, model.device, torch.bfloat16, 8)
    inner = "intermediate_size" if make is tiny_llama else "d_ff"
    assert times.share({inner: 20}) == pytest.approx(1 / 3)
    assert passes == [True, False] * 7


def test_what_a_run_draws_does_not_depend_on_what_was_timed() -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    ForwardTimes(type(model), model.config, model.device, torch.float32, 8).share({"intermediate_size": 28})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loop_of_ones_own_goes_on_with_the_same_sizes_timed_anew(by_elements: Any) -> None:
    states = []
    for beside in (0.3, 0.31):
        by_elements(slowed(beside))
        model = tiny_llama()
        config = HessoConfig(target_sizes={"intermediate_size": 28}, budget_metric="latency")
        optimizer = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config, 10)
        states.append(optimizer.state_dict())
    optimizer.load_state_dict(states[0])
    assert optimizer.process.target.cost_after != states[0]["hesso"]["target"]["cost_after"]


def test_where_a_pass_fails_the_products_count_and_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward_time, "_forward", forward)
    monkeypatch.setattr(LatencyTable, "_time", lambda self, rows, columns: 1e-6 * rows * columns)
    with propagated(caplog):
        target = settled(tiny_llama(), HessoConfig(0.3, budget_metric="latency", round_to=1)).target
    assert target.ratio == pytest.approx(0.3, abs=0.01)
    message = "can't be timed (OutOfMemoryError: CUDA out of memory), so the matrix products alone count"
    assert message in caplog.text


_TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from hesso_hf import HessoConfig, wrap_optimizer
from hesso_hf.budget.forward_time import ForwardTimes
from hesso_hf.budget.latency import LatencyTable
from tests.budget.test_forward_time import slowed
from tests.support.tiny import tiny_llama
import torch
dist.init_process_group("gloo")
rank = dist.get_rank()
LatencyTable._time = lambda self, rows, columns: 1e-6 * rows * columns * (1 + rank * columns / 60)
timed = []
ForwardTimes.share = lambda self, sizes: timed.append(sizes) or slowed(0.3)(self, sizes)
for ratio in (0.4, 0.999):
    try:
        model = tiny_llama()
        config = HessoConfig(ratio, budget_metric="latency", round_to=1)
        target = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config, 20).process.target
        print(rank, bool(timed), sorted(target.sizes.items()), round(target.ratio, 6), flush=True)
    except ValueError as error:
        print(rank, type(error).__name__, flush=True)
dist.destroy_process_group()
"""


def test_of_several_processes_the_main_one_times_and_all_take_what_it_finds() -> None:
    done = forks.run(_TWO, str(ROOT), processes=2)
    assert done.returncode == 0, done.stderr
    told = {rank: [line[2:] for line in done.stdout.splitlines() if line.startswith(f"{rank} ")] for rank in (0, 1)}
    assert told[0][0].startswith("True [")
    assert told[1][0] == told[0][0].replace("True", "False", 1)
    assert (told[0][1], told[1][1]) == ("BudgetError", "HessoError")
