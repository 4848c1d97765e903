"""CRIC once a period: the lowest units are on trial, gone and healed, and all are judged by what is minded then."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hesso_hf import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.pruning import reading, refit
from hesso_hf.pruning.corrections import Corrections
from hesso_hf.pruning.fisher import OutputFisher
from hesso_hf.pruning.healing import Healer, enough_tokens
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.plan import wrap_optimizer
from hesso_hf.pruning.reconstruction import RIDGE
from hesso_hf.pruning.token_rows import TokenRows
from hesso_hf.structures.lora import base_of
from tests.pruning.test_healing import CHANNELS, HEADS, STREAM, bound_to, leave_, none_of, step, tokens
from tests.support import ROOT
from tests.support.checks import propagated
from tests.support.lora import tiny_lora
from tests.support.tiny import MLP, tiny_gpt2, tiny_llama

GOING = {CHANNELS: 12, HEADS: 1, STREAM: 0}
SIZES = {"target_sizes": {"intermediate_size": MLP - 24}, "structures": [CHANNELS]}


@torch.no_grad()
def curved(seed: int) -> PreTrainedModel:
    """Return a model so far from linear that without some units it minds other errors."""
    model = tiny_llama(seed=seed)
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.dim() == 2:
            parameter.mul_(2)
    return model


def pruning(model: PreTrainedModel, rate: float = 0.0, **changes: Any) -> HessoOptimizer:
    """Take 24 channels in two periods of two steps each."""
    schedule = {"warmup_steps": 0, "pruning_steps": 4, "pruning_periods": 2}
    base = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer = wrap_optimizer(base, model, HessoConfig(**(SIZES | schedule | changes)), total_steps=6)
    optimizer.process.heal_with(Healer(model, tokens()))
    return optimizer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_on_trial_a_model_minds_what_it_would_with_the_lowest_cut_and_healed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "RIDGES", (RIDGE,))  # that units on trial are refitted with
    monkeypatch.setattr(refit, "SMALL_RIDGE", {torch.float64: RIDGE})
    model = make(seed=5)
    bound = bound_to(model)
    healer, pruned = Healer(model, tokens()), none_of(bound)
    pruned[CHANNELS][0, 3] = True
    leave_(bound, pruned, {})
    fisher = healer.fisher(bound)
    costs, ahead, found = healer.look_ahead(bound, pruned, GOING, fisher)
    marked = none_of(bound)
    for name, count in GOING.items():
        for layer, gone in enumerate(pruned[name]) if name in costs else ():
            marked[name][layer, costs[name][layer].argsort()[:count]] = True
            marked[name][layer] &= ~gone
    expected = healer.costs(bound, pruned, GOING, found)
    leave_(bound, marked, healer.corrections(bound, marked, pruned, fisher))
    cut = healer.fisher(bound)
    for name, rows in cut.rows.items():
        assert float((found.rows[name] - rows).abs().max()) <= 1e-4 * float(rows.abs().max()), name
        assert float((fisher.rows[name] - rows).abs().max()) > 1e-2 * float(rows.abs().max()), "as it was before"
    for name in (CHANNELS, HEADS):
        assert torch.equal(ahead[name], expected[name])
        assert not torch.equal(ahead[name], costs[name])


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_a_look_leaves_weights_gradients_and_random_state_alone(adapters: bool) -> None:
    model: Any = tiny_llama(seed=5)
    if adapters:
        model = tiny_lora(model, target_modules=["down_proj"])
    base = base_of(model)
    base(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stood = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    bound, healer = bound_to(model), Healer(base, tokens())
    costs, ahead, _ = healer.look_ahead(bound, none_of(bound), GOING, healer.fisher(bound))
    assert not torch.equal(costs[CHANNELS], ahead[CHANNELS])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, stood[name]) for name, p in model.named_parameters() if name in stood)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_by_default_a_period_marks_and_heals_by_what_the_look_says() -> None:
    model, other = curved(seed=6), curved(seed=6)
    optimizer, plain = pruning(model), pruning(other, cric=False)
    process = optimizer.process
    healer, none = Healer(model, tokens()), none_of(process.bound)
    going = {CHANNELS: 12, HEADS: 0, STREAM: 0}
    _, ahead, fisher = healer.look_ahead(process.bound, none, going, healer.fisher(process.bound))
    expected = none_of(process.bound)
    for layer, found in enumerate(ahead[CHANNELS]):
        expected[CHANNELS][layer, found.argsort()[:12]] = True
    corrections = healer.corrections(process.bound, expected, none, fisher)
    step(model, optimizer, 1)
    step(other, plain, 1)
    assert torch.equal(process.redundant[CHANNELS], expected[CHANNELS])
    first = plain.process.redundant[CHANNELS]
    assert not torch.equal(first, expected[CHANNELS])
    for name, (correction,) in process.state.healing.items():
        assert float((correction - corrections[name][0]).abs().max()) <= 1e-6
    step(model, optimizer, 3)
    found = process.cric_report()
    assert found is not None
    assert (found["mode"], found["cycles"]) == ("healed", 2)
    structure, kept = found["structures"][CHANNELS], process.scales[CHANNELS] > 0
    layers, tried = len(first), structure["violating"]
    assert tried[0] == 12 * layers
    assert structure["first"] == sum(tried)
    assert structure["num_corrected"] == sum(map(len, structure["corrected"].values())) > 0
    assert all(bool(kept[int(layer), unit]) for layer, units in structure["corrected"].items() for unit in units)
    assert not any(bool(kept[int(layer), unit]) for layer, u in structure["replaced_by"].items() for unit in u)
    assert structure["first"] - structure["num_corrected"] + sum(map(len, structure["replaced_by"].values())) == (
        24 * layers
    )
    assert plain.process.cric_report() is None


def test_what_was_corrected_survives_a_checkpoint() -> None:
    whole = curved(seed=6)
    optimizer = pruning(whole, rate=1e-2)
    step(whole, optimizer, 2)
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    step(whole, optimizer, 4)
    again = tiny_llama(seed=6)
    again.load_state_dict(weights)
    resumed = pruning(again, rate=1e-2)
    resumed.load_state_dict(state)
    assert resumed.process.cric_report()["cycles"] == 1  # type: ignore[index]
    step(again, resumed, 4)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    assert resumed.process.cric_report() == optimizer.process.cric_report()


def test_of_what_the_trial_says_nothing_the_model_as_it_is_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(seed=5)
    bound, healer = bound_to(model), Healer(model, tokens())
    fisher = healer.fisher(bound)

    def fails(*_: Any) -> OutputFisher:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(reading, "output_fisher", fails)
    with propagated(caplog), caplog.at_level(logging.WARNING):
        costs, ahead, found = healer.look_ahead(bound, none_of(bound), GOING, fisher)
    assert torch.equal(costs[CHANNELS], ahead[CHANNELS])
    assert found == fisher
    assert "CRIC: units are judged as the model is: a backward pass of 24 tokens" in caplog.text


def test_units_come_back_and_go_in_later_looks_are_counted_once() -> None:
    found, units = Corrections(), torch.eye(4, dtype=torch.bool)
    found.note({CHANNELS: units[[0]] | units[[1]]}, {CHANNELS: units[[1]] | units[[2]]})
    found.note({CHANNELS: units[[0]]}, {CHANNELS: units[[0]]})
    found.note({CHANNELS: units[[3]]}, {CHANNELS: units[[3]]})
    report = found.report()
    assert report is not None
    assert report["structures"][CHANNELS] == {
        "first": 3, "violating": [2, 0, 1], "num_corrected": 0, "corrected": {}, "replaced_by": {"0": [2]}, "paths": [],
    }  # fmt: skip


def test_where_memory_allows_no_look_the_next_ones_are_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = curved(seed=6)
    optimizer, gram, calls = pruning(model), TokenRows.gram, iter(range(99))

    def full_at_first(rows: TokenRows) -> torch.Tensor:
        if next(calls) == 1:  # after the first layer
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gram(rows)

    monkeypatch.setattr(TokenRows, "gram", full_at_first)
    with propagated(caplog), caplog.at_level(logging.WARNING):
        step(model, optimizer, 3)
    assert "no room to look at 1 of 2 matrices of LlamaForCausalLM: no unit is on trial there" in caplog.text
    found = optimizer.process.cric_report()
    assert found is not None
    assert [tried > 0 for tried in found["structures"][CHANNELS]["violating"]] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"healing": "off"}, "`cric_mode` ('healed') can't be had with `healing` ('off')"),
        ({"layer_widths": "per_layer"}, "can't be had with `layer_widths` ('per_layer')"),
        ({"saliency": "magnitude"}, "can't be had with `saliency` ('magnitude'), but with 'reconstruction' alone"),
        ({"cric_max_cycles": 3}, "`cric_max_cycles` (3) does nothing with `cric` (True) and `cric_mode` ('healed')"),
    ],
)
def test_what_it_cant_be_had_with_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HessoError) as error:
        HessoConfig(pruning_ratio=0.5, cric=True, cric_mode="healed", **changes)
    assert message in str(error.value)
    if "cric_max_cycles" not in changes:
        assert HessoConfig(pruning_ratio=0.5, **changes).cric_way is None, "auto leaves it out"


def test_how_it_is_asked_for() -> None:
    ways = {value: HessoConfig(pruning_ratio=0.5, cric=value).cric_way for value in ("auto", None, False, True)}
    assert ways == {"auto": "healed", None: "healed", False: None, True: "path"}
    assert HessoConfig(pruning_ratio=0.5, cric="True", cric_mode="probe").cric_way == "probe"
    for value in ("maybe", 1):
        with pytest.raises(HessoError, match="must be true, false or 'auto'"):
            HessoConfig(pruning_ratio=0.5, cric=value)
    with pytest.raises(HessoError, match=r"`cric_mode` \('probe'\) does nothing with `cric` \('auto'\); set that too"):
        HessoConfig(pruning_ratio=0.5, cric_mode="probe")


def short_of_memory(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have room for so many passes of all examples, and for any of half of them."""
    every, calls, gram = tokens()["attention_mask"].numel(), iter(range(99)), TokenRows.gram

    def full(rows: TokenRows) -> torch.Tensor:
        if len(rows.rows) == every and next(calls) == 2 * passes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gram(rows)

    monkeypatch.setattr(TokenRows, "gram", full)
    monkeypatch.setattr(reading, "FEWEST_TOKENS", 192)


@pytest.mark.parametrize("passes", [0, 1])
def test_without_room_units_are_judged_anew_on_half_of_the_examples(
    passes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for short in (False, True):
        model = curved(seed=6)
        optimizer = pruning(model, rate=1e-2)
        healer = optimizer.process.run.judging.healer
        assert healer is not None
        if short:
            short_of_memory(passes, monkeypatch)
        else:
            optimizer.process.heal_with(healer.fewer(healer.tokens // 2))
        with propagated(caplog), caplog.at_level(logging.WARNING):
            step(model, optimizer, 4)
        found.append((model.state_dict(), optimizer.process.cric_report()))
    (said,) = {message for message in caplog.messages if "no room" in message}
    assert "to read 384 tokens: from now on units are judged and healed on 192; set `healing_tokens`" in said
    assert found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


def test_without_room_to_heal_what_is_marked_stays_so_and_is_healed_on_half_of_the_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, same, as_it_was = (curved(seed=6) for _ in range(3))
    optimizer, whole, healer = pruning(model), pruning(same), Healer(as_it_was, tokens())
    step(same, whole, 1)
    short_of_memory(2, monkeypatch)
    step(model, optimizer, 1)
    run, bound = optimizer.process.run, bound_to(as_it_was)
    assert torch.equal(run.state.redundant[CHANNELS], whole.process.run.state.redundant[CHANNELS])
    marked = {**none_of(bound), **run.state.redundant}
    half = healer.fewer(healer.tokens // 2).corrections(bound, marked, none_of(bound))
    assert run.state.healing.keys() == half.keys()
    for name, (piece,) in half.items():
        assert torch.equal(run.state.healing[name][0], piece)


@pytest.mark.usefixtures("unshortened")
def test_so_many_tokens_as_the_widest_matrix_needs_up_to_a_limit() -> None:
    assert [enough_tokens(columns) for columns in (172, 384, 768, 1536, 8192)] == [2048, 2048, 4096, 8192, 8192]
    said = "16 tokens of the training data for every 3 columns of the widest matrix, from 2,048 to 8,192"
    assert said in " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())


def test_a_single_example_that_does_not_fit_is_not_halved_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(rows: TokenRows) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TokenRows, "gram", full)
    monkeypatch.setattr(reading, "FEWEST_TOKENS", 2)
    model = curved(seed=6)
    optimizer = pruning(model)
    batch = {name: value[:3] for name, value in tokens().items()}
    optimizer.process.heal_with(Healer(model, batch))
    with propagated(caplog), caplog.at_level(logging.WARNING):
        step(model, optimizer, 1)
    halved = {message for message in caplog.messages if "no room to read" in message}
    assert len(halved) == 2, "of three examples two are taken, and of two one"
    assert "no room to look at 2 of 2 matrices" in caplog.text


def test_who_does_not_ask_for_it_isn_t_told_to_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = curved(seed=6)
    bound, healer = bound_to(model), Healer(model, tokens())
    short_of_memory(0, monkeypatch)
    assert CHANNELS not in healer.costs(bound, none_of(bound))  # as the split between structures is measured
