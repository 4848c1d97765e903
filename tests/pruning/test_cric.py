"""CRIC: equal to the slow reference, a path that is really sampled, a return bit for bit, and cycles that end."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hesso_hf.config import SALIENCIES
from hesso_hf.errors import HessoError
from hesso_hf.pruning.cric_state import Cric
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.pruning.weights.holdings import Holdings
from tests.support.reference import (
    GEMMA2_NORMS,
    LLAMA_NORMS,
    Key,
    ReferenceCric,
    Structures,
    decoder_units,
    flat_weights,
    fused_units,
)
from tests.support.tiny import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    QUERIES,
    UNITS,
    backward,
    process_for,
    tiny_gemma2,
    tiny_llama,
    tiny_phi3,
    token_batches,
)

ALONE = {"attention_heads": 1, "mlp_channels": 33, "embedding_channels": 54}  # the last stays a multiple of 6 heads
KEPT = {"attention_heads": 1, "mlp_channels": 33, "embedding_channels": 52}  # 2, 11 and 8 of 3, 44 and 60 go
KEPT_BY_WIDTHS = {"uniform": KEPT, "per_layer": ALONE}  # in the second the config keeps all heads
MIX = {"magnitude": 0.5, "cosine_similarity": 1.0, "taylor_first_order": 0.25, "taylor_second_order": 2.0}
OptimizerFactory = Callable[[PreTrainedModel], Optimizer]


def adamw(model: PreTrainedModel) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)


def sgd_momentum(model: PreTrainedModel) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def still(model: PreTrainedModel) -> Optimizer:
    """Moves nothing, so that the way to zero shows alone."""
    return SGD(model.parameters(), lr=0.0)


def path(warmup: int, steps: int, cycles: int, pruning: int = 4, periods: int = 2, rest: int = 1) -> Schedule:
    total = warmup + steps * cycles + pruning + rest
    return Schedule(warmup, pruning, periods, total, cycle_steps=steps, cycles=cycles)


def cric(
    model: PreTrainedModel,
    schedule: Schedule,
    make: OptimizerFactory = adamw,
    kept: dict[str, int] | None = None,
    **config: Any,
) -> HessoOptimizer:
    config = {"cric": True, "cric_tolerance": 0, **config}
    kept = kept or KEPT_BY_WIDTHS[config.get("layer_widths", "uniform")]
    return HessoOptimizer(make(model), process_for(model, kept, schedule, **config))


def run(model: PreTrainedModel, optimizer: HessoOptimizer, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        backward(model, batch)
        optimizer.step()


def keys_of(flags: dict[str, torch.Tensor]) -> set[Key]:
    return {(name, layer, j) for name, flag in flags.items() for layer, j in flag.nonzero().tolist()}


def pruned_in(optimizer: HessoOptimizer) -> set[Key]:
    return keys_of({name: scales == 0 for name, scales in optimizer.process.scales.items()})


def state_of(optimizer: HessoOptimizer) -> Cric:
    assert optimizer.process.trial is not None
    return optimizer.process.trial.cric


def parameters_equal(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from tensors_in(item)


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


# -- fast against slow ------------------------------------------------------------------------------------------------


def assert_equals_reference(
    model: PreTrainedModel,
    units: Structures,
    schedule: Schedule,
    make: OptimizerFactory = adamw,
    kept: dict[str, int] | None = None,
    least_cycles: int = 2,
    **config: Any,
) -> ReferenceCric:
    """Run both step by step and compare the sets of every cycle, the decision, the weights and the marks."""
    config = {"saliency_batches": 2, "cric_tolerance": 0, **config}
    kept = kept or KEPT_BY_WIDTHS[config.get("layer_widths", "uniform")]
    twin = copy.deepcopy(model)
    fast = cric(model, schedule, make, kept, **config)
    slow = ReferenceCric(
        twin,
        make(twin),
        units,
        {name: len(units[name][0]) - count for name, count in kept.items()},
        schedule.warmup_steps,
        schedule.pruning_steps,
        schedule.pruning_periods,
        fast.process.config.saliency_weights,
        config["saliency_batches"],
        across_layers=config.get("layer_widths") == "per_layer",
        kv_heads=KV_HEADS,
        cycle_steps=schedule.cycle_steps,
        max_cycles=schedule.cycles,
        tolerance=config["cric_tolerance"],
    )
    state = state_of(fast)
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        backward(model, batch)
        backward(twin, batch)
        fast.step()
        slow.step()
        assert state.cycles == len(slow.violating), f"step {step}"
        if slow.violating:
            assert keys_of(state.violating) == slow.violating[-1], f"step {step}"
            assert keys_of(state.shrinking) == slow.shrinking[-1], f"step {step}"
            assert keys_of(state.entering) == slow.waiting, f"step {step}"
        assert state.ended == (slow.decided is not None), f"step {step}"
        assert (keys_of(fast.process.redundant), pruned_in(fast)) == (slow.redundant, slow.pruned), f"step {step}"
        for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda m, n=name, s=step: f"{s} {n} {m}")
    assert keys_of(state.first) == slow.violating[0]
    assert keys_of(state.decided) == slow.decided == slow.pruned
    assert state.num_samples == len(slow.samples)
    assert len(slow.violating) >= least_cycles
    means = state.means()
    for index, (criterion, expected_means) in enumerate(slow.means().items()):
        largest = max(abs(value) for value in expected_means.values())
        for (name, layer, j), value in expected_means.items():
            found_mean = float(means[name][index, layer, j])
            assert found_mean == pytest.approx(value, rel=1e-3, abs=1e-6 * largest), (criterion, name, layer, j)
    return slow


def test_every_step_equals_the_reference() -> None:
    model = tiny_llama()
    slow = assert_equals_reference(model, decoder_units(model), path(2, 3, 3))
    assert slow.decided != slow.violating[0]  # something was corrected, so the test compares more than HESSO


@pytest.mark.parametrize("saliency", [*SALIENCIES, MIX], ids=lambda s: s if isinstance(s, str) else "mix")
def test_every_step_equals_the_reference_for_every_criterion(saliency: Any) -> None:
    model = tiny_llama()
    least = 1 if "magnitude" in saliency else 2
    assert_equals_reference(model, decoder_units(model), path(1, 3, 3), least_cycles=least, saliency=saliency)


def test_every_step_equals_the_reference_with_momentum() -> None:
    model = tiny_llama()
    assert_equals_reference(model, decoder_units(model), path(1, 4, 3, pruning=5, periods=2), sgd_momentum)


@pytest.mark.parametrize("make", [adamw, sgd_momentum])
def test_every_step_equals_the_reference_across_layers(make: OptimizerFactory) -> None:
    model = tiny_llama(num_hidden_layers=3)
    assert_equals_reference(model, decoder_units(model), path(1, 3, 3), make, layer_widths="per_layer")


def test_every_step_equals_the_reference_across_layers_with_a_mix() -> None:
    model = tiny_llama()
    saliency = {"avg_magnitude": 0.3, "taylor_first_order": 1.0, "cosine_similarity": 0.2}
    assert_equals_reference(model, decoder_units(model), path(2, 2, 4), layer_widths="per_layer", saliency=saliency)


def test_every_step_equals_the_reference_where_norms_are_used_as_one_plus_w() -> None:
    model = tiny_gemma2()
    units = decoder_units(model, GEMMA2_NORMS, norm_offset=1.0)
    assert_equals_reference(model, units, path(1, 3, 2))


def test_every_step_equals_the_reference_with_fused_projections() -> None:
    model = tiny_phi3()
    assert_equals_reference(model, fused_units(model), path(1, 3, 2))


def test_every_step_equals_the_reference_without_warm_up_and_with_frozen_weights() -> None:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" not in name and "embed" not in name)
    assert_equals_reference(model, decoder_units(model, LLAMA_NORMS), path(0, 3, 2))


def test_every_step_equals_the_reference_where_a_tolerance_ends_the_search_early() -> None:
    model = tiny_llama()
    schedule = path(1, 3, 4)
    slow = assert_equals_reference(model, decoder_units(model), schedule, cric_tolerance=0.75)
    assert 1 < len(slow.violating) < schedule.cycles


@pytest.mark.parametrize("make", [adamw, sgd_momentum])
@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_every_step_equals_the_reference_for_query_heads(widths: str, make: OptimizerFactory) -> None:
    model = tiny_llama(num_attention_heads=QUERIES, num_hidden_layers=3)
    kept = {"query_heads": 6, "mlp_channels": 33}  # 2 of 4 for each of 3 key-value heads
    slow = assert_equals_reference(model, decoder_units(model), path(1, 3, 3), make, kept, layer_widths=widths)
    for decided in (slow.decided, slow.violating[0], *slow.shrinking):
        gone = [(layer, unit // 4) for name, layer, unit in decided or () if name == "query_heads"]
        for layer in range(3):
            assert len({gone.count((layer, kv_head)) for kv_head in range(KV_HEADS)}) == 1
    if widths == "uniform":
        assert slow.decided != slow.violating[0]  # something was corrected


# -- heads ------------------------------------------------------------------------------------------------------------


def test_attention_heads_take_part() -> None:
    model = tiny_llama()
    optimizer = cric(model, path(1, 3, 2), kept={"attention_heads": 1})
    run(model, optimizer, token_batches(12))
    report = optimizer.process.cric_report()
    assert report is not None
    assert report["structures"]["attention_heads"]["first"] == 2 * 2
    assert optimizer.process.finished
    assert (optimizer.process.scales["attention_heads"] == 0).sum(1).tolist() == [2, 2]


def test_a_violating_head_shrinks_as_a_whole_and_alone() -> None:
    """A KV head goes with the q rows and o columns of all its query heads, biases included."""
    model = tiny_llama()
    optimizer = cric(model, path(0, 4, 1), still, {"attention_heads": 2})
    before = copy.deepcopy(model.state_dict())
    for step, batch in enumerate(token_batches(3)):
        backward(model, batch)
        optimizer.step()
        left, group = (4 - step - 1) / 4, HEADS // KV_HEADS
        expected = copy.deepcopy(before)
        for layer, violating in enumerate(state_of(optimizer).violating["attention_heads"]):
            (head,) = violating.nonzero().flatten().tolist()
            kv = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            queries = slice(head * group * HEAD_DIM, (head + 1) * group * HEAD_DIM)
            prefix = f"model.layers.{layer}.self_attn."
            for name, rows in (("q_proj", queries), ("k_proj", kv), ("v_proj", kv)):
                expected[f"{prefix}{name}.weight"][rows] *= left
                expected[f"{prefix}{name}.bias"][rows] *= left
            expected[f"{prefix}o_proj.weight"][:, queries] *= left
        for name, value in model.state_dict().items():
            touched = expected[name] != before[name]
            assert torch.equal(value[~touched], before[name][~touched]), name
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["path", "probe"])
def test_useless_heads_end_among_the_removed(mode: str) -> None:
    model = tiny_llama()
    useless = {("attention_heads", 0, 1), ("attention_heads", 1, 2)}
    with torch.no_grad():
        for _, layer, head in useless:
            attention = model.model.layers[layer].self_attn
            for name in ("weight", "bias"):
                getattr(attention.v_proj, name).view(KV_HEADS, HEAD_DIM, -1)[head] *= 1e-3
    if mode == "path":
        optimizer = cric(model, path(1, 4, 3), kept={"attention_heads": 2})
    else:
        optimizer = cric(model, Schedule(1, 4, 2, 8), kept={"attention_heads": 2}, cric_mode="probe")
    for batch in token_batches(20):
        optimizer.probe(losses_of(model, [batch]))
        run(model, optimizer, [batch])
    assert optimizer.process.finished
    assert pruned_in(optimizer) == useless


# -- the way to zero --------------------------------------------------------------------------------------------------


class ForwardWeights:
    """Copies of all weights as they stand at each forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        model.register_forward_pre_hook(lambda *_: self.seen.append(copy.deepcopy(model.state_dict())))


@pytest.mark.parametrize("structure", list(UNITS))
def test_each_shrinking_unit_is_sampled_at_equal_steps_on_its_way(structure: str) -> None:
    model = tiny_llama()
    units = decoder_units(model)[structure]
    schedule = path(2, 4, 3)
    optimizer = cric(model, schedule, still, {structure: ALONE[structure]})
    forward = ForwardWeights(model)
    shrinking: dict[int, set[Key]] = {}
    for batch in token_batches(schedule.total_steps):
        backward(model, batch)
        optimizer.step()
        cycles = state_of(optimizer).cycles
        if not state_of(optimizer).ended:
            shrinking[cycles - 1] = keys_of(state_of(optimizer).shrinking)
    shrinking.pop(-1)  # the warm-up
    assert len(shrinking) > 1

    def norm(step: int, key: Key) -> float:
        weights = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in forward.seen[step].items()}
        return float(flat_weights(weights, units[key[1]][key[2]]).norm())

    for cycle, keys in shrinking.items():
        assert len(keys) == (UNITS[structure] - ALONE[structure]) * len(units)
        for key in keys:
            full = norm(2, key)
            assert full > 0
            for t in range(4):
                expected = full * (4 - t) / 4
                assert norm(2 + 4 * cycle + t, key) == pytest.approx(expected, rel=1e-6), (cycle, t, key)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
def test_shared_elements_shrink_with_every_structure_that_they_belong_to(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    offset = 1.0 if make is tiny_gemma2 else 0.0
    units = decoder_units(model, GEMMA2_NORMS if offset else LLAMA_NORMS, norm_offset=offset)
    optimizer = cric(model, path(1, 5, 1), still)
    forward = ForwardWeights(model)
    run(model, optimizer, token_batches(2))
    counts = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    offsets = dict.fromkeys(counts, 0.0)
    for name, layer, j in keys_of(state_of(optimizer).shrinking):
        for piece in units[name][layer][j]:
            counts[piece.parameter].index_add_(
                piece.dim,
                torch.tensor(piece.indices),
                torch.ones_like(counts[piece.parameter].index_select(piece.dim, torch.tensor(piece.indices))),
            )
            offsets[piece.parameter] = piece.offset
    run(model, optimizer, token_batches(4))
    assert max(int(count.max()) for count in counts.values()) == 2
    for t, weights in enumerate(forward.seen[1:6]):
        for name, _ in model.named_parameters():
            full = forward.seen[0][name] + offsets[name]
            expected = full * ((5 - t) / 5) ** counts[name] - offsets[name]
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)
    assert parameters_equal(model, model_with(make(), forward.seen[0]))


def model_with(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model.load_state_dict(weights)
    return model


def test_signed_values_along_the_path_add_up_to_the_rise_of_the_loss() -> None:
    """Integrated gradients; with the weights that are left instead of the whole way, it would be something else."""
    model = tiny_llama()
    (batch,) = token_batches(1, shape=(4, 16))
    trained = AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):  # removing units costs then, and not each at every point
        backward(model, batch)
        trained.step()
    samples, criterion = 150, "taylor_first_order"
    optimizer = cric(model, path(0, samples, 1), still, saliency=criterion)
    original = copy.deepcopy(model.state_dict())
    loss_before = loss_of(model, batch)
    masks: dict[str, dict[str, torch.Tensor]] = {}
    units, naive = decoder_units(model), 0.0
    for step in range(samples):
        backward(model, batch)
        for of_structure in masks.values():
            for name, parameter in model.named_parameters():
                if name in of_structure:
                    assert parameter.grad is not None
                    naive -= float((parameter.detach() * parameter.grad)[of_structure[name]].double().sum()) / samples
        optimizer.step()
        if step == 0:
            for structure, layer, j in keys_of(state_of(optimizer).first):
                for piece in units[structure][layer][j]:
                    of_structure = masks.setdefault(structure, {})
                    parameter = dict(model.named_parameters())[piece.parameter]
                    mask = of_structure.setdefault(piece.parameter, torch.zeros_like(parameter, dtype=torch.bool))
                    mask.index_fill_(piece.dim, torch.tensor(piece.indices), True)
    state = state_of(optimizer)
    assert state.cycles == 1
    assert state.ended
    found = sum(float(values[0][state.first[name]].sum()) for name, values in state.means().items())
    assert parameters_equal(model, model_with(tiny_llama(), original))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for of_structure in masks.values():
                if name in of_structure:
                    parameter[of_structure[name]] = 0.0
    rise = loss_of(model, batch) - loss_before
    assert rise > 0.1
    assert found == pytest.approx(rise, rel=0.02)
    assert abs(naive - rise) > 0.2 * rise


@torch.no_grad()
def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> float:
    return float(model(input_ids=batch, labels=batch).loss)


# -- the return -------------------------------------------------------------------------------------------------------


def random_digest() -> str:
    """Hash of the state of all three generators."""
    words = np.random.get_state(legacy=True)
    data = repr(random.getstate()).encode() + repr(words[2:]).encode() + np.asarray(words[1]).tobytes()
    return hashlib.sha256(data + torch.get_rng_state().numpy().tobytes()).hexdigest()


def digest(value: Any) -> str:
    """Hash of everything in nested containers, bit for bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, item in part.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(part, list | tuple):
            found.update(f"{type(part).__name__}{len(part)}".encode())
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


def run_digest(model: PreTrainedModel, optimizer: Optimizer) -> tuple[str, str, str]:
    """Hashes of weights, of the optimizer state by parameter and of the random state."""
    state = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return digest(dict(model.named_parameters())), digest(state), random_digest()


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("make", [adamw, sgd_momentum])
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_after_every_cycle_all_is_as_at_the_snapshot(make: OptimizerFactory, warmup: int, where: str) -> None:
    model = tiny_llama(attention_dropout=0.1)
    model.train()
    schedule = path(warmup, 3, 3)
    optimizer = cric(model, schedule, make, cric_snapshot=where)
    expected, returns = None, 0
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        random.random()
        np.random.rand(3)
        torch.rand(2)
        backward(model, batch)
        if step == warmup:
            expected = run_digest(model, optimizer)
            assert bool(optimizer.state) == bool(warmup)
        ended = state_of(optimizer).ended
        optimizer.step()
        position = schedule.sampling_step(step)
        if position is None or ended:
            continue
        found = run_digest(model, optimizer)
        if position.last:
            assert found == expected, f"step {step}"
            returns += 1
        else:
            assert expected is not None
            assert all(mine != its for mine, its in zip(found[:2], expected[:2], strict=True))
    assert returns > 1


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_frozen_weights_shrink_and_return(where: str) -> None:
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("v_proj" not in name and "gate_proj" not in name)
    optimizer = cric(model, path(1, 3, 1), cric_snapshot=where)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    before = digest(frozen)
    for step, batch in enumerate(token_batches(4)):
        run(model, optimizer, [batch])
        assert (digest(frozen) == before) == (step in (0, 3)), f"step {step}"


def test_the_snapshot_on_the_cpu_and_on_the_device_give_equal_results() -> None:
    states = []
    for where in ("cpu", "device"):
        model = tiny_llama()
        schedule = path(1, 3, 3)
        optimizer = cric(model, schedule, cric_snapshot=where)
        run(model, optimizer, token_batches(schedule.total_steps))
        states.append((digest(dict(model.named_parameters())), digest(optimizer.state_dict()), pruned_in(optimizer)))
    assert states[0] == states[1]


class Nested(Optimizer):
    """State in nested containers and python numbers, some of it replaced and some changed in place at every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["parts"] = {"sum": torch.zeros_like(parameter), "rows": [torch.zeros(2), 0, (1.5, "a")]}
                    state["count"], state["flag"] = 0, None
                state["parts"]["sum"] += 1
                state["parts"]["rows"][0] += 2
                state["parts"]["rows"][1] += 1
                state["count"] += 1
                state["flag"] = "seen" if state["count"] > 2 else None
                parameter -= 0.1


@pytest.mark.parametrize("on_cpu", [True, False])
def test_nested_optimizer_state_returns(on_cpu: bool) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4).bfloat16())]
    optimizer = Nested(parameters)
    optimizer.step()
    snapshot = Holdings(parameters).snapshot(optimizer, parameters, on_cpu)
    expected = digest([parameters, [optimizer.state[p] for p in parameters]])
    for emptied in (True, False):  # the copies aren't handed out: a second trial doesn't change them
        for _ in range(3):
            optimizer.step()
        assert digest([parameters, [optimizer.state[p] for p in parameters]]) != expected
        if emptied:
            optimizer.state.clear()
        snapshot.restore()
        assert digest([parameters, [optimizer.state[p] for p in parameters]]) == expected
    copies = snapshot.state_dict()
    found = [value for value in tree_leaves([copies["weights"], copies["state"]]) if isinstance(value, torch.Tensor)]
    size = sum(value.numel() * value.element_size() for value in found)
    assert size == sum(p.numel() * p.element_size() * 2 for p in parameters) + 2 * 2 * 4


@pytest.mark.parametrize("make", [AdamW, Nested])
def test_state_that_was_not_there_at_the_snapshot_is_gone_after_the_return(make: Any) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = make([parameter])
    snapshot = Holdings([parameter]).snapshot(optimizer, [parameter], on_cpu=True)
    assert parameter not in optimizer.state
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter in optimizer.state
    snapshot.restore()
    assert parameter not in optimizer.state


def test_swapping_weights_twice_changes_nothing() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4).bfloat16())]
    snapshot = Holdings(parameters).snapshot(SGD(parameters[:1]), parameters, on_cpu=True)
    origin = digest(parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1
    moved = digest(parameters)
    snapshot.swap_weights()
    assert digest(parameters) == origin
    assert digest([snapshot.weights_of(parameter) for parameter in parameters]) == moved
    snapshot.swap_weights()
    assert digest(parameters) == moved
    assert digest([snapshot.weights_of(parameter) for parameter in parameters]) == origin


def test_a_snapshot_survives_being_saved() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 2))]
    optimizer = Nested(parameters)
    optimizer.step()
    random.gauss(0, 1)  # leaves a value for the next call
    snapshot = Holdings(parameters).snapshot(optimizer, parameters, on_cpu=True)
    expected = digest([parameters, optimizer.state[parameters[0]]]), random_digest()
    data = saved(snapshot.state_dict())
    random.random()
    np.random.normal()
    torch.rand(1)
    optimizer.step()
    other = Holdings(parameters).snapshot(optimizer, parameters, on_cpu=True)
    other.load_state_dict(loaded(data))
    other.restore()
    assert (digest([parameters, optimizer.state[parameters[0]]]), random_digest()) == expected


# -- cycles end -------------------------------------------------------------------------------------------------------


def always_new_units(optimizer: HessoOptimizer) -> list[int]:
    """Replace the scores: each time they are asked for, the next units in turn are the lowest."""
    calls = [0]

    def combine(values: dict[str, torch.Tensor], kept: Any = None) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in values.items():
            units = value.shape[-1]
            order = (torch.arange(units, dtype=value.dtype) - 3 * calls[0]) % units
            found[name] = order.expand(value.shape[1:]).clone()
        calls[0] += 1
        return found

    optimizer.process.run.ranking.combine = combine  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_cycles_end_where_every_scoring_names_new_units(cycles: int) -> None:
    model = tiny_llama()
    schedule = path(1, 2, cycles)
    optimizer = cric(model, schedule, kept={"mlp_channels": 40})  # 4 of 44 a layer
    always_new_units(optimizer)
    history: list[set[Key]] = []
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        assert optimizer.process.schedule.phase(step) == schedule.phase(step)
        run(model, optimizer, [batch])
        state = state_of(optimizer)
        assert state.ended == (step >= 2 * cycles)
        if len(history) < state.cycles:
            history.append(keys_of(state.violating))
            shrinking = keys_of(state.shrinking)
            assert history[-1] <= shrinking
            assert len(shrinking) == 4 * 2
        assert not keys_of(state.entering) & set().union(*history)
    assert len(history) == cycles
    assert sum(map(len, history)) == len(set().union(*history))  # a unit is violating at most once
    assert all(len(violating) == 4 * 2 for violating in history)
    assert optimizer.process.finished
    assert optimizer.process.schedule.sampling_end == 1 + 2 * cycles
    assert len(pruned_in(optimizer)) == 4 * 2


def test_periods_begin_at_once_where_few_newcomers_are_tolerated() -> None:
    model = tiny_llama()
    schedule = path(1, 2, 4)
    optimizer = cric(model, schedule, kept={"mlp_channels": 40}, cric_tolerance=1000)
    always_new_units(optimizer)
    run(model, optimizer, token_batches(3))
    assert state_of(optimizer).ended
    assert [optimizer.process.schedule.phase(step) for step in range(8)] == (
        ["warmup"] + ["sampling"] * 2 + ["pruning"] * 4 + ["recovery"]
    )
    assert not pruned_in(optimizer)
    run(model, optimizer, token_batches(2))
    assert len(pruned_in(optimizer)) == 2 * 2
    run(model, optimizer, token_batches(2))
    assert len(pruned_in(optimizer)) == 4 * 2
    assert optimizer.process.finished


@pytest.mark.parametrize(
    ("tolerance", "allowed"), [(0, 0), (0.1, 0), (0.25, 2), (0.5, 4), (0.99, 7), (1, 1), (3.0, 3), (7, 7)]
)
def test_the_tolerance_is_a_count_or_a_share_of_all_that_go(tolerance: float, allowed: int) -> None:
    for newcomers in range(10):
        state = Cric({"a": (2, 10), "b": (1, 5)}, {"a": 8, "b": 8}, 1, 2, 9, tolerance, torch.device("cpu"))
        none = {"a": torch.zeros(2, 10, dtype=torch.bool), "b": torch.zeros(1, 5, dtype=torch.bool)}
        first = {"a": none["a"].clone(), "b": none["b"]}
        first["a"][1, 5:] = True
        lowest = {"a": none["a"].clone(), "b": none["b"]}
        lowest["a"].view(-1)[:newcomers] = True
        state.begin_cycle(first, first)
        values = {"a": torch.zeros(1, 2, 10), "b": torch.zeros(1, 1, 5)}
        state.record(0, values, lowest)
        state.record(1, values, first)
        assert state.end_cycle() == (newcomers <= allowed), newcomers


def test_later_marks_go_by_the_decision_alone() -> None:
    """After period p, round(K * (p + 1) / P) units are at zero, and at the end those that CRIC decided on."""
    model = tiny_llama()
    schedule = path(1, 3, 2, pruning=9, periods=3)
    optimizer = cric(model, schedule, kept={"mlp_channels": 33, "attention_heads": 1})
    counts, decided = [], set()
    for batch in token_batches(schedule.total_steps):
        run(model, optimizer, [batch])
        if state_of(optimizer).ended:
            decided = decided or keys_of(state_of(optimizer).decided)
            assert keys_of(optimizer.process.redundant) | pruned_in(optimizer) <= decided
        if optimizer.process.period_ended:
            counts.append({name: (s == 0).sum(1).tolist() for name, s in optimizer.process.scales.items()})
    assert [count["mlp_channels"] for count in counts] == [[4, 4], [7, 7], [11, 11]]
    assert [count["attention_heads"] for count in counts] == [[1, 1], [1, 1], [2, 2]]
    assert pruned_in(optimizer) == decided


# -- steps that are special -------------------------------------------------------------------------------------------


def test_skipped_steps_while_sampling_leave_no_trace() -> None:
    schedule = path(1, 3, 2)
    batches = token_batches(schedule.total_steps)
    states = []
    for spoiled in (set(), {1, 2, 6}):
        model = tiny_llama()
        optimizer = cric(model, schedule)
        for step, batch in enumerate(batches):
            if step in spoiled:
                backward(model, batch)
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(float("nan"))
                optimizer.step()
            run(model, optimizer, [batch])
        states.append((digest(dict(model.named_parameters())), digest(optimizer.state_dict())))
    assert states[0] == states[1]


def test_samples_are_of_the_gradient_before_clipping() -> None:
    states = []
    for clips in (False, True):
        model = tiny_llama()
        optimizer = cric(model, path(1, 3, 2), still)
        for batch in token_batches(7):
            backward(model, batch)
            if clips:
                optimizer.observe_gradients()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        states.append(digest(state_of(optimizer).state_dict()))
    assert states[0] == states[1]


# -- memory and saved state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saliency", ["taylor_second_order", MIX], ids=["one", "mix"])
def test_memory_is_of_the_order_of_the_units(saliency: Any) -> None:
    sizes = []
    for steps, cycles in ((4, 1), (9, 3)):
        model = tiny_llama()
        schedule = path(1, steps, cycles)
        optimizer = cric(model, schedule, saliency=saliency)
        run(model, optimizer, token_batches(1 + steps * cycles - 1))
        state = state_of(optimizer).state_dict()
        units = {name: scales.numel() for name, scales in optimizer.process.scales.items()}
        criteria = len(optimizer.process.config.saliency_weights)
        sizes.append(sorted(tensor.numel() for tensor in tensors_in(state)))
        for value in state.values():
            for name, count in units.items():
                if isinstance(value, dict):
                    assert value[name].numel() <= criteria * 4 * count
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("layer_widths", "tolerance"), [("uniform", 0.75), ("per_layer", 0)])
def test_a_run_interrupted_anywhere_equals_an_uninterrupted_one(layer_widths: str, tolerance: float) -> None:
    schedule = path(1, 3, 4, pruning=2, periods=1)
    config = {"saliency_batches": 2, "layer_widths": layer_widths, "cric_tolerance": tolerance}
    batches = token_batches(schedule.total_steps)

    def trained(model: PreTrainedModel, optimizer: HessoOptimizer, batch: torch.Tensor) -> None:
        model.train()
        random.random()
        np.random.rand()
        run(model, optimizer, [batch])

    torch.manual_seed(3)
    model = tiny_llama(attention_dropout=0.1)
    optimizer = cric(model, schedule, **config)
    stops = []
    for batch in batches:
        randomness = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        stops.append((saved((model.state_dict(), optimizer.state_dict())), randomness))
        trained(model, optimizer, batch)
    expected = digest(dict(model.named_parameters())), digest(optimizer.state_dict()), random_digest()
    for stop, (data, randomness) in enumerate(stops):
        weights, state = loaded(data)
        resumed = tiny_llama(seed=99, attention_dropout=0.1)
        other = cric(resumed, schedule, **config)
        resumed.load_state_dict(weights)
        other.load_state_dict(state)
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])
        torch.set_rng_state(randomness[2])
        for batch in batches[stop:]:
            trained(resumed, other, batch)
        assert digest(dict(resumed.named_parameters())) == expected[0], f"stop {stop}"
        assert digest(other.state_dict()) == expected[1], f"stop {stop}"
        assert random_digest() == expected[2], f"stop {stop}"
        assert other.process.finished


@pytest.mark.parametrize("stop", [2, 6, 10, 11])
def test_the_report_of_an_interrupted_run_is_that_of_an_uninterrupted_one(stop: int) -> None:
    schedule = path(1, 3, 4, pruning=2, periods=1)
    config = {"cric_tolerance": 0.75, "saliency_batches": 2}
    batches = token_batches(schedule.total_steps)
    model, resumed = tiny_llama(), tiny_llama(seed=99)
    optimizer, other = cric(model, schedule, **config), cric(resumed, schedule, **config)
    run(model, optimizer, batches[:stop])
    weights, state = loaded(saved((model.state_dict(), optimizer.state_dict())))
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    run(model, optimizer, batches[stop:])
    run(resumed, other, batches[stop:])
    report = optimizer.process.cric_report()
    assert report is not None
    assert report["cycles"] < schedule.cycles
    assert report["max_cycles"] == schedule.cycles
    assert other.process.cric_report() == report


# -- probing ----------------------------------------------------------------------------------------------------------


def losses_of(model: PreTrainedModel, batches: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    return [lambda batch=batch: model(input_ids=batch, labels=batch).loss for batch in batches]  # type: ignore[misc]


PROBED = Schedule(2, 4, 2, 9)


def probing(model: PreTrainedModel, make: OptimizerFactory = adamw, **config: Any) -> HessoOptimizer:
    config = {"cric_sampling_steps": 3, "cric_max_cycles": 3, **config}
    return cric(model, PROBED, make, cric_mode="probe", **config)


@pytest.mark.parametrize("kept", [KEPT, {"mlp_channels": 33}], ids=["all", "mlp"])
def test_probing_leaves_weights_and_state_as_they_were(kept: dict[str, int]) -> None:
    model = tiny_llama()
    optimizer = probing(model, kept=kept)
    for step, batch in enumerate(token_batches(PROBED.total_steps)):
        assert optimizer.process.wants_probe == (step == 2)
        if optimizer.process.wants_probe:
            backward(model, batch)
            before = run_digest(model, optimizer)
            optimizer.probe(losses_of(model, token_batches(2, seed=11)))
            assert run_digest(model, optimizer) == before
            assert all(parameter.grad is None for parameter in model.parameters())
            assert not optimizer.process.wants_probe
        run(model, optimizer, [batch])
    report = optimizer.process.cric_report()
    assert report is not None
    assert report["mode"] == "probe"
    assert report["cycles"] > 1
    assert report["samples"] == 3 * report["cycles"]
    assert optimizer.process.finished
    assert pruned_in(optimizer) == keys_of(state_of(optimizer).decided)


def test_probing_restores_the_weights_where_a_loss_fails() -> None:
    model = tiny_llama()
    optimizer = probing(model)
    run(model, optimizer, token_batches(2))
    before = digest(dict(model.named_parameters()))
    good, calls = losses_of(model, token_batches(1))[0], [0]

    def failing() -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:  # the first point on the way
            raise MemoryError
        return good()

    with pytest.raises(MemoryError):
        optimizer.probe([failing])
    assert digest(dict(model.named_parameters())) == before


def test_probing_may_be_tried_again_after_a_loss_failed() -> None:
    reports = []
    for fails in (False, True):
        model = tiny_llama()
        optimizer = probing(model)
        run(model, optimizer, token_batches(2))
        good, calls = losses_of(model, token_batches(1))[0], [0]

        def failing(good: Any = good, calls: list[int] = calls) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError
            return good()

        if fails:
            with pytest.raises(MemoryError):
                optimizer.probe([failing])
        optimizer.probe([good])
        reports.append(optimizer.process.cric_report())
    assert reports[0] == reports[1]


def test_pruning_without_having_probed_is_refused() -> None:
    model = tiny_llama()
    optimizer = probing(model)
    run(model, optimizer, token_batches(2))
    with pytest.raises(HessoError, match=r"optimizer\.probe"):
        run(model, optimizer, token_batches(1))


def test_probing_needs_losses_and_asks_for_none_where_it_is_not_wanted() -> None:
    model = tiny_llama()
    optimizer = probing(model)
    optimizer.probe([])  # too early: does nothing
    run(model, optimizer, token_batches(2))
    with pytest.raises(HessoError, match="losses"):
        optimizer.probe([])
    assert optimizer.process.wants_probe


def test_probing_equals_the_path_where_training_moves_nothing() -> None:
    model, twin = tiny_llama(), tiny_llama()
    (batch,) = token_batches(1)
    probed = probing(model, still)
    walked = cric(twin, path(2, 3, 3), still)
    run(model, probed, [batch] * 2)
    probed.probe(losses_of(model, [batch, batch]))
    run(twin, walked, [batch] * 11)
    mine, its = state_of(probed), state_of(walked)
    assert mine.sizes == its.sizes
    assert mine.ended == its.ended
    assert mine.ended
    for key in ("first", "violating", "shrinking", "entering", "seen", "decided"):
        assert keys_of(getattr(mine, key)) == keys_of(getattr(its, key)), key
    for found, expected in ((mine.means(), its.means()), (mine._own, its._own)):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9)


def test_probing_averages_over_batches() -> None:
    """At the first point, where nothing has shrunk, all values are those of the mean of the batches."""
    means = []
    batches = token_batches(2)
    for chosen in ([batches[0]], [batches[1]], batches):
        model = tiny_llama()
        optimizer = probing(model, still)
        state, first = state_of(optimizer), []
        record = state.record

        def noted(t: int, values: Any, lowest: Any, record: Any = record, first: Any = first) -> None:
            first.append({name: value.clone() for name, value in values.items()})
            record(t, values, lowest)

        state.record = noted  # type: ignore[method-assign]
        run(model, optimizer, batches)
        optimizer.probe(losses_of(model, chosen))
        means.append(first[0])
    for name, both in means[2].items():
        torch.testing.assert_close(both, (means[0][name] + means[1][name]) / 2, rtol=1e-4, atol=1e-9)


def test_a_run_interrupted_after_probing_equals_an_uninterrupted_one() -> None:
    model, resumed = tiny_llama(), tiny_llama(seed=99)
    optimizer, other = probing(model), probing(resumed)
    batches = token_batches(PROBED.total_steps)
    run(model, optimizer, batches[:2])
    optimizer.probe(losses_of(model, token_batches(2, seed=11)))
    weights, state = loaded(saved((model.state_dict(), optimizer.state_dict())))
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert not other.process.wants_probe
    run(model, optimizer, batches[2:])
    run(resumed, other, batches[2:])
    assert digest(dict(model.named_parameters())) == digest(dict(resumed.named_parameters()))
    assert digest(optimizer.state_dict()) == digest(other.state_dict())
    assert optimizer.process.cric_report() == other.process.cric_report()


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_widths", ["uniform", "per_layer"])
def test_the_report_tells_what_was_corrected(layer_widths: str) -> None:
    model = tiny_llama()
    schedule = path(1, 4, 3)
    optimizer = cric(model, schedule, layer_widths=layer_widths)
    state, sizes = state_of(optimizer), []
    first: set[Key] = set()
    for batch in token_batches(schedule.total_steps):
        run(model, optimizer, [batch])
        first = first or keys_of(state.violating)
        if len(sizes) < state.cycles:
            sizes.append({name: int(units.sum()) for name, units in state.violating.items()})
    report = optimizer.process.cric_report()
    assert report is not None
    assert json.loads(json.dumps(report)) == report
    assert (report["mode"], report["cycles"], report["ended"]) == ("path", len(sizes), True)
    assert (report["samples_per_cycle"], report["samples"]) == (4, 4 * len(sizes))
    assert report["max_cycles"] == 3
    pruned, corrections = pruned_in(optimizer), 0
    assert set(report["structures"]) == set(KEPT)
    for name, found in report["structures"].items():
        layers = 1 if name == "embedding_channels" else 2
        assert found["first"] == (UNITS[name] - KEPT_BY_WIDTHS[layer_widths][name]) * layers
        assert found["violating"] == [size[name] for size in sizes]
        before = {key for key in first if key[0] == name}
        after = {key for key in pruned if key[0] == name}
        corrected, replacing = ({(name, int(k), j) for k, js in found[role].items() for j in js} for role in
                                ("corrected", "replaced_by"))  # fmt: skip
        assert corrected == before - after
        assert replacing == after - before
        assert len(corrected) == len(replacing) == found["num_corrected"]
        corrections += len(corrected)
        for shown in found["paths"]:
            layer = optimizer.process.groups.structures[name].layers.index(shown["layer"])
            key = (name, layer, shown["unit"])
            assert key in (corrected if shown["role"] == "corrected" else replacing)
            for index, values in enumerate(shown["values"].values()):
                assert len(values) == 4
                mean = float(state.means()[name][index, layer, shown["unit"]])
                assert sum(values) / 4 == pytest.approx(mean)
        assert {s["unit"] for s in found["paths"] if s["role"] == "corrected"} == {j for _, _, j in corrected}
    assert corrections


def test_there_is_no_report_without_cric() -> None:
    model = tiny_llama()
    optimizer = HessoOptimizer(adamw(model), process_for(model, KEPT, Schedule(1, 4, 2, 8)))
    assert optimizer.process.cric_report() is None
    assert optimizer.process.on_trial is None
    assert not optimizer.process.wants_probe


def test_the_weights_are_on_trial_only_while_sampling() -> None:
    model = tiny_llama()
    schedule = path(2, 3, 2)
    optimizer = cric(model, schedule)
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        run(model, optimizer, [batch])
        assert (optimizer.process.on_trial is not None) == (2 <= step < 2 + 3 * state_of(optimizer).cycles - 1)


def test_nothing_to_prune_leaves_cric_out() -> None:
    model, twin = tiny_llama(), tiny_llama()
    schedule = path(1, 2, 2)
    optimizer, base = cric(model, schedule, kept={"mlp_channels": UNITS["mlp_channels"]}), adamw(twin)
    for batch in token_batches(schedule.total_steps):
        run(model, optimizer, [batch])
        backward(twin, batch)
        base.step()
    assert parameters_equal(model, twin)
    assert optimizer.process.cric_report() is None


class Counting(torch.optim.SGD):
    """An optimizer that counts its steps in its parameter groups, beside a learning rate that a schedule drives."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 1e-3 / group["k"]
        return super().step(closure)


def test_step_counts_in_parameter_groups_return_and_learning_rates_go_on() -> None:
    model = tiny_llama()
    optimizer = cric(model, path(1, 3, 2), lambda m: Counting([{"params": list(m.parameters()), "k": 0}], lr=1e-3))
    rates = []
    for step, batch in enumerate(token_batches(7)):
        backward(model, batch)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        expected = {3: 1, 6: 1}.get(step)  # the last step of each cycle of three, after one of warm-up
        if expected is not None:
            assert optimizer.param_groups[0]["k"] == expected
    assert rates[3] == pytest.approx(1e-3 / 4)  # the rate stays, as a scheduler would have set it


def test_a_gradient_that_is_not_finite_stops_the_probe_and_leaves_the_weights() -> None:
    model = tiny_llama()
    config = {"cric_mode": "probe", "cric_sampling_steps": 2, "cric_max_cycles": 2}
    optimizer = cric(model, Schedule(0, 2, 1, 6), sgd_momentum, **config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = token_batches(1)[0]

    def broken() -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss * float("nan")

    with pytest.raises(HessoError, match="isn't finite where 100%"):
        optimizer.probe([broken])
    assert optimizer.process.wants_probe
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
