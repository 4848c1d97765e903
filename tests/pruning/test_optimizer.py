"""HessoOptimizer: equal to the slow reference, exact zeros and counts, resumable, and a stock optimizer otherwise."""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import Adafactor, PreTrainedModel

from hesso_hf.config import SALIENCIES
from hesso_hf.errors import CheckpointMismatchError, HessoError, TrainingDivergedError
from hesso_hf.pruning import process as process_module
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.phases import PruningPeriod
from hesso_hf.pruning.process import PruningProcess, keeps_zeros
from hesso_hf.pruning.schedule import Schedule
from tests.support.few_bits import Codes
from tests.support.reference import GEMMA2_NORMS, ReferenceHesso, Structures, decoder_units, flat_weights, phi_units
from tests.support.tiny import (
    KV_HEADS,
    MLP,
    QUERIES,
    UNITS,
    backward,
    process_for,
    tiny_gemma2,
    tiny_llama,
    tiny_phi,
    tiny_phi3,
    token_batches,
)

# alone, embedding channels must stay a multiple of the 6 heads: the config class says so
KEPT = {"attention_heads": 1, "mlp_channels": 33, "embedding_channels": 54}  # the last stays a multiple of 6 heads
QUERY_KEPT = {"query_heads": 6, "mlp_channels": 33, "embedding_channels": 48}  # 2 of 4 for each of 3 key-value heads
MIX = {"magnitude": 0.5, "cosine_similarity": 1.0, "taylor_first_order": 0.25, "taylor_second_order": 2.0}
OptimizerFactory = Callable[[PreTrainedModel], Optimizer]


def adamw(model: PreTrainedModel) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def fused_adamw(model: PreTrainedModel) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)


def sgd_momentum(model: PreTrainedModel) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def adafactor(model: PreTrainedModel) -> Optimizer:
    return Adafactor(
        model.parameters(), lr=3e-3, weight_decay=0.1, beta1=0.9, scale_parameter=False, relative_step=False
    )


def muon(model: PreTrainedModel) -> Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=3e-3)


def still(model: PreTrainedModel) -> Optimizer:
    """Moves nothing, so that shrinking shows alone."""
    return SGD(model.parameters(), lr=0.0)


def hesso(
    model: PreTrainedModel,
    schedule: Schedule,
    make: OptimizerFactory = adamw,
    kept: dict[str, int] = KEPT,
    **config: Any,
) -> HessoOptimizer:
    return HessoOptimizer(make(model), process_for(model, kept, schedule, **config))


def marked(process: PruningProcess) -> tuple[set[tuple[str, int, int]], set[tuple[str, int, int]]]:
    """The (structure, layer, unit) that are redundant, and those that are pruned."""

    def keys(flags: dict[str, torch.Tensor]) -> set[tuple[str, int, int]]:
        return {(name, layer, j) for name, flag in flags.items() for layer, j in flag.nonzero().tolist()}

    return keys(process.redundant), keys({name: scales == 0 for name, scales in process.scales.items()})


def pruned_masks(model: PreTrainedModel, units: Structures, process: PruningProcess) -> dict[str, torch.Tensor]:
    """Which elements of each parameter belong to a pruned unit, from the reference's own index lists."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, layer, j in marked(process)[1]:
        for piece in units[name][layer][j]:
            masks[piece.parameter].index_fill_(piece.dim, torch.tensor(piece.indices), True)
    return masks


def parameters_equal(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


# -- fast against slow ------------------------------------------------------------------------------------------------


def assert_equals_reference(
    model: PreTrainedModel,
    units: Structures,
    schedule: Schedule,
    batches: int,
    config: dict[str, Any],
    kept: dict[str, int] = KEPT,
    writers: dict[str, int] | None = None,
) -> None:
    twin = copy.deepcopy(model)
    fast = hesso(model, schedule, kept=kept, saliency_batches=batches, **config)
    slow = ReferenceHesso(
        twin,
        adamw(twin),
        units,
        {name: len(units[name][0]) - count for name, count in kept.items()},
        schedule.warmup_steps,
        schedule.pruning_steps,
        schedule.pruning_periods,
        fast.process.config.saliency_weights,
        batches,
        across_layers=config.get("layer_widths") == "per_layer",
        kv_heads=KV_HEADS,
        writers=writers,
    )
    scores, fast_scores = [], fast.process.run.judging._scores
    fast.process.run.judging._scores = lambda *given: scores.append(fast_scores(*given)) or scores[-1]  # type: ignore[method-assign]
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        backward(model, batch)
        backward(twin, batch)
        fast.step()
        slow.step()
        if step == schedule.warmup_steps:
            for (name, layer, j), expected in slow.scored.items():
                assert float(scores[0][name][layer, j]) == pytest.approx(expected, rel=1e-4), (name, layer, j)
        assert marked(fast.process) == (slow.redundant, slow.pruned), f"step {step}"
        for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda m, n=name, s=step: f"{s} {n} {m}")
    assert slow.pruned


@pytest.mark.parametrize("saliency", [*SALIENCIES, MIX], ids=lambda s: s if isinstance(s, str) else "mix")
def test_every_step_equals_the_reference(saliency: Any) -> None:
    model = tiny_llama()
    schedule = Schedule(warmup_steps=3, pruning_steps=11, pruning_periods=3, total_steps=17)  # periods of 3, 3 and 5
    assert_equals_reference(model, decoder_units(model), schedule, 2, {"saliency": saliency})


@pytest.mark.parametrize("saliency", ["avg_magnitude", "taylor_second_order"])
def test_every_step_equals_the_reference_across_layers(saliency: Any) -> None:
    model = tiny_llama(num_hidden_layers=3)
    schedule = Schedule(warmup_steps=3, pruning_steps=5, pruning_periods=1, total_steps=10)
    config = {"saliency": saliency, "layer_widths": "per_layer"}
    assert_equals_reference(model, decoder_units(model), schedule, 8, config)


def test_every_step_equals_the_reference_across_layers_over_periods() -> None:
    model = tiny_llama()
    schedule = Schedule(warmup_steps=3, pruning_steps=11, pruning_periods=3, total_steps=17)
    config = {"saliency": "taylor_second_order", "layer_widths": "per_layer"}
    assert_equals_reference(model, decoder_units(model), schedule, 2, config)


def test_every_step_equals_the_reference_with_tied_embeddings_and_no_warm_up() -> None:
    model = tiny_llama(tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
    schedule = Schedule(warmup_steps=0, pruning_steps=5, pruning_periods=2, total_steps=7)
    assert_equals_reference(model, decoder_units(model), schedule, 8, {})


def test_every_step_equals_the_reference_where_norms_are_used_as_one_plus_w() -> None:
    model = tiny_gemma2()
    schedule = Schedule(warmup_steps=2, pruning_steps=7, pruning_periods=2, total_steps=11)
    units = decoder_units(model, GEMMA2_NORMS, norm_offset=1.0)
    assert_equals_reference(model, units, schedule, 3, {"saliency": ["magnitude", "taylor_second_order"]})


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
@pytest.mark.parametrize("saliency", ["taylor_second_order", MIX], ids=["taylor", "mix"])
def test_every_step_equals_the_reference_for_query_heads(saliency: Any, widths: str) -> None:
    model = tiny_llama(num_attention_heads=QUERIES, num_hidden_layers=3)
    schedule = Schedule(warmup_steps=2, pruning_steps=7, pruning_periods=2, total_steps=11)
    config = {"saliency": saliency, "layer_widths": widths}
    assert_equals_reference(model, decoder_units(model), schedule, 2, config, QUERY_KEPT)


def test_every_step_equals_the_reference_where_norms_subtract_the_mean() -> None:
    model = tiny_phi()
    for layer in model.model.layers:  # its gradient is rounding noise, which AdamW makes a step of
        layer.self_attn.k_proj.bias.requires_grad_(False)
    units, writers = phi_units(model)
    schedule = Schedule(total_steps=14, warmup_steps=2, pruning_steps=8, pruning_periods=2)
    assert_equals_reference(model, units, schedule, 2, {}, writers=writers)


def test_pruned_units_do_not_weigh_in_the_normalisation_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The criteria are normalised over the units that compete: pruned ones don't (cosine gives them 1, not 0)."""
    model = tiny_llama()
    schedule = Schedule(warmup_steps=1, pruning_steps=2, pruning_periods=2, total_steps=3)
    kept = {"mlp_channels": 4}
    saliency = {"magnitude": 1.0, "cosine_similarity": 1.0}
    optimizer = hesso(model, schedule, still, kept, saliency=saliency, saliency_batches=1)
    batches = token_batches(3)
    for batch in batches[:2]:
        backward(model, batch)
        optimizer.step()
    assert (optimizer.process.scales["mlp_channels"] == 0).sum(1).tolist() == [20, 20]
    backward(model, batches[2])
    scores: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(PruningPeriod, "mark", lambda phase, base: scores.update(phase.run.judging.scores()))
    optimizer.step()

    reference = ReferenceHesso(model, still(model), decoder_units(model), {"mlp_channels": 40}, 1, 2, 2, saliency, 1)
    reference.pruned = marked(optimizer.process)[1]
    reference.observe()
    for (name, layer, j), expected in reference.scores().items():
        assert float(scores[name][layer, j]) == pytest.approx(expected, rel=1e-4), (layer, j)


# -- shrinking and zeros ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", list(UNITS))
def test_redundant_groups_shrink_linearly_to_exactly_zero(structure: str) -> None:
    model = tiny_llama()
    units = decoder_units(model)
    parameters = dict(model.named_parameters())
    schedule = Schedule(warmup_steps=2, pruning_steps=10, pruning_periods=2, total_steps=14)
    optimizer = hesso(model, schedule, still, {structure: KEPT[structure]})
    process = optimizer.process

    def norm(keys: set[tuple[str, int, int]]) -> float:
        vectors = [flat_weights(parameters, units[name][layer][j]) for name, layer, j in keys]
        return float(torch.cat(vectors).norm())

    untouched = copy.deepcopy(model.state_dict())
    redundant: set[tuple[str, int, int]] = set()
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        backward(model, batch)
        before = norm(redundant) if redundant else None
        weights = copy.deepcopy(model.state_dict())
        optimizer.step()
        position = schedule.period_step(step)
        if position is None:
            assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
            continue
        if position.t == 0:
            redundant = marked(process)[0]
            full = _norm_in(untouched, units, redundant)
            before = full
        assert redundant
        if position.t < position.length - 1:
            left = norm(redundant)
            assert left == pytest.approx(full * (position.length - position.t - 1) / position.length, rel=1e-6)
            assert left == pytest.approx(before * position.factor, rel=1e-6)
            assert process.redundant_norm() == pytest.approx(left, rel=1e-6)
        else:
            assert norm(redundant) == 0.0
            assert redundant <= marked(process)[1]
            assert process.redundant_norm() == 0.0
            redundant = set()
    assert process.finished
    pruned = pruned_masks(model, units, process)
    for name, value in model.state_dict().items():  # what is kept was never touched
        assert torch.equal(value[~pruned[name]], untouched[name][~pruned[name]])


def _norm_in(state: dict[str, torch.Tensor], units: Structures, keys: set[tuple[str, int, int]]) -> float:
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in state.items()}
    return float(torch.cat([flat_weights(parameters, units[n][layer][j]) for n, layer, j in keys]).norm())


@pytest.mark.parametrize("make", [adamw, fused_adamw, sgd_momentum, adafactor, muon])
def test_pruned_groups_stay_exactly_zero(make: OptimizerFactory) -> None:
    model = tiny_llama()
    units = decoder_units(model)
    schedule = Schedule(warmup_steps=2, pruning_steps=5, pruning_periods=2, total_steps=12)
    optimizer = hesso(model, schedule, make)
    states, nonzero_states = 0, set()
    for batch in token_batches(schedule.total_steps):
        backward(model, batch)
        earlier = pruned_masks(model, units, optimizer.process)
        optimizer.step()
        pruned = pruned_masks(model, units, optimizer.process)
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            assert not parameter[pruned[name]].any(), name
            assert parameter.grad is not None
            assert not parameter.grad[earlier[name]].any(), name
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    states += int(pruned[name].any())
                    if value[pruned[name]].any():
                        nonzero_states.add(key)
    counts = {name: (scales == 0).sum(1).unique().tolist() for name, scales in optimizer.process.scales.items()}
    assert counts == {name: [UNITS[name] - kept] for name, kept in KEPT.items()}
    assert states
    assert not nonzero_states


def test_nan_in_a_pruned_unit_does_not_survive() -> None:
    model = tiny_llama()
    units = decoder_units(model)
    # of one that isn't known to leave zeros alone; what is known to isn't masked after it
    optimizer = hesso(model, Schedule(1, 2, 1, 8), lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3))
    batches = token_batches(8)
    for batch in batches[:3]:
        backward(model, batch)
        optimizer.step()
    pruned = pruned_masks(model, units, optimizer.process)
    backward(model, batches[3])
    for name, parameter in model.named_parameters():
        parameter.data[pruned[name]] = float("nan")
        assert parameter.grad is not None
        parameter.grad[pruned[name]] = float("inf")
    optimizer.step()
    assert optimizer.process.step == 4  # the step was taken: the gradient is finite where it counts
    for batch in [None, *batches[4:]]:
        if batch is not None:
            backward(model, batch)
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            assert not parameter[pruned[name]].any()


def test_zero_divided_by_zero_in_a_pruned_unit_does_not_survive() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)  # tokens that don't occur have no gradient either
    optimizer = hesso(model, Schedule(1, 2, 1, 8), lambda model: torch.optim.AdamW(model.parameters(), eps=0.0))
    for batch in token_batches(6):
        backward(model, batch)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.process.finished


@pytest.mark.parametrize(
    ("make", "dtype", "expected"),
    [
        (torch.optim.AdamW, torch.float32, True),
        (torch.optim.AdamW, torch.bfloat16, True),
        (torch.optim.AdamW, torch.float16, False),  # its epsilon is zero there
        (functools.partial(torch.optim.Adam, eps=0.0), torch.float32, False),
        (torch.optim.SGD, torch.float16, True),
        (torch.optim.RMSprop, torch.float32, False),
        (type("AdamW", (torch.optim.AdamW,), {}), torch.float32, False),
    ],
)
def test_it_is_known_of_an_optimizer_whether_it_leaves_zeros_alone(make: Any, dtype: torch.dtype, expected: bool):
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0], dtype=dtype))
    base = make([weight], lr=0.25)
    assert keeps_zeros(base) is expected
    for _ in range(2):
        weight.grad = torch.tensor([0.0, 1.0], dtype=dtype)
        base.step()
    assert float(weight.detach()[0]) == 0 or not expected


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2, tiny_phi])
def test_what_is_not_masked_again_in_recovery_is_as_if_it_were(
    build: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for keepers in (process_module.ZERO_KEEPERS, ()):
        monkeypatch.setattr(process_module, "ZERO_KEEPERS", keepers)
        model = build()
        optimizer = hesso(model, Schedule(1, 2, 1, 8))
        for batch in token_batches(8):
            backward(model, batch)
            optimizer.observe_gradients()
            optimizer.report_gradient_norm(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
        found.append((model, optimizer))
    assert [optimizer.process.run.keeps_zeros for _, optimizer in found] == [True, False]
    for (name, one), other in zip(found[0][0].named_parameters(), found[1][0].parameters(), strict=True):
        assert torch.equal(one, other), name
        for key, value in found[0][1].state[one].items():
            assert torch.equal(value, found[1][1].state[other][key]), (name, key)


def test_nan_in_a_redundant_unit_ends_as_zero_in_weights_and_state() -> None:
    model = tiny_llama()
    optimizer = hesso(model, Schedule(1, 4, 1, 8))
    for batch in token_batches(4):
        backward(model, batch)
        optimizer.step()
    backward(model, token_batches(5)[-1])
    redundant = optimizer.process.redundant["mlp_channels"][0]
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.data[redundant] = float("nan")
    optimizer.state[weight]["exp_avg"][redundant] = float("nan")
    optimizer.step()
    assert optimizer.process.finished
    for value in (weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
        assert value.isfinite().all()
        assert not value[redundant].any()


def test_gemma_norms_end_at_minus_one_and_shrink_as_one_plus_w() -> None:
    model = tiny_gemma2()
    optimizer = hesso(model, Schedule(0, 4, 1, 6), still, {"embedding_channels": 54})
    norms = {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    assert len(norms) == 2 * 4 + 1
    before = {name: p.detach().clone() for name, p in norms.items()}
    for step, batch in enumerate(token_batches(6)):
        backward(model, batch)
        optimizer.step()
        left = max(0.0, 1 - (step + 1) / 4)
        if step == 0:
            redundant = optimizer.process.redundant["embedding_channels"][0].clone()
            assert redundant.sum() == 6
        for name, norm in norms.items():
            assert torch.equal(norm[~redundant], before[name][~redundant])
            torch.testing.assert_close(1 + norm[redundant], (1 + before[name][redundant]) * left, rtol=1e-5, atol=1e-6)
            if left == 0.0:
                assert (norm[redundant] == -1.0).all()
    assert not model.model.embed_tokens.weight[:, redundant].any()


def test_the_norm_of_redundant_groups_counts_one_plus_w() -> None:
    model = tiny_gemma2()
    units = decoder_units(model, GEMMA2_NORMS, norm_offset=1.0)["embedding_channels"][0]
    optimizer = hesso(model, Schedule(0, 4, 1, 6), still, {"embedding_channels": 54})
    run(model, optimizer, token_batches(2))
    parameters = dict(model.named_parameters())
    redundant = [j for _, _, j in marked(optimizer.process)[0]]
    expected = float(torch.cat([flat_weights(parameters, units[j]) for j in redundant]).norm())
    assert optimizer.process.redundant_norm() == pytest.approx(expected, rel=1e-6)


def test_pruned_groups_stay_at_zero_in_a_resumed_run() -> None:
    batches = token_batches(6)
    model, kept = tiny_gemma2(), {"embedding_channels": 54}
    optimizer = hesso(model, Schedule(0, 2, 1, 6), sgd_momentum, kept)
    run(model, optimizer, batches[:3])
    weights, state = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
    resumed = tiny_gemma2(seed=99)
    other = hesso(resumed, Schedule(0, 2, 1, 6), sgd_momentum, kept)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    run(resumed, other, batches[3:])  # weight decay pulls the stored -1 towards 0
    pruned = other.process.scales["embedding_channels"][0] == 0
    assert (resumed.model.norm.weight[pruned] == -1.0).all()


def test_gemma_norms_keep_minus_one_and_zero_state_under_weight_decay() -> None:
    model = tiny_gemma2()
    optimizer = hesso(model, Schedule(0, 2, 1, 6), sgd_momentum, {"embedding_channels": 54})
    for batch in token_batches(6):
        backward(model, batch)
        optimizer.step()
    pruned = optimizer.process.scales["embedding_channels"][0] == 0
    norm = model.model.norm.weight
    assert (norm[pruned] == -1.0).all()
    assert not optimizer.state[norm]["momentum_buffer"][pruned].any()


def test_fused_projections_lose_whole_heads_and_channels() -> None:
    model = tiny_phi3()
    optimizer = hesso(model, Schedule(0, 2, 1, 3), kept={"attention_heads": 2, "mlp_channels": 40})
    for batch in token_batches(3):
        backward(model, batch)
        optimizer.step()
    for layer, block in enumerate(model.model.layers):
        (head,) = (optimizer.process.scales["attention_heads"][layer] == 0).nonzero().flatten().tolist()
        rows = set(range(head * 16, head * 16 + 16))  # 6 query heads of 8 rows, then 3 key heads, then 3 value heads
        rows |= set(range(48 + head * 8, 48 + head * 8 + 8)) | set(range(72 + head * 8, 72 + head * 8 + 8))
        zero = (block.self_attn.qkv_proj.weight == 0).all(1).nonzero().flatten().tolist()
        assert set(zero) == rows
        columns = (block.self_attn.o_proj.weight == 0).all(0).nonzero().flatten().tolist()
        assert columns == list(range(head * 16, head * 16 + 16))
        channels = (optimizer.process.scales["mlp_channels"][layer] == 0).nonzero().flatten().tolist()
        assert len(channels) == 4
        zero = (block.mlp.gate_up_proj.weight == 0).all(1).nonzero().flatten().tolist()
        assert zero == channels + [MLP + channel for channel in channels]
        assert (block.mlp.down_proj.weight == 0).all(0).nonzero().flatten().tolist() == channels


# -- how many, when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periods", [1, 2, 3, 5])
def test_exactly_k_units_are_marked_after_each_period(periods: int) -> None:
    model = tiny_llama()
    schedule = Schedule(1, 2 * periods + 1, periods, 2 * periods + 3)
    process = hesso(model, schedule).process
    counts = _pruned_after_each_period(model, process, schedule)
    for period, found in enumerate(counts):
        for name, kept in KEPT.items():
            expected = round((UNITS[name] - kept) * (period + 1) / periods)
            assert found[name] == [expected] * len(found[name]), (name, period)


@pytest.mark.parametrize("saliency", ["taylor_second_order", "cosine_similarity"])
@pytest.mark.parametrize("periods", [1, 2, 3, 5])
def test_exactly_k_units_over_all_layers_are_marked_after_each_period(periods: int, saliency: str) -> None:
    model = tiny_llama()
    schedule = Schedule(1, 2 * periods + 1, periods, 2 * periods + 3)
    process = hesso(model, schedule, layer_widths="per_layer", saliency=saliency, saliency_batches=1).process
    counts = _pruned_after_each_period(model, process, schedule)
    for period, found in enumerate(counts):
        for name, kept in KEPT.items():
            removed = (UNITS[name] - kept) * len(found[name])
            assert sum(found[name]) == round(removed * (period + 1) / periods), (name, period)
    if saliency == "taylor_second_order":
        assert len(set(counts[-1]["mlp_channels"])) > 1  # the layers end with different widths


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
@pytest.mark.parametrize("periods", [1, 2, 3])
def test_as_many_query_heads_go_of_every_key_value_head_in_every_period(periods: int, widths: str) -> None:
    model = tiny_llama(num_attention_heads=QUERIES, num_hidden_layers=3)
    schedule = Schedule(1, 2 * periods + 1, periods, 2 * periods + 3)
    process = hesso(model, schedule, kept={"query_heads": 6}, layer_widths=widths).process
    ends = []

    def count(optimizer: HessoOptimizer) -> None:
        pruned = optimizer.process.scales["query_heads"] == 0
        of_kv_heads = pruned.view(3, KV_HEADS, -1).sum(2)
        assert (of_kv_heads == of_kv_heads[:, :1]).all()
        if optimizer.process.period_ended:
            ends.append(of_kv_heads[:, 0].tolist())

    optimizer = HessoOptimizer(adamw(model), process)
    for batch in token_batches(schedule.total_steps):
        backward(model, batch)
        optimizer.step()
        count(optimizer)
    totals = [round(6 * (period + 1) / periods) for period in range(periods)]
    if widths == "uniform":
        assert ends == [[round(2 * (period + 1) / periods)] * 3 for period in range(periods)]
    else:
        assert [sum(end) for end in ends] == totals
        assert len(set(ends[-1])) > 1  # the layers end with different widths


def test_ranking_across_layers_leaves_every_layer_a_unit_and_counts_the_pruned_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A unit that is already at zero may still score high (cosine gives it 1): it is no unit that a layer is left."""
    schedule = Schedule(warmup_steps=1, pruning_steps=4, pruning_periods=2, total_steps=6)
    process = process_for(tiny_llama(), {"attention_heads": 2}, schedule, layer_widths="per_layer")
    process.scales["attention_heads"][0, 0] = 0.0  # one of the two that go, pruned in the first period
    process.state.step = schedule.scoring_steps()[1]
    scores = {"attention_heads": torch.tensor([[1.0, 0.5, 0.6], [0.9, 0.8, 0.7]])}
    monkeypatch.setattr(process.run.judging, "_scores", lambda *_: scores)
    process.before_step(None)
    assert marked(process)[0] == {("attention_heads", 0, 1)}


def _pruned_after_each_period(
    model: PreTrainedModel, process: PruningProcess, schedule: Schedule
) -> list[dict[str, list[int]]]:
    """Units of each layer at zero after each period; between the scorings nothing is marked."""
    optimizer = HessoOptimizer(adamw(model), process)
    found = []
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        backward(model, batch)
        earlier = marked(process)
        optimizer.step()
        position = schedule.period_step(step)
        if position is None:
            assert marked(process) == earlier
        elif position.t == position.length - 1:
            found.append({name: (scales == 0).sum(1).tolist() for name, scales in process.scales.items()})
        elif position.t > 0:
            assert marked(process) == earlier
    return found


# -- a stock optimizer where there is nothing to prune ----------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("make", [adamw, fused_adamw, sgd_momentum])
def test_nothing_to_prune_equals_the_base_optimizer_bit_for_bit(make: OptimizerFactory, accumulation: int) -> None:
    model = tiny_llama()
    twin = copy.deepcopy(model)
    wrapped, plain = hesso(model, Schedule(3, 9, 3, 20), make, UNITS), make(twin)
    batches = token_batches(20 * accumulation)
    for step in range(20):
        chunk = batches[step * accumulation : (step + 1) * accumulation]
        backward(model, *chunk)
        backward(twin, *chunk)
        wrapped.step()
        plain.step()
    assert parameters_equal(model, twin)
    for ours, theirs in zip(tensors_in(dict(wrapped.state)), tensors_in(dict(plain.state)), strict=True):
        assert torch.equal(ours, theirs)


def test_learning_rate_schedulers_drive_the_base_optimizer(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_llama()
    twin = copy.deepcopy(model)
    wrapped, plain = hesso(model, Schedule(1, 2, 1, 6), kept=UNITS), adamw(twin)
    assert isinstance(wrapped, Optimizer)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (wrapped, plain)]
    for batch in token_batches(6):
        for each, optimizer, scheduler in zip((model, twin), (wrapped, plain), schedulers, strict=True):
            backward(each, batch)
            optimizer.step()
            scheduler.step()
    assert wrapped.base.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"] == pytest.approx(3e-3 / 7)
    assert parameters_equal(model, twin)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_closure_is_evaluated_with_gradients_once_and_its_loss_returned() -> None:
    model = tiny_llama()
    twin = copy.deepcopy(model)
    schedule = Schedule(1, 4, 2, 7)
    with_closure, without = hesso(model, schedule), hesso(twin, schedule)
    calls: list[float] = []
    for batch in token_batches(7):

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            with_closure.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            calls.append(float(loss.detach()))
            return loss

        loss = with_closure.step(closure)
        assert float(loss.detach()) == calls[-1]
        backward(twin, batch)
        assert without.step() is None
    assert len(calls) == 7
    assert parameters_equal(model, twin)


def test_the_raw_gradient_is_scored_when_it_is_observed_before_clipping() -> None:
    schedule = Schedule(warmup_steps=5, pruning_steps=2, pruning_periods=1, total_steps=10)
    sums = []
    for clip in (False, True):
        model = tiny_llama()
        optimizer = hesso(model, schedule, still, saliency="taylor_first_order")
        for batch in token_batches(4):
            backward(model, batch)
            optimizer.observe_gradients()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        assert optimizer.process.state.sums.batches == 4
        sums.append(tensors_in(optimizer.process.state.sums.sums))
    for raw, clipped in zip(*sums, strict=True):
        assert raw.any()
        assert torch.equal(raw, clipped)


def test_lbfgs_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(HessoError, match="LBFGS"):
        hesso(model, Schedule(1, 2, 1, 6), lambda m: torch.optim.LBFGS(m.parameters()))


def test_added_parameters_are_trained_and_the_groups_are_shared() -> None:
    model = tiny_llama()
    optimizer = hesso(model, Schedule(1, 2, 1, 6))
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.param_groups is optimizer.base.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 0.5]
    for batch in token_batches(4):
        backward(model, batch)
        extra.grad = torch.tensor([1.0, -1.0, 0.0])
        optimizer.step()
    assert extra[0] < 0 < 1 < extra[1]
    assert optimizer.process.finished
    optimizer.zero_grad()
    assert extra.grad is None
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [extra]})


def test_state_that_the_base_optimizer_had_is_kept() -> None:
    model = tiny_llama()
    base = adamw(model)
    backward(model, token_batches(1)[0])
    base.step()
    state = base.state
    optimizer = HessoOptimizer(base, process_for(model, KEPT, Schedule(1, 2, 1, 6)))
    assert optimizer.state is base.state is state
    assert len(state) == len(list(model.parameters()))


# -- saving and loading -----------------------------------------------------------------------------------------------

RESUMED = Schedule(warmup_steps=3, pruning_steps=7, pruning_periods=2, total_steps=14)  # periods of 3 and 4 steps


def saved_and_loaded(state: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(model: PreTrainedModel, optimizer: HessoOptimizer, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        backward(model, batch)
        optimizer.step()


@pytest.mark.parametrize(
    ("stop", "where"), [(2, "warm-up"), (5, "mid-period"), (6, "a period's end"), (8, "mid-period"), (12, "the end")]
)
@pytest.mark.parametrize("layer_widths", ["uniform", "per_layer"])
def test_an_interrupted_run_equals_an_uninterrupted_one(stop: int, where: str, layer_widths: str) -> None:
    batches = token_batches(RESUMED.total_steps)
    config = {"saliency": MIX, "saliency_batches": 3, "layer_widths": layer_widths}
    model = tiny_llama()
    optimizer = hesso(model, RESUMED, **config)
    run(model, optimizer, batches[:stop])
    weights, state = saved_and_loaded((model.state_dict(), optimizer.state_dict()))

    resumed = tiny_llama(seed=99)
    # the schedule is resolved once and kept in the state: a resumed run takes it from there
    other = hesso(resumed, Schedule(1, 1, 1, 14), **config)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.process.step == stop
    assert other.process.state.sums.batches == optimizer.process.state.sums.batches
    run(model, optimizer, batches[stop:])
    run(resumed, other, batches[stop:])
    assert parameters_equal(model, resumed)
    assert marked(optimizer.process) == marked(other.process)
    assert other.process.finished
    assert other.process.kept_units() == optimizer.process.kept_units()
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["hesso"].keys() == theirs["hesso"].keys()
    for mine, its in zip(tensors_in(ours), tensors_in(theirs), strict=True):
        assert torch.equal(mine, its)


def test_a_saved_state_holds_only_tensors_and_plain_containers() -> None:
    model = tiny_llama()
    optimizer = hesso(model, RESUMED)
    run(model, optimizer, token_batches(5))
    state = optimizer.state_dict()
    assert state["hesso"]["step"] == 5
    assert saved_and_loaded(state)["hesso"]["schedule"] == RESUMED.to_dict()


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (tiny_llama, {"kept": KEPT | {"mlp_channels": 34}}, "kept_units|sizes"),
        (tiny_llama, {"kept": {"mlp_channels": 33}}, "kept_units"),
        (lambda: tiny_llama(intermediate_size=46), {}, "target"),
        (lambda: tiny_llama(num_hidden_layers=3), {}, "target"),
        (lambda: tiny_llama(attention_bias=False), {}, "target"),
        (tiny_llama, {"saliency": "magnitude"}, "saliency"),
    ],
    ids=["target", "structures", "wider model", "deeper model", "model without biases", "saliency"],
)
def test_a_state_of_another_run_is_refused(make: Any, config: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    optimizer = hesso(model, RESUMED)
    run(model, optimizer, token_batches(4))
    state = saved_and_loaded(optimizer.state_dict())
    other = hesso(make(), RESUMED, **config)
    with pytest.raises(CheckpointMismatchError, match=message):
        other.load_state_dict(state)


def test_a_state_without_pruning_is_refused() -> None:
    model = tiny_llama()
    base = adamw(model)
    backward(model, token_batches(1)[0])
    base.step()
    with pytest.raises(CheckpointMismatchError, match="holds no pruning state"):
        hesso(model, RESUMED).load_state_dict(base.state_dict())


def test_a_state_of_another_format_is_refused() -> None:
    optimizer = hesso(tiny_llama(), RESUMED)
    state = optimizer.state_dict()
    state["hesso"] = {**state["hesso"], "format": 99}
    with pytest.raises(CheckpointMismatchError, match="format 99"):
        optimizer.load_state_dict(state)


# -- gradients that aren't finite -------------------------------------------------------------------------------------


def spoil(model: PreTrainedModel, value: float = float("nan")) -> None:
    """Put one non-finite number into the gradient of a weight that is kept."""
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    gradient[5, gradient[5].abs().argmax()] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 3, 4, 5, 12], ids=["warm-up", "scoring", "mid-period", "its end", "recovery"])
def test_a_non_finite_gradient_skips_the_whole_step(step: int, value: float, caplog: pytest.LogCaptureFixture) -> None:
    batches = token_batches(13)
    model = tiny_llama()
    optimizer = hesso(model, RESUMED)
    run(model, optimizer, batches[:step])
    weights = copy.deepcopy(list(model.parameters()))
    state = [tensor.clone() for tensor in tensors_in(optimizer.state_dict())]
    backward(model, batches[step])
    spoil(model, value)
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert any(f"step {step}" in record.message and "skipped" in record.message for record in caplog.records)
    assert optimizer.process.step == step
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    after = tensors_in(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_skipped_steps_leave_no_trace_in_what_follows() -> None:
    batches = token_batches(RESUMED.total_steps)
    model, twin = tiny_llama(), tiny_llama()
    disturbed, clean = hesso(model, RESUMED), hesso(twin, RESUMED)
    for step, batch in enumerate(batches):
        if step in (0, 2, 3, 6, 7, 9, 12):
            backward(model, batches[-1])
            spoil(model)
            disturbed.step()
        run(model, disturbed, [batch])
        run(twin, clean, [batch])
    assert parameters_equal(model, twin)
    assert marked(disturbed.process) == marked(clean.process)


def test_three_skipped_steps_in_a_row_stop_the_run_and_a_good_one_resets_the_count() -> None:
    model = tiny_llama()
    optimizer = hesso(model, RESUMED)
    batches = token_batches(8)

    def bad_step() -> None:
        backward(model, batches[0])
        spoil(model)
        optimizer.step()

    for _ in range(2):  # two, then a good one: the count starts anew
        bad_step()
        bad_step()
        run(model, optimizer, [batches[1]])
    weights = copy.deepcopy(list(model.parameters()))
    bad_step()
    bad_step()
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row.*step 2"):
        bad_step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert optimizer.process.step == 2


def test_a_reported_gradient_norm_decides() -> None:
    model = tiny_llama()
    optimizer = hesso(model, RESUMED)
    backward(model, token_batches(1)[0])
    optimizer.observe_gradients()
    optimizer.report_gradient_norm(torch.tensor(float("inf")))  # another process had it
    optimizer.step()
    assert optimizer.process.step == 0
    optimizer.step()  # the report held for one step
    assert optimizer.process.step == 1


class FewBits(Optimizer):
    """Momentum in few bits: as a tensor of torchao's kind or, as bitsandbytes has it, as bare codes."""

    def __init__(self, parameters: Any, bare: bool) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.bare = bare

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                old = state["kept"].dequantize() if state else torch.zeros_like(parameter)
                state["kept"] = Codes(0.9 * old + parameter.grad)
                state["momentum"] = state["kept"].codes if self.bare else state["kept"]
                parameter.sub_(state["kept"].dequantize(), alpha=group["lr"])


@pytest.mark.parametrize("bare", [False, True])
def test_optimizer_state_in_few_bits_is_left_alone_and_pruned_units_stay_at_zero(bare: bool) -> None:
    model = tiny_llama()
    units = decoder_units(model)
    schedule = Schedule(warmup_steps=2, pruning_steps=5, pruning_periods=2, total_steps=12)
    optimizer = hesso(model, schedule, lambda model: FewBits(model.parameters(), bare))
    for batch in token_batches(schedule.total_steps):
        backward(model, batch)
        optimizer.step()
        for name, mask in pruned_masks(model, units, optimizer.process).items():
            assert not model.get_parameter(name)[mask].any(), name
    assert optimizer.process.finished
    assert any(mask.any() for mask in pruned_masks(model, units, optimizer.process).values())
