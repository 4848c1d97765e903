"""Pieces of parameters: what is done to several ranges of flattened parameters is what is done to whole ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hesso_hf import HessoConfig
from hesso_hf.distributed.parts import flat_parts
from hesso_hf.engines.deepspeed.ranges import HeldRange
from hesso_hf.pruning.criteria import needed_sums
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.saliency import OnTrial, PathDisplacements, UnitSums
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.pruning.weights.holdings import Holdings
from hesso_hf.pruning.weights.snapshot import Snapshot
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi

TERMS = needed_sums(["cosine_similarity", "taylor_second_order"])
KINDS = {"llama": tiny_llama, "one-plus-w": tiny_gemma2, "layer-norm": tiny_phi}
MODULES = ("bound_groups", "held_axes")  # what adds up over processes


class Range(HeldRange):
    """A range of a flattened parameter, with gradient and optimizer state in flat vectors."""

    def __init__(self, parameter: nn.Parameter, start: int, count: int) -> None:
        super().__init__(parameter, start, count)
        self.place = slice(start, start + count)
        self.flat = parameter.detach().flatten()[self.place].clone()
        self.gradient = parameter.grad.flatten()[self.place].clone()
        self.average = parameter.detach().flatten()[self.place] * 3.0

    def weights(self) -> list[torch.Tensor]:
        return self.pieces(self.flat)

    def gradients(self) -> list[torch.Tensor]:
        return self.pieces(self.gradient)

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        yield self.pieces(self.average)

    def copied(self, snapshot: Any) -> list[torch.Tensor]:
        return self.pieces(snapshot[id(self)])


class Ranges(Holdings):
    """One of two processes; where it begins differs from parameter to parameter."""

    def __init__(self, rank: int) -> None:
        self.sharded, self.rank = True, rank

    def held(self, name: str, parameter: nn.Parameter) -> Range:
        middle = hash_of(name) % (parameter.numel() + 1)
        return Range(parameter, *((0, middle) if self.rank == 0 else (middle, parameter.numel() - middle)))


def hash_of(name: str) -> int:
    return sum(position * ord(letter) for position, letter in enumerate(name, 7))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = KINDS[request.param](seed=5)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture
def groups(model: PreTrainedModel) -> Any:
    return PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.3)).groups


@pytest.fixture
def bound(model: PreTrainedModel, groups: Any) -> tuple[BoundGroups, list[BoundGroups]]:
    parameters = dict(model.named_parameters())
    halves = [BoundGroups(parameters, groups) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.bind(parameters, lambda _, rank=rank: Ranges(rank))
    return BoundGroups(parameters, groups), halves


def per_unit(groups: Any, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(len(g.layers), g.num_units, generator=generator) for n, g in groups.structures.items()}


def together(halves: list[BoundGroups], name: str, attribute: str = "flat") -> torch.Tensor:
    return torch.cat([getattr(half.held[name], attribute) for half in halves]).view(halves[0].held[name].shape)


def assert_weights_equal(whole: BoundGroups, halves: list[BoundGroups], tolerance: float = 0.0) -> None:
    for name, parameter in whole.parameters.items():
        assert (together(halves, name) - parameter.data).abs().max() <= tolerance * parameter.abs().max(), name


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5), (2, 3, 2, 3), (1, 5), (5, 1)])
def test_a_range_of_a_flattened_parameter_is_a_few_rectangles(shape: tuple[int, ...]) -> None:
    length = math.prod(shape)
    values = torch.arange(length).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(length + 1), 2):
        parts = flat_parts(shape, start, stop)
        assert len(parts) <= max(1, 2 * len(shape) - 1)
        found = [values[part.window()].flatten() for part in parts]
        assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *found]), torch.arange(start, stop))


def test_every_range_has_several_pieces_somewhere(bound: Any) -> None:
    _, halves = bound
    assert max(len(held.parts) for half in halves for held in half.held.values()) == 2
    assert any(held.parts[0].starts[-1] for held in halves[1].held.values()), "no range begins within a row"


def test_shrinking_masking_and_routing_are_those_of_whole_parameters(bound: Any, groups: Any) -> None:
    whole, halves = bound
    for each in (whole, *halves):
        each.multiply_(per_unit(groups))
    assert_weights_equal(whole, halves)
    pruned = {name: values > 0.6 for name, values in per_unit(groups, 3).items()}
    for each in (whole, *halves):
        each.mask_weights_(pruned)
        each.mask_gradients_(pruned)
    assert_weights_equal(whole, halves)
    for name, parameter in whole.parameters.items():
        assert torch.equal(together(halves, name, "gradient"), parameter.grad), name


@pytest.mark.parametrize("vectors_only", [False, True])
def test_optimizer_state_is_masked_alike(bound: Any, groups: Any, vectors_only: bool) -> None:
    whole, halves = bound
    state = {p: {"average": p.data * 3.0, "step": torch.tensor(1.0)} for p in whole.parameters.values()}
    pruned = {name: values > 0.6 for name, values in per_unit(groups).items()}
    for each in (whole, *halves):
        each.mask_state_(state, pruned, vectors_only)
    for name, parameter in whole.parameters.items():
        assert torch.equal(together(halves, name, "average"), state[parameter]["average"]), name


@pytest.mark.parametrize("on_trial", [False, True])
def test_sums_of_all_pieces_are_those_of_whole_parameters(bound: Any, groups: Any, on_trial: bool) -> None:
    whole, halves = bound
    shrinking = {name: values > 0.5 for name, values in per_unit(groups).items()}

    def added(each: BoundGroups) -> UnitSums:
        sums = UnitSums.zeros(groups, TERMS, torch.device("cpu"))
        if each.sharded:
            snapshot: Any = {id(held): held.flat * 2.0 for held in each.held.values()}
        else:
            snapshot = Snapshot(each.parameters.values(), None, on_cpu=True)
            for parameter in each.parameters.values():
                snapshot.weights_of(parameter).mul_(2.0)

        def displaced(name: str, axes: Any, part: Any, n: int) -> PathDisplacements:
            return PathDisplacements(each.held[name].copied(snapshot)[n], axes, OnTrial(shrinking, 0.5), part)

        each.accumulate_(sums, displaced if on_trial else None)
        return sums

    expected, parts = added(whole), [added(half) for half in halves]
    for name, terms in expected.sums.items():
        for term, value in terms.items():
            found = sum(part.sums[name][term] for part in parts)
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_norms_and_means_are_added_over_processes(bound: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halves = bound
    marked = {name: values > 0.5 for name, values in per_unit(groups).items()}
    told: list[list[torch.Tensor]] = []

    def first_ask(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        told.append(list(tensors))
        raise InterruptedError

    def exchange(act: Any) -> list[Any]:
        """Let both processes say their part, and then hear the sum."""
        told.clear()
        for module in MODULES:
            monkeypatch.setattr(f"hesso_hf.pruning.weights.{module}.add_over_ranks", first_ask)
        for half in halves:
            with pytest.raises(InterruptedError):
                act(half)
        sums = [sum(parts) for parts in zip(*told, strict=True)]
        for module in MODULES:
            monkeypatch.setattr(f"hesso_hf.pruning.weights.{module}.add_over_ranks", lambda _: sums)
        return [act(half) for half in halves]

    expected = whole.norm_of(marked)
    for found in exchange(lambda half: half.norm_of(marked)):
        assert abs(found - expected) <= 1e-5 * expected
    scales = per_unit(groups, 4)
    whole.centre_(scales, 0.7)
    if any(axis.centred for axes in whole.axes.values() for _, _, axis in axes):
        exchange(lambda half: half.centre_(scales, 0.7))
    assert_weights_equal(whole, halves, 1e-6)
