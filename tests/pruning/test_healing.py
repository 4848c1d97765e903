"""Healing: what marked units say is refitted into those that stay, without a trace where these can say it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.tiny_model import logits_of, random_model
from hesso_hf.pruning import refit
from hesso_hf.pruning.calibration import measure_curves
from hesso_hf.pruning.fisher import DAMPING
from hesso_hf.pruning.healing import Healer
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.plan import PruningPlan, wrap_optimizer
from hesso_hf.pruning.readers import readers_of
from hesso_hf.pruning.reconstruction import RIDGE
from hesso_hf.pruning.refit import said_by_others
from hesso_hf.pruning.saliency import PerUnit
from hesso_hf.pruning.token_rows import TokenRows
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.pruning.windows import padded, unreadable
from hesso_hf.structures.lora import Adapters, base_of, parameters_of
from tests.support.checks import propagated
from tests.support.lora import tiny_lora
from tests.support.tiny import HEAD_DIM, KV_HEADS, MLP, VOCAB, all_rows, tiny_gpt2, tiny_llama

REPEATED = 10
HEADS, CHANNELS, STREAM = "attention_heads", "mlp_channels", "embedding_channels"
CONFIG = {"warmup_steps": 0, "pruning_steps": 4, "pruning_periods": 1, "saliency": "magnitude"}


def tokens(rows: int = 16, length: int = 24, seed: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bound_to(model: PreTrainedModel) -> BoundGroups:
    groups = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.1)).groups
    return BoundGroups(parameters_of(base_of(model)), groups, adapters=Adapters.of(base_of(model)))


def none_of(bound: BoundGroups) -> PerUnit:
    return {name: torch.zeros(shape, dtype=torch.bool) for name, shape in bound.shapes().items()}


def leave_(bound: BoundGroups, marked: PerUnit, corrections: dict[str, list[torch.Tensor]]) -> None:
    """Do at once what a period does along its steps."""
    bound.add_(corrections)
    bound.mask_weights_(marked)


@torch.no_grad()
def repeat_(model: PreTrainedModel) -> None:
    """Have each layer's first channels repeat the next ones at half the size, and its first head group the second."""
    for layer in model.model.layers:
        size = HEAD_DIM * model.config.num_attention_heads // KV_HEADS
        for matrix, units, factor in (
            (layer.mlp.gate_proj, REPEATED, 1.0), (layer.mlp.up_proj, REPEATED, 0.5),
            (layer.self_attn.q_proj, size, 1.0), (layer.self_attn.k_proj, HEAD_DIM, 1.0),
            (layer.self_attn.v_proj, HEAD_DIM, 0.5),
        ):  # fmt: skip
            for parameter in (matrix.weight, matrix.bias) if matrix.bias is not None else (matrix.weight,):
                parameter[:units] = factor * parameter[units : 2 * units]


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "lora"])
def test_units_that_others_repeat_leave_without_a_trace(adapters: bool):
    model: Any = tiny_llama(seed=3)
    repeat_(model)
    if adapters:
        model = tiny_lora(model, target_modules=["down_proj", "o_proj"])
    bound, held_out = bound_to(model), tokens(seed=9)["input_ids"]
    before = logits_of(model, held_out)
    marked = none_of(bound)
    marked[CHANNELS][:, :REPEATED] = True
    marked[HEADS][:, 0] = True
    corrections = Healer(base_of(model), tokens()).corrections(bound, marked, none_of(bound))
    assert len(corrections) == 2 * model.config.num_hidden_layers
    leave_(bound, marked, corrections)
    assert (logits_of(model, held_out) - before).abs().max() <= 2e-4 * before.abs().max()


def test_without_healing_these_units_would_be_missed():
    model = tiny_llama(seed=3)
    repeat_(model)
    bound, held_out = bound_to(model), tokens(seed=9)["input_ids"]
    before, marked = logits_of(model, held_out), none_of(bound)
    marked[CHANNELS][:, :REPEATED] = True
    leave_(bound, marked, {})
    assert (logits_of(model, held_out) - before).abs().max() > 1e-2 * before.abs().max()


def activations(model: PreTrainedModel, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> np.ndarray:
    found: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    return found[0][batch["attention_mask"].bool()].double().numpy()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_a_correction_is_the_ridge_regression_on_the_tokens_that_count(make: Any, monkeypatch: pytest.MonkeyPatch):
    """The first layer's, whose activations don't depend on others' healing; the rest of a padded row counts nothing."""
    monkeypatch.setattr(refit, "RIDGES", (0.1,))
    model, batch = make(seed=5), tokens()
    batch["attention_mask"][3:7, 15:] = 0
    bound = bound_to(model)
    reader = next(r for r in readers_of(model, bound) if any(name == CHANNELS for name, _, _ in r.axes))
    marked, pruned = none_of(bound), none_of(bound)
    marked[CHANNELS][0, [1, 4, 7]] = True
    pruned[CHANNELS][0, [0, 2]] = True
    healer = Healer(model, batch)
    (found,), norms = healer.corrections(bound, marked, pruned)[reader.name], healer.fisher(bound).norms[reader.name]
    counts = (norms / norms.mean() + DAMPING) / (1 + DAMPING)  # of the errors of each token
    assert len(counts) == 16 * 24 - 4 * 9
    assert float(counts.max()) > 2 * float(counts.min())
    read = activations(model, reader.module, batch) * counts.double().sqrt().numpy()[:, None]
    stays = [unit for unit in range(MLP) if unit not in (0, 1, 2, 4, 7)]
    others, gone = read[:, stays], read[:, [1, 4, 7]]
    ridge = 0.1 * (read**2).sum(0).mean()
    said = np.linalg.solve(others.T @ others + ridge * np.eye(len(stays)), others.T @ gone)
    weight = reader.module.weight.detach().double().numpy()
    weight = weight if reader.dim == 1 else weight.T
    expected = np.zeros_like(weight)
    expected[:, stays] = weight[:, [1, 4, 7]] @ said.T
    result = found.double().numpy() if reader.dim == 1 else found.double().numpy().T
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()


def test_later_matrices_are_fitted_to_what_healed_ones_make():
    model, batch = tiny_llama(seed=5), tokens()
    bound, marked = bound_to(model), none_of(bound_to(model))
    marked[CHANNELS][:, :12] = True
    healer = Healer(model, batch)
    fisher = healer.fisher(bound)
    together = healer.corrections(bound, marked, none_of(bound), fisher)
    first = none_of(bound)
    first[CHANNELS][0] = marked[CHANNELS][0]
    leave_(bound, first, healer.corrections(bound, first, none_of(bound), fisher))
    second = none_of(bound)
    second[CHANNELS][1] = marked[CHANNELS][1]
    after = healer.corrections(bound, second, none_of(bound), fisher)
    (found,), (expected,) = (those["model.layers.1.mlp.down_proj.weight"] for those in (together, after))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_noise_is_left_alone():
    """Where no unit says anything of another, the held-out tokens are not said better by any ridge."""
    rows = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    gone = torch.zeros(48, dtype=torch.bool)
    gone[:4] = True
    assert said_by_others(all_rows(rows), torch.randn(6, 4), gone, ~gone) is None


def test_of_units_that_repeat_each_other_one_costs_little() -> None:
    model = tiny_llama(seed=3)
    repeat_(model)
    bound = bound_to(model)
    costs = Healer(model, tokens()).costs(bound, none_of(bound))
    assert costs.keys() == {CHANNELS, HEADS}
    pairs = torch.stack([costs[CHANNELS][:, :REPEATED], costs[CHANNELS][:, REPEATED : 2 * REPEATED]])
    assert float(pairs.min(0).values.max()) < 0.1 * float(costs[CHANNELS][:, 2 * REPEATED :].median())
    assert (costs[HEADS].argmin(1) < 2).all(), "heads 0 and 1 say the same"


def test_a_period_marks_the_units_whose_going_costs_least() -> None:
    model = tiny_llama(seed=5)
    sizes = {"target_sizes": {"intermediate_size": MLP - 9}, "structures": [CHANNELS]}
    optimizer = run(model, healed=True, saliency="reconstruction", cric=False, **sizes)
    healer = Healer(model, tokens())
    process = optimizer.process
    going = {CHANNELS: 9, HEADS: 0, "embedding_channels": 0}
    costs = healer.costs(process.bound, none_of(process.bound), going)[CHANNELS]
    step(model, optimizer, 1)
    for layer, marked in enumerate(process.redundant[CHANNELS]):
        assert sorted(marked.nonzero().flatten().tolist()) == sorted(costs[layer].argsort()[:9].tolist())


def test_later_layers_are_judged_where_the_cheapest_of_earlier_ones_are_gone_and_healed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(seed=5)
    bound, healer = bound_to(model), Healer(model, tokens())
    fisher = healer.fisher(bound)
    going = {CHANNELS: 9, HEADS: 0, "embedding_channels": 0}
    costs = healer.costs(bound, none_of(bound), going, fisher)
    plain = healer.costs(bound, none_of(bound), fisher=fisher)
    assert torch.equal(costs[CHANNELS][0], plain[CHANNELS][0])
    assert float((costs[CHANNELS][1] - plain[CHANNELS][1]).abs().max()) > 1e-3 * float(plain[CHANNELS][1].max())
    marked = none_of(bound)
    marked[CHANNELS][0, costs[CHANNELS][0].argsort()[:9]] = True
    monkeypatch.setattr(refit, "RIDGES", (RIDGE,))  # that costs are measured with
    found = healer.corrections(bound, marked, none_of(bound), fisher)
    with torch.no_grad():
        bound.add_(found)
        bound.mask_weights_(marked)
    again = healer.costs(bound, marked, fisher=fisher)[CHANNELS][1]
    assert float((again - costs[CHANNELS][1]).abs().max()) < 2e-2 * float(again.max())


def test_reconstruction_judges_units_without_healing_them() -> None:
    model = tiny_llama(seed=5)
    optimizer = run(model, healed=True, saliency="reconstruction", healing="off")
    step(model, optimizer, 1)
    assert not optimizer.process.state.healing
    assert bool(optimizer.process.redundant[CHANNELS].any())


@pytest.mark.usefixtures("unshortened")
@pytest.mark.parametrize("healing", ["auto", "off"])
def test_what_structures_cost_is_measured_as_the_run_will_treat_them(healing: str) -> None:
    model = tiny_llama(seed=3)
    repeat_(model)
    weights = copy.deepcopy(model.state_dict())
    config = HessoConfig(0.3, structures=[CHANNELS, HEADS], saliency="reconstruction", healing=healing)
    groups = PruningPlan.prepare(model, config).groups
    ids = tokens(rows=4, seed=9)["input_ids"]

    def loss(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    found = measure_curves(model, groups, list(ids.split(1)), loss, config, Healer(model, tokens()))
    plain = measure_curves(model, groups, list(ids.split(1)), loss, config)
    first, gone = found.rises[CHANNELS][0], found.removed[CHANNELS][0]
    assert gone * MLP <= REPEATED
    if healing == "auto":
        assert first < 1e-3 < plain.rises[CHANNELS][0]
    else:
        assert first > 1e-3, "units that go unhealed are missed"
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_examples_that_hold_more_than_tokens_are_named() -> None:
    ids, image = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 3, 4)
    assert unreadable([{"input_ids": ids, "labels": ids, "advantages": torch.ones(1, 4)}]) == ""
    assert "hold `pixel_values`" in unreadable([{"input_ids": ids}, {"input_ids": ids, "pixel_values": image}])
    assert "no `input_ids`" in unreadable([{"pixel_values": image}])
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert "`attention_mask` is (1, 1, 4, 4) for" in unreadable([{"input_ids": ids, "attention_mask": mask}])
    assert unreadable([{"input_ids": ids, "attention_mask": mask[0, 0, :1]}]) == ""


def test_few_tokens_are_of_examples_spread_over_the_batch() -> None:
    batch = tokens(rows=16, length=24)
    fewer = Healer(tiny_llama(), batch).fewer(100)
    assert torch.equal(fewer._batch["input_ids"], batch["input_ids"][::3])
    assert len(Healer(tiny_llama(), batch).fewer(1)._batch["input_ids"]) == 1


def run(model: PreTrainedModel, healed: bool, rate: float = 0.0, **changes: Any) -> HessoOptimizer:
    """Go through one pruning period, by default without learning anything."""
    sizes = {"target_sizes": {"intermediate_size": MLP - 12, "hidden_size": 48}, "structures": [CHANNELS, STREAM]}
    base = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer = wrap_optimizer(base, model, HessoConfig(**(sizes | CONFIG | changes)), total_steps=6)
    if healed:
        optimizer.process.heal_with(Healer(model, tokens()))
    return optimizer


def step(model: PreTrainedModel, optimizer: HessoOptimizer, count: int) -> None:
    ids = tokens(rows=2, seed=7)["input_ids"]
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_a_process_has_not_found_itself_is_taken_in_the_main_process_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an adapter what heals a bf16 matrix is fp32."""
    bound, name = bound_to(tiny_llama(seed=5).to(torch.bfloat16)), "model.layers.1.mlp.down_proj.weight"
    module = "hesso_hf.pruning.weights.bound_groups"
    monkeypatch.setattr(f"{module}.from_main", lambda _: {name: torch.float32})
    monkeypatch.setattr(f"{module}.broadcast_", lambda _: None)
    (found,) = bound.from_main({})[name]
    assert (found.dtype, found.shape) == (torch.float32, bound.parameters[name].shape)


def test_below_fp32_all_that_heals_is_added_in_however_many_steps() -> None:
    """Shares of a hundredth are less than half of what the weights' last bits are."""
    model, name = tiny_llama(seed=5).to(torch.bfloat16), "model.layers.1.mlp.down_proj.weight"
    bound, weight = bound_to(model), model.get_parameter(name).data
    added = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.1 * float(weight.float().std())
    wanted, left = weight.float() + added, {name: [added.clone()]}
    for done in range(100):
        bound.add_(left, 100 - done, 100)
    once = float((wanted.to(torch.bfloat16).float() - wanted).norm())
    assert float((weight.float() - wanted).norm()) <= 1.01 * once


def test_of_healing_that_earlier_code_saved_whole_what_is_left_is_added() -> None:
    model = tiny_llama(seed=5).to(torch.bfloat16)
    optimizer = run(model, healed=True)
    step(model, optimizer, 1)
    saved = optimizer.process.state_dict()
    saved["healing"] = copy.deepcopy(saved["healing"])
    for marked, share in ((True, 1.0), (False, 0.75)):
        state = {name: value for name, value in saved.items() if marked or name != "healing_left"}
        optimizer.process.load_state_dict(copy.deepcopy(state), optimizer.base)
        for name, pieces in optimizer.process.state.healing.items():
            assert torch.equal(pieces[0], saved["healing"][name][0] * share), name


def test_a_matrix_that_no_pass_calls_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=5)
    bound, healer = bound_to(model), Healer(model, tokens())
    marked = none_of(bound)
    marked[CHANNELS][:, :9] = True
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda rows: rows)
    with propagated(caplog):
        found = healer.corrections(bound, marked, none_of(bound))
    assert len(found) == 1
    said = (
        "a forward pass calls no module for 1 of 2 matrices of LlamaForCausalLM, such as model.layers.1.mlp.down_proj"
    )
    assert said in caplog.text


def test_units_take_the_correction_on_as_the_marked_ones_shrink():
    model = tiny_llama(seed=5)
    name = "model.layers.1.mlp.down_proj.weight"
    before = model.get_parameter(name).detach().clone()
    optimizer = run(model, healed=True)
    step(model, optimizer, 1)
    process = optimizer.process
    correction = process.state.healing[name][0].clone()
    stays = ~process.redundant[CHANNELS][1]
    rows = ~process.redundant[STREAM][0]
    assert correction[:, ~stays].abs().max() == 0
    assert correction[~rows].abs().max() == 0, "a channel of the stream that goes itself took something on"
    for quarter in (0.25, 0.5, 0.75, 1.0):
        weight = model.get_parameter(name).detach()
        change = (weight - before)[rows][:, stays]
        assert (change - quarter * correction[rows][:, stays]).abs().max() <= 1e-6
        step(model, optimizer, 1)
    assert not process.state.healing
    assert model.get_parameter(name)[:, ~stays].abs().max() == 0


def test_a_run_that_goes_on_within_a_period_is_the_same_bit_for_bit():
    whole = tiny_llama(seed=5)
    optimizer = run(whole, healed=True, rate=1e-2)
    step(whole, optimizer, 2)
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    step(whole, optimizer, 4)
    again = tiny_llama(seed=5)
    resumed = run(again, healed=True, rate=1e-2)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    step(again, resumed, 4)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_healing_keeps_the_loss_nearer_than_shrinking_alone():
    losses = {}
    for healed in (False, True):
        model = tiny_llama(seed=3)
        repeat_(model)
        optimizer = run(model, healed, target_sizes={"intermediate_size": MLP - 5}, structures=[CHANNELS])
        ids, before = tokens(seed=9)["input_ids"], None
        before = logits_of(model, ids)
        step(model, optimizer, 4)
        losses[healed] = float((logits_of(model, ids) - before).square().mean())
    assert losses[True] < 0.5 * losses[False]


def test_examples_of_several_lengths_are_padded_on_the_right():
    examples = [
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])},
        {
            "input_ids": torch.tensor([[8, 9, 3, 4], [0] * 4, [5, 5, 0, 0]]),
            "attention_mask": torch.tensor([[1] * 4, [0] * 4, [1, 1, 0, 0]]),  # an empty text is no row
        },
    ]
    batch = padded(examples, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[6, 7, 0, 0], [8, 9, 3, 4], [5, 5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_of_long_examples_windows_are_taken_from_their_beginning_to_their_end():
    long = [{"input_ids": torch.arange(start, start + 700)[None]} for start in (0, 1000, 2000)]
    rows = padded(long, torch.device("cpu"))["input_ids"]
    assert rows[:, 0].tolist() == [0, 1000 + (700 - 512) // 2, 2000 + 700 - 512]
    assert rows.shape == (3, 512)
    uneven = [{"input_ids": torch.arange(length)[None]} for length in (400, *[4] * 19)]
    batch = padded(uneven, torch.device("cpu"))
    assert batch["input_ids"].shape == (20, 96)  # four times the mean of 23.8
    assert batch["attention_mask"].sum(1).tolist() == [96, *[4] * 19]


def test_without_room_what_was_healed_stays_and_the_rest_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_llama(seed=3)
    bound = bound_to(model)
    marked = none_of(bound)
    marked[CHANNELS][:, :3] = True
    healer, given = Healer(model, tokens()), []
    whole = healer.corrections(bound, marked, none_of(bound))

    def one_alone(rows: TokenRows) -> torch.Tensor:
        given.append(rows)
        if len(given) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gram(rows)

    gram = TokenRows.gram
    monkeypatch.setattr(TokenRows, "gram", one_alone)
    with caplog.at_level(logging.WARNING, "hesso_hf"):
        found = healer.corrections(bound, marked, none_of(bound))
        assert healer.costs(bound, none_of(bound)) == {}
    name = min(whole)
    assert found.keys() == {name}
    assert torch.equal(found[name][0], whole[name][0])
    assert "no room to look at 1 of 2 matrices of LlamaForCausalLM" in caplog.text
    assert "no room to look at 4 of 4 matrices of LlamaForCausalLM" in caplog.text


def test_values_that_are_not_finite_leave_units_unhealed_and_end_no_run(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(seed=3)
    ids = tokens()["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[1, 0]] = torch.nan  # one of the examples overflows
    bound = bound_to(model)
    marked = none_of(bound)
    marked[CHANNELS][:, :3] = True
    healer = Healer(model, tokens())
    with caplog.at_level(logging.WARNING, "hesso_hf"):
        found = healer.corrections(bound, marked, none_of(bound))
        assert healer.costs(bound, none_of(bound)) == {}
    assert all(bool(piece.isfinite().all()) for pieces in found.values() for piece in pieces)
    message = "values that aren't finite, or are too large, are read by 4 of 4 matrices of LlamaForCausalLM: gradients"
    assert message in caplog.text


def test_where_processes_share_matrices_one_without_room_goes_on_with_the_pass_or_ends_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=3)
    bound, marked, given = bound_to(model), none_of(bound_to(model)), []
    marked[CHANNELS][:, :3] = True
    bound._holdings.sharded = True
    healer, gram = Healer(model, tokens()), TokenRows.gram

    def not_the_first(rows: TokenRows) -> torch.Tensor:
        given.append(rows)
        if len(given) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gram(rows)

    monkeypatch.setattr(TokenRows, "gram", not_the_first)
    with caplog.at_level(logging.WARNING, "hesso_hf"):
        found = healer.corrections(bound, marked, none_of(bound))
    assert [bool(piece.any()) for _, (piece,) in sorted(found.items())] == [False, True]
    assert "no room to look at model.layers.0.mlp.down_proj.weight" in caplog.text
    monkeypatch.setattr(bound, "whole", lambda name: not_the_first(given.clear() or tokens()))
    with pytest.raises(HessoError, match="no room to look at 2 of 2 matrices of LlamaForCausalLM; use 'off'"):
        healer.corrections(bound, marked, none_of(bound), healer.fisher(bound))


def test_structures_that_no_linear_layer_reads_are_named(caplog: pytest.LogCaptureFixture):
    """Fused experts' down projections are one tensor of three dimensions."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=60, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    model = random_model(MixtralForCausalLM, config, 1)
    groups = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.1)).groups
    bound = BoundGroups(parameters_of(model), groups)
    marked = none_of(bound)
    marked[CHANNELS][:, :3] = True
    marked[HEADS][:, 0] = True
    for _ in range(2):  # a second run in the same process hears it too, but each healer says it once
        with propagated(caplog):
            healer = Healer(model, tokens())
            found = healer.corrections(bound, marked, none_of(bound))
            healer.corrections(bound, marked, none_of(bound))
        said = {id(record): record.getMessage() for record in caplog.records}  # one that propagates is caught twice
        assert sum("mlp_channels of MixtralForCausalLM aren't healed" in line for line in said.values()) == 1
        assert "attention_heads of" not in caplog.text
        caplog.clear()
    assert {name.split(".")[-2] for name in found} == {"o_proj"}


def test_channels_of_the_stream_which_nothing_heals_cost_no_pass() -> None:
    model = tiny_llama()
    bound, healer = bound_to(model), Healer(model, tokens())
    marked, passes = none_of(bound), list[str]()
    fisher = healer.fisher(bound)
    model.model.register_forward_pre_hook(lambda *_: passes.append("pass"))
    marked[STREAM][:, :3] = True
    assert healer.corrections(bound, marked, none_of(bound), fisher) == {}
    assert not passes
    marked[CHANNELS][:, 0] = True
    assert healer.corrections(bound, marked, none_of(bound), fisher)
    assert passes == ["pass"]


@pytest.mark.parametrize(("noise", "repeats"), [(0.0, True), (1.5, False)])
def test_weights_grow_only_where_others_repeat_what_goes(noise: float, repeats: bool) -> None:
    """A unit is, or has in it, the small difference of two others: the one is worth large weights, not the other."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 6, generator=generator)
    difference = 0.01 * torch.randn(400, generator=generator)
    rows[:, 1] = rows[:, 0] + difference
    rows[:, 5] = 100 * difference + noise * torch.randn(400, generator=generator) + (0 if repeats else 1.5 * rows[:, 2])
    gone = torch.tensor([False] * 5 + [True])
    said = said_by_others(all_rows(rows), torch.ones(3, 1), gone, ~gone)
    assert said is not None
    assert (float(said.abs().max()) > 50) == repeats
