"""The early warning of a collapse: when it comes, what it names, and the return to a period's start."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.pruning.collapse import CollapseWatch, layers_at_fault
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.schedule import Schedule
from tests.support.checks import assert_same, check_equal, propagated
from tests.support.tiny import MLP, UNITS, backward, process_for, tiny_gemma2, tiny_llama, token_batches
from tests.support.training import ALONE, hesso_config, logged, trainer

KEPT = {"attention_heads": 1, "mlp_channels": 33, "embedding_channels": 52}  # 2, 11 and 8 of 3, 44 and 60 go
SCHEDULE = Schedule(warmup_steps=2, pruning_steps=6, pruning_periods=2, total_steps=30)
LOW, HIGH = 1.0, 40.0  # three steps with one HIGH among them are a collapse


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Let pytest see this package's log."""
    with propagated(caplog):
        yield caplog


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    """Each warning of a collapse once."""
    return list(dict.fromkeys(r.getMessage() for r in log.records if "collapse_threshold" in r.getMessage()))


# -- the watch ---------------------------------------------------------------------------------------------------------


def test_level_is_the_mean_of_the_last_eight_and_present_of_the_last_three() -> None:
    watch = CollapseWatch(4.0)
    assert math.isnan(watch.level)
    assert math.isnan(watch.present)
    for loss in [100.0, 50.0, *range(8)]:
        watch.note_level(loss)
    assert watch.level == 3.5
    for loss in (9.0, 1.0, 2.0, 6.0):
        watch.note(loss)
    assert watch.present == 3.0


def test_a_rise_beyond_the_threshold_is_new_once_a_period() -> None:
    watch = CollapseWatch(4.0)
    watch.note_level(2.0)
    watch.begin_period()
    watch.note(6.0)
    assert not watch.is_new_collapse()  # a rise of exactly the threshold
    watch.note(6.5)
    assert watch.is_new_collapse()
    watch._warned = True
    watch.note(60.0)
    assert not watch.is_new_collapse()
    watch.begin_period()
    assert not watch.is_new_collapse()  # the losses of the period before are forgotten
    watch.note(60.0)
    assert watch.is_new_collapse()


def test_losses_that_are_not_finite_and_missing_ones_are_no_collapse() -> None:
    watch = CollapseWatch(4.0)
    watch.note(100.0)
    assert not watch.is_new_collapse()  # no level
    for bad in (math.nan, math.inf, -math.inf):
        watch.note_level(bad)
        watch.note(bad)
    assert math.isnan(watch.level)
    assert watch.present == 100.0
    endless = CollapseWatch(math.inf)
    endless.note_level(0.0)
    endless.note(1e30)
    assert not endless.is_new_collapse()


def test_the_state_of_a_watch_goes_around() -> None:
    watch = CollapseWatch(4.0)
    for loss in range(20):
        watch.note_level(loss)
        watch.note(3.0 * loss)
    watch._warned = True
    other = CollapseWatch(4.0)
    other.load_state_dict(watch.state_dict())
    assert other.state_dict() == watch.state_dict()
    for item in (watch, other):
        item.note_level(7.0)
        item.note(9.0)
    assert (other.level, other.present) == (watch.level, watch.present)
    other.begin_period()
    assert watch.state_dict()["warned"]  # no view of the other


# -- who is at fault ---------------------------------------------------------------------------------------------------


def test_fault_is_the_gain_of_redundant_units_by_layer() -> None:
    slopes = {"heads": torch.tensor([[-3.0, -50.0], [5.0, -2.0]]), "mlp": torch.tensor([[-1.0, -4.0, 9.0], [2, 2, 2]])}
    redundant = {"heads": torch.tensor([[True, False], [False, True]]), "mlp": torch.tensor([[True, True, False]] * 2)}
    layers = {"heads": ("one", "two"), "mlp": ("one", "two")}
    assert layers_at_fault(slopes, redundant, layers) == "mlp of one (50%), heads of one (30%), heads of two (20%)"


def test_fault_names_three_at_most_and_the_whole_model() -> None:
    slopes, redundant = {"mlp": -torch.tensor([[1.0], [2], [3], [4]])}, {"mlp": torch.ones(4, 1, dtype=torch.bool)}
    found = layers_at_fault(slopes, redundant, {"mlp": ("a", "b", "c", "d")})
    assert found == "mlp of d (40%), mlp of c (30%), mlp of b (20%)"
    whole = layers_at_fault({"e": torch.tensor([[-1.0]])}, {"e": torch.tensor([[True]])}, {"e": ("",)})
    assert whole == "e of the whole model (100%)"
    nobody = layers_at_fault({"e": torch.tensor([[1.0]])}, {"e": torch.tensor([[True]])}, {"e": ("",)})
    assert nobody == "no single structure stands out"


# -- on tiny models, with losses that are told -------------------------------------------------------------------------


def hesso(
    model: PreTrainedModel, schedule: Schedule = SCHEDULE, kept: dict[str, int] = KEPT, **config: Any
) -> HessoOptimizer:
    """AdamW under HESSO."""
    base = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    return HessoOptimizer(base, process_for(model, kept, schedule, saliency_batches=3, **config))


def one_step(model: PreTrainedModel, optimizer: HessoOptimizer, loss: float) -> None:
    """A real gradient, made of global random numbers, and a loss that is told."""
    torch.manual_seed(optimizer.process.step)
    backward(model, torch.randint(3, 60, (2, 9)))
    optimizer.report_loss(loss)
    optimizer.step()


def steps(model: PreTrainedModel, optimizer: HessoOptimizer, first: int, last: int, high: tuple[int, ...] = ()) -> None:
    for step in range(first, last):
        one_step(model, optimizer, HIGH if step in high else LOW)


def state_of(model: PreTrainedModel, optimizer: HessoOptimizer) -> dict[str, Any]:
    """Copies of weights and optimizer state."""
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "state": [copy.deepcopy(optimizer.state.get(p)) for p in model.parameters()],
    }


def num_redundant(optimizer: HessoOptimizer) -> dict[str, list[int]]:
    """Redundant units by layer."""
    return {name: units.sum(1).tolist() for name, units in optimizer.process.redundant.items()}


def num_pruned(optimizer: HessoOptimizer) -> dict[str, list[int]]:
    """Pruned units by layer."""
    return {name: (scales == 0).sum(1).tolist() for name, scales in optimizer.process.scales.items()}


@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_a_pause_returns_to_the_start_of_the_period_bit_for_bit(
    make: Any, place: str, log: pytest.LogCaptureFixture
) -> None:
    model = make()
    optimizer = hesso(model, on_collapse="pause", cric_snapshot=place)
    steps(model, optimizer, 0, 2)
    before = state_of(model, optimizer)
    torch.manual_seed(2)
    backward(model, torch.randint(3, 60, (2, 9)))
    drawn = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].tolist())  # type: ignore[index]
    optimizer.report_loss(LOW)
    optimizer.step()
    marked = num_redundant(optimizer)
    assert marked["mlp_channels"] == [6, 6]  # round(11 / 2), to even
    random.random(), np.random.rand()
    one_step(model, optimizer, HIGH)
    assert_same(state_of(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.random.get_state(legacy=True)[1].tolist() == drawn[2]  # type: ignore[index]
    process = optimizer.process
    assert not any(any(layers) for layers in (*num_redundant(optimizer).values(), *num_pruned(optimizer).values()))
    assert all(bool((scales == 1).all()) for scales in process.scales.values())
    assert process.schedule.pauses == (3,)
    assert process.step == 4
    assert process.schedule.end == SCHEDULE.end + 5  # two steps for nothing, and three more for the second half
    assert len(warnings_of(log)) == 1
    assert "step 3: " in warnings_of(log)[0]
    assert "starts anew and marks fewer" in warnings_of(log)[0]


def test_the_period_starts_anew_as_two_that_mark_half_each(log: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    optimizer = hesso(model, on_collapse="pause")
    steps(model, optimizer, 0, 3)
    first = {name: units.clone() for name, units in optimizer.process.redundant.items()}
    steps(model, optimizer, 3, 5, high=(3,))
    assert num_redundant(optimizer)["mlp_channels"] == [3, 3]  # round(11 / 4)
    assert num_redundant(optimizer)["embedding_channels"] == [2]
    for name, units in optimizer.process.redundant.items():
        assert not bool((units & ~first[name]).any()), name  # the lowest of the same order
    steps(model, optimizer, 5, 7)
    assert num_pruned(optimizer)["mlp_channels"] == [3, 3]
    steps(model, optimizer, 7, 10)
    assert num_pruned(optimizer)["mlp_channels"] == [6, 6]
    assert not optimizer.process.finished
    steps(model, optimizer, 10, 13)
    assert optimizer.process.finished
    assert num_pruned(optimizer) == {"attention_heads": [2, 2], "mlp_channels": [11, 11], "embedding_channels": [8]}
    assert len(warnings_of(log)) == 1


def test_a_pause_in_a_later_period_keeps_what_was_pruned_at_zero() -> None:
    model = tiny_llama()
    optimizer = hesso(model, on_collapse="pause")
    steps(model, optimizer, 0, 5)
    pruned = {name: scales == 0 for name, scales in optimizer.process.scales.items()}
    before = state_of(model, optimizer)
    steps(model, optimizer, 5, 8, high=(7,))
    assert optimizer.process.schedule.pauses == (7,)
    assert_same(state_of(model, optimizer), before)
    steps(model, optimizer, 8, 10)
    assert num_redundant(optimizer)["mlp_channels"] == [2, 2]  # round(11 * 3 / 4) - 6
    for name, scales in optimizer.process.scales.items():
        assert bool((scales[pruned[name]] == 0).all()), name
    steps(model, optimizer, 10, 14)
    assert optimizer.process.finished
    assert num_pruned(optimizer)["mlp_channels"] == [11, 11]


def test_pauses_come_again_until_no_steps_are_left(log: pytest.LogCaptureFixture) -> None:
    """With 22 steps after the plan's end, 11 may be spent: two pauses of five, not three."""
    model = tiny_llama()
    optimizer = hesso(model, on_collapse="pause")
    steps(model, optimizer, 0, 2)
    for step in range(2, 30):
        one_step(model, optimizer, HIGH)
        assert step < 29 or optimizer.process.finished
    pauses = optimizer.process.schedule.pauses
    assert len(pauses) == 2
    assert optimizer.process.schedule.end <= 8 + 11
    told = warnings_of(log)
    assert sum("starts anew" in text for text in told) == 2
    refused = [text for text in told if "fewer can't be marked any more" in text]
    assert refused
    assert len(told) == len(pauses) + len(refused)
    assert num_pruned(optimizer) == {"attention_heads": [2, 2], "mlp_channels": [11, 11], "embedding_channels": [8]}


def test_a_pause_without_steps_left_is_refused_and_changes_nothing(log: pytest.LogCaptureFixture) -> None:
    short = Schedule(warmup_steps=2, pruning_steps=6, pruning_periods=2, total_steps=17)  # 9 left, 4 may be spent
    models = [tiny_llama(), tiny_llama()]
    optimizers = [hesso(models[0], short, on_collapse="pause"), hesso(models[1], short)]
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 0, 5, high=(3,))
    assert optimizers[0].process.schedule == short
    assert_same(state_of(models[0], optimizers[0]), state_of(models[1], optimizers[1]))
    assert "fewer can't be marked any more" in warnings_of(log)[0]


def test_a_pause_with_a_single_unit_left_to_mark_is_refused(log: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    one = Schedule(warmup_steps=2, pruning_steps=4, pruning_periods=1, total_steps=40)
    optimizer = hesso(model, one, {"attention_heads": 2}, on_collapse="pause")
    steps(model, optimizer, 0, 7, high=(3,))
    assert optimizer.process.schedule == one
    assert "fewer can't be marked any more" in warnings_of(log)[0]
    assert num_pruned(optimizer) == {"attention_heads": [1, 1]}


def test_a_pause_that_would_mark_the_same_units_again_is_refused(log: pytest.LogCaptureFixture) -> None:
    """In the second of two periods that take one head, three quarters of a head are a head still."""
    model = tiny_llama()
    two = Schedule(warmup_steps=2, pruning_steps=8, pruning_periods=2, total_steps=60)
    optimizer = hesso(model, two, {"attention_heads": 2}, on_collapse="pause")
    steps(model, optimizer, 0, 7)
    assert num_redundant(optimizer) == {"attention_heads": [1, 1]}
    one_step(model, optimizer, HIGH)
    assert optimizer.process.schedule == two
    assert "fewer can't be marked any more" in warnings_of(log)[0]


def test_warn_warns_once_a_period_and_changes_nothing(log: pytest.LogCaptureFixture) -> None:
    models = [tiny_llama(), tiny_llama()]
    optimizers = [hesso(model) for model in models]
    steps(models[0], optimizers[0], 0, 9, high=tuple(range(2, 9)))
    told = warnings_of(log)
    assert [text.split(":")[0] for text in told] == ["step 3", "step 6"]  # a period's first step has nothing shrunk
    assert all("training goes on" in text and "`collapse_threshold` 3.0" in text for text in told)
    steps(models[1], optimizers[1], 0, 9)
    assert_same(state_of(models[0], optimizers[0]), state_of(models[1], optimizers[1]))
    assert len(warnings_of(log)) == 2
    assert "the loss is 40.000" in told[0]
    assert "above its level" in told[0]


def test_losses_outside_the_periods_are_no_collapse(log: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    optimizer = hesso(model)
    steps(model, optimizer, 0, 8)
    steps(model, optimizer, 8, 14, high=(11, 12, 13))  # three steps after pruning has ended are watched still
    assert not warnings_of(log)


def test_a_collapse_by_the_last_shrinking_is_seen_after_it(log: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    optimizer = hesso(model)
    steps(model, optimizer, 0, 12, high=(8, 9))
    assert [text.split(":")[0] for text in warnings_of(log)] == ["step 8"]


@pytest.mark.parametrize("saliency_batches", [1, 3])
def test_pause_without_a_collapse_equals_warn(saliency_batches: int, tmp_path: Path) -> None:
    runs = {}
    for reaction in ("warn", "pause"):
        config = hesso_config(on_collapse=reaction, collapse_threshold=1e9, saliency_batches=saliency_batches)
        runs[reaction] = trainer(tmp_path / reaction, config=config)
        runs[reaction].train()
    kept = [run.hesso_optimizer.process.kept_units() for run in runs.values()]
    assert kept[0] == kept[1]
    for ours, theirs in zip(runs["warn"].model.parameters(), runs["pause"].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def mlp_gain(model: PreTrainedModel, layer: int, units: list[int]) -> float:
    """By hand: how much the loss would fall, to first order, if these channels' weights grew by their own size."""
    mlp, gain = model.model.layers[layer].mlp, 0.0
    for j in units:
        for part in (mlp.gate_proj, mlp.up_proj):
            gain -= float((part.weight[j].double() * part.weight.grad[j].double()).sum())
            gain -= float(part.bias[j].double() * part.bias.grad[j].double())
        gain -= float((mlp.down_proj.weight[:, j].double() * mlp.down_proj.weight.grad[:, j].double()).sum())
    return gain


def test_the_named_layers_are_those_of_gradients_by_hand(log: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=4)
    base = SGD(model.parameters(), lr=0.0)
    process = process_for(model, {"mlp_channels": 11}, SCHEDULE)
    optimizer = HessoOptimizer(base, process)
    batches = token_batches(4)
    for batch in batches:
        backward(model, batch)
        gains = {
            layer: mlp_gain(model, layer, units.nonzero().flatten().tolist())
            for layer, units in enumerate(process.redundant["mlp_channels"])
        }
        optimizer.report_loss(HIGH if process.step == 3 else LOW)
        optimizer.step()
    positive = sorted(((gain, layer) for layer, gain in gains.items() if gain > 0), reverse=True)
    assert positive
    total = sum(gain for gain, _ in positive)
    expected = ", ".join(f"mlp_channels of model.layers.{layer} ({gain / total:.0%})" for gain, layer in positive[:3])
    assert f"At fault: {expected};" in warnings_of(log)[0]


# -- through the trainer -----------------------------------------------------------------------------------------------


def dominated() -> PreTrainedModel:
    """A model whose last layer's MLP says nearly everything."""
    model = tiny_llama(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(30)
        for layer in model.model.layers[:2]:
            layer.mlp.down_proj.weight.mul_(0.05)
    return model


def test_the_trainer_names_structure_and_layer_of_the_mlp_that_dominates(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    config = HessoConfig(
        target_sizes={"intermediate_size": 4}, structures=["mlp_channels"], warmup_steps=10, pruning_steps=5,
        pruning_periods=1, collapse_threshold=0.02, **ALONE,
    )  # fmt: skip
    # a model that knows the data has something to lose
    run = trainer(tmp_path, model=dominated(), config=config, data=easy(), max_steps=20, learning_rate=5e-3)
    run.train()
    told = warnings_of(log)
    assert len(told) == 1, logged(run, "loss")
    assert "At fault: mlp_channels of model.layers.2 (" in told[0]
    assert "training goes on" in told[0]


def easy() -> Dataset:
    """The same block over and over."""
    ids = [[5, 17, 23, 42, 8, 61, 30, 12, 55, 9]] * 64
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}], ids=["clipping", "none"])
def test_the_watched_loss_is_that_of_all_micro_batches(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes)
    run.train()
    level = list(run.hesso_optimizer.process.state.watch._level)
    assert level == pytest.approx(logged(run, "loss")[:3], rel=1e-5)  # warm-up and the first period's first step


def pausing(folder: Path, **changes: Any) -> HessoTrainer:
    """A run that collapses by its threshold, with dropout, and writes a checkpoint every step."""
    config = hesso_config(
        warmup_steps=4, pruning_steps=6, on_collapse="pause", collapse_threshold=0.03,
        saliency_batches=3,
    )  # fmt: skip
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 30, "learning_rate": 1e-3}
    return trainer(folder, model=tiny_llama(attention_dropout=0.2), config=config, **(options | changes))


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    """A run with at least one pause."""
    run = pausing(tmp_path_factory.mktemp("paused"))
    run.train()
    assert run.hesso_optimizer.process.schedule.pauses
    return run


def test_a_paused_run_prunes_the_budget_and_tells_of_its_pauses(paused: HessoTrainer, tmp_path: Path) -> None:
    process = paused.hesso_optimizer.process
    assert process.finished
    assert num_pruned(paused.hesso_optimizer)["mlp_channels"] == [MLP - 28] * 2
    assert num_pruned(paused.hesso_optimizer)["embedding_channels"] == [UNITS["embedding_channels"] - 48]
    paused.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["schedule"]["pauses"] == list(process.schedule.pauses)


@pytest.mark.parametrize("shift", [-1, 0, 1, 2, 3, 4, 7])
def test_a_run_resumed_around_a_pause_equals_the_undisturbed(paused: HessoTrainer, tmp_path: Path, shift: int) -> None:
    """From before the pause, right after it, and inside the two periods that follow."""
    step = paused.hesso_optimizer.process.schedule.pauses[0] + 1 + shift  # global steps are counted from 1
    shutil.copytree(Path(paused.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run = pausing(tmp_path)
    run.train(resume_from_checkpoint=True)
    check_equal(run, paused)
