"""Saliency: the formulas on numbers worked out by hand, and how their sums are collected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hesso_hf.config import SALIENCIES, HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.pruning import saliency
from hesso_hf.pruning.criteria import combine_criteria, criteria_of, criterion, needed_sums
from hesso_hf.pruning.ranking import SHOWN_SCORES, lowest_units, ranked
from hesso_hf.pruning.saliency import UnitSums, accumulate_
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.structures.groups import Axis, PruningGroups, StructureGroups
from hesso_hf.structures.layout import block_layout
from tests.support.reference import decoder_units, flat_gradients, flat_weights, saliency_of
from tests.support.tiny import backward, process_for, tiny_llama, token_batches

CPU = torch.device("cpu")
ALL_TERMS = needed_sums(SALIENCIES)


def one_axis(units: int, block: int = 1, dim: int = 0, shift: float = 0.0) -> tuple[PruningGroups, Axis]:
    """A structure with one layer and one parameter."""
    axis = Axis("w", dim, block_layout(block), shift)
    structure = StructureGroups("mlp_channels", {"intermediate_size": 1}, units, ("0",), ((axis,),))
    return PruningGroups({"mlp_channels": structure}), axis


def sums_of(steps: list[tuple[torch.Tensor, torch.Tensor | None]], units: int, shift: float = 0.0) -> UnitSums:
    """Collect the sums of (weights, gradient) pairs whose rows are the units."""
    groups, axis = one_axis(units, shift=shift)
    sums = UnitSums.zeros(groups, ALL_TERMS, CPU)
    for weights, gradient in steps:
        accumulate_(sums, weights, gradient, [("mlp_channels", 0, axis)])
        sums.batches += 1
    return sums


def scored(name: str, sums: UnitSums, elements: int) -> list[float]:
    return criterion(name, sums.sums["mlp_channels"], sums.batches, elements)[0].tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [5.0, 13.0]),
        ("avg_magnitude", [5.0 / math.sqrt(2), 13.0 / math.sqrt(2)]),
        ("cosine_similarity", [1 - 11 / (5 * math.sqrt(5)), 1 + 22 / (13 * math.sqrt(5))]),
        ("taylor_first_order", [3 * 1 + 4 * 2, 22.0]),
        ("taylor_second_order", [0.5 * (3**2 + 8**2), 0.5 * (10**2 + 12**2)]),
    ],
)
def test_formulas_on_one_batch(name: str, expected: list[float]) -> None:
    weights = torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    gradient = torch.tensor([[1.0, 2.0], [-2.0, -1.0]])
    assert scored(name, sums_of([(weights, gradient)], 2), elements=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", math.sqrt((25 + 100) / 2)),
        ("avg_magnitude", math.sqrt((25 + 100) / 2 / 2)),
        ("cosine_similarity", 1 - (11 - 6) / math.sqrt((25 + 100) * (5 + 1))),
        ("taylor_first_order", abs(11 - 6) / 2),
        ("taylor_second_order", 0.5 * ((3**2 + 8**2) + 6**2) / 2),
    ],
)
def test_formulas_on_two_batches(name: str, expected: float) -> None:
    steps = [
        (torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])),
        (torch.tensor([[6.0, 8.0]]), torch.tensor([[-1.0, 0.0]])),
    ]
    assert scored(name, sums_of(steps, 1), elements=2) == pytest.approx([expected])


def test_cosine_calls_a_unit_redundant_whose_gradient_points_along_it() -> None:
    weights = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    gradient = torch.tensor([[2.0, 4.0], [-2.0, -4.0], [2.0, -1.0]])
    along, opposed, across = scored("cosine_similarity", sums_of([(weights, gradient)], 3), elements=2)
    assert (along, opposed, across) == pytest.approx((0.0, 2.0, 1.0))


def test_a_frozen_weight_counts_as_one_with_zero_gradient() -> None:
    weights = torch.tensor([[3.0, 4.0]])
    frozen = sums_of([(weights, None)], 1)
    zero = sums_of([(weights, torch.zeros_like(weights))], 1)
    for name in SALIENCIES:
        assert scored(name, frozen, elements=2) == scored(name, zero, elements=2)
    assert scored("magnitude", frozen, elements=2) == [5.0]


def test_weights_that_the_model_adds_one_to_are_scored_as_used() -> None:
    weights, gradient = torch.tensor([2.0, -1.0]), torch.tensor([5.0, 5.0])
    sums = sums_of([(weights, gradient)], 2, shift=1.0)
    assert scored("magnitude", sums, elements=1) == [3.0, 0.0]
    assert scored("taylor_first_order", sums, elements=1) == [15.0, 0.0]
    assert scored("taylor_second_order", sums, elements=1) == [112.5, 0.0]


def test_sums_of_several_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = [(torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)) for _ in range(3)]
    together = sums_of(steps, 4)
    apart = sums_of(steps[:1], 4)
    apart.add_(sums_of(steps[1:], 4))
    assert apart.batches == together.batches == 3
    concatenated = torch.cat([w for w, _ in steps], dim=1), torch.cat([g for _, g in steps], dim=1)
    once = sums_of([concatenated], 4)
    for term, value in together.sums["mlp_channels"].items():
        torch.testing.assert_close(apart.sums["mlp_channels"][term], value)
        torch.testing.assert_close(once.sums["mlp_channels"][term], value, rtol=1e-6, atol=1e-6)
    together.zero_()
    assert together.batches == 0
    assert not any(value.any() for value in together.sums["mlp_channels"].values())


def test_nan_in_forgotten_sums_does_not_survive() -> None:
    sums = sums_of([(torch.tensor([[1.0]]), torch.tensor([[float("nan")]]))], 1)
    sums.zero_()
    assert scored("taylor_second_order", sums, elements=1) == [0.0]


@pytest.mark.parametrize(("dim", "shape", "block"), [(0, (12, 5), 4), (1, (5, 12), 4), (0, (12,), 4)])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1 << 20])
def test_chunks_do_not_matter(
    dim: int, shape: tuple[int, ...], block: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(shape, generator=generator)
    gradient = torch.randn(shape, generator=generator)
    groups, axis = one_axis(3, block, dim)
    sums = UnitSums.zeros(groups, ALL_TERMS, CPU)
    monkeypatch.setattr(saliency, "_CHUNK", chunk)
    accumulate_(sums, weights, gradient, [("mlp_channels", 0, axis)])
    rows = weights.movedim(dim, 0).reshape(3, -1).double(), gradient.movedim(dim, 0).reshape(3, -1).double()
    expected = {
        "x2": rows[0].square(),
        "g2": rows[1].square(),
        "xg": rows[0] * rows[1],
        "xg2": (rows[0] * rows[1]) ** 2,
    }
    assert set(expected) == set(ALL_TERMS)
    for term, values in expected.items():
        found = sums.sums["mlp_channels"][term][0]
        torch.testing.assert_close(found, values.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_scores_of_a_model_are_those_of_flat_vectors(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "_CHUNK", chunk)
    model = tiny_llama()
    parameters = dict(model.named_parameters())
    kept = {"attention_heads": 2, "mlp_channels": 40, "embedding_channels": 56}
    process = process_for(model, kept, Schedule(5, 4, 2, 9), saliency=list(SALIENCIES))
    process._chunk = chunk
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    units = {name: layers for name, layers in decoder_units(model).items() if name in kept}
    flat: dict[tuple[str, int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for batch in token_batches(2):
        backward(model, batch)
        process.state.step = 4  # inside the first scoring's window
        process.observe_gradients()
        process.before_step(None)
        for name, layers in units.items():
            for layer, row in enumerate(layers):
                for j, unit in enumerate(row):
                    vectors = flat_weights(parameters, unit), flat_gradients(parameters, unit)
                    flat.setdefault((name, layer, j), []).append(vectors)
    for name, layers in units.items():
        elements = flat[(name, 0, 0)][0][0].numel()
        assert process.groups.structures[name].elements_per_unit(shapes) == elements
        for saliency_name in SALIENCIES:
            found = criterion(saliency_name, process.state.sums.sums[name], 2, elements)
            expected = [
                [saliency_of(saliency_name, flat[(name, layer, j)]) for j in range(len(row))]
                for layer, row in enumerate(layers)
            ]
            torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-4, atol=1e-9)


def test_criteria_are_normalised_over_the_units_that_compete_and_then_weighted() -> None:
    x2 = torch.tensor([[9.0, 16.0], [36.0, 64.0]], dtype=torch.float64)  # magnitudes 3 4 and 6 8
    xg = torch.tensor([[5.0, -12.0], [0.0, 1.0]], dtype=torch.float64)  # 5 12 and 0 1
    sums = UnitSums({"mlp_channels": {"x2": x2, "xg": xg}}, batches=1)
    weights, elements = {"magnitude": 2.0, "taylor_first_order": 0.5}, {"mlp_channels": 7}
    values = criteria_of(sums, weights, elements)
    within = combine_criteria(values, weights, across_layers=False)["mlp_channels"]
    expected = [[2 * 0.6 + 0.5 * 5 / 13, 2 * 0.8 + 0.5 * 12 / 13], [2 * 0.6 + 0.0, 2 * 0.8 + 0.5 * 1.0]]
    torch.testing.assert_close(within, torch.tensor(expected, dtype=torch.float64))
    across = combine_criteria(values, weights, across_layers=True)["mlp_channels"]
    magnitudes, slopes = torch.tensor([[3.0, 4], [6, 8]]), torch.tensor([[5.0, 12], [0, 1]])
    expected_across = 2 * magnitudes / math.sqrt(125) + 0.5 * slopes / math.sqrt(170)
    torch.testing.assert_close(across, expected_across.double(), rtol=1e-6, atol=0)


def test_all_zero_sums_give_zero_scores_and_no_nan() -> None:
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    sums = UnitSums({"mlp_channels": {"xg": zeros.clone(), "xg2": zeros.clone()}}, batches=1)
    weights = {"taylor_first_order": 1.0, "taylor_second_order": 1.0}
    values = criteria_of(sums, weights, {"mlp_channels": 2})
    assert combine_criteria(values, weights, False)["mlp_channels"].tolist() == [[0.0, 0.0, 0.0]]


def test_only_the_sums_in_use_are_kept() -> None:
    assert needed_sums(["magnitude", "avg_magnitude"]) == ("x2",)
    assert needed_sums(["taylor_second_order"]) == ("xg2",)
    assert needed_sums(["cosine_similarity", "taylor_first_order"]) == ("g2", "x2", "xg")


def test_an_unknown_criterion_is_an_error() -> None:
    with pytest.raises(HessoError, match=r"'taylor_third_order'.*did you mean"):
        HessoConfig(pruning_ratio=0.5, saliency={"magnitude": 1.0, "taylor_third_order": 1.0})
    with pytest.raises(KeyError):
        needed_sums(["taylor_third_order"])


INF = float("inf")


def lowest(scores: list[list[float]], count: int, across: bool, pools: int = 2, pruned: Any = None) -> list[list[int]]:
    """Return the units that are marked, per layer."""
    gone = None if pruned is None else torch.tensor(pruned, dtype=torch.bool)
    marked = lowest_units(torch.tensor(scores, dtype=torch.float64), gone, count, across, pools)
    return [layer.nonzero().flatten().tolist() for layer in marked]


def test_the_lowest_of_every_pool_are_marked():
    scores = [[1, 2, 3, 9, 8, 7], [6, 5, 4, 1, 3, 2]]
    assert lowest(scores, 1, across=False) == [[0, 5], [2, 3]]
    assert lowest(scores, 2, across=False) == [[0, 1, 4, 5], [1, 2, 3, 5]]
    assert lowest(scores, 3, across=False, pools=1) == [[0, 1, 2], [3, 4, 5]]
    assert lowest(scores, 1, across=False, pruned=[[0, 0, 1, 0, 0, 0], [0] * 6]) == [[2, 5], [2, 3]]


def test_across_layers_the_lowest_of_a_layers_pools_compete_together():
    # the lowest of the first layer's pools add up to 1 + 7, its second lowest to 2 + 8; the second layer's to 5 and 7
    scores = [[1, 2, 3, 9, 8, 7], [6, 5, 4, 1, 3, 2]]
    assert lowest(scores, 1, across=True) == [[], [2, 3]]
    assert lowest(scores, 2, across=True) == [[], [1, 2, 3, 5]]
    assert lowest(scores, 3, across=True) == [[0, 5], [1, 2, 3, 5]]  # no pool loses its last unit
    assert lowest(scores, 4, across=True) == [[0, 1, 4, 5], [1, 2, 3, 5]]
    assert lowest(scores, 2, across=True, pruned=[[0, 0, 1, 1, 0, 0], [0] * 6]) == [[2, 3], [2, 3]]


def test_across_layers_units_that_only_fill_up_come_last_and_no_pool_loses_its_last_unit():
    newcomers = [[5, INF, INF, 4, INF, 3], [INF, INF, INF, INF, 1, INF]]
    assert lowest(newcomers, 1, across=True) == [[0, 5], []]  # a unit of each pool
    assert lowest(newcomers, 2, across=True) == [[0, 5], [0, 4]]  # one and a unit to fill up
    assert lowest(newcomers, 3, across=True) == [[0, 1, 3, 5], [0, 4]]
    assert lowest([[1, 2, 3], [INF, INF, INF]], 3, across=True, pools=1) == [[0, 1], [0]]


def test_scores_are_told_in_their_order_those_that_went_first():
    judged = {"mlp_channels": torch.tensor([[5.0, 1.0, 4.0, 2.0], [3.0, 8.0, 6.0, 9.0]])}
    gone = {"mlp_channels": torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)}
    within = {"units": 4, "removed": 2, "points": [[0, 2.0], [1, 5.5], [2, 5.0], [3, 6.5]]}  # means over the layers
    assert ranked(judged, gone, across_layers=False) == {"mlp_channels": within}
    across = [[0, 1.0], [1, 2.0], [2, 3.0], [3, 9.0], [4, 4.0], [5, 5.0], [6, 6.0], [7, 8.0]]
    assert ranked(judged, gone, across_layers=True) == {"mlp_channels": {"units": 8, "removed": 4, "points": across}}
    assert ranked(judged, {"mlp_channels": torch.zeros(2, 4, dtype=torch.bool)}, across_layers=False) is None
    assert ranked({}, {}, across_layers=False) is None
    judged["mlp_channels"][0, 0] = INF  # which JSON has not
    assert ranked(judged, gone, across_layers=False) == {"mlp_channels": within | {"points": within["points"][:3]}}


def test_of_many_scores_some_are_told_and_both_sides_of_the_cut():
    scores = torch.arange(1000.0).flip(0)[None]
    found = ranked({"mlp_channels": scores}, {"mlp_channels": scores < 333}, across_layers=False)
    points = (found or {})["mlp_channels"]["points"]
    assert len(points) <= SHOWN_SCORES
    assert points == [[rank, rank] for rank in sorted(rank for rank, _ in points)]
    assert {0, 332, 333, 999} <= {rank for rank, _ in points}


def test_criteria_are_normalised_within_a_pool():
    sums = UnitSums({"query_heads": {"x2": torch.tensor([[9.0, 16.0, 36.0, 64.0]]).double()}}, batches=1)
    weights = {"magnitude": 1.0}
    values = criteria_of(sums, weights, {"query_heads": 2})
    found = combine_criteria(values, weights, False, pools={"query_heads": 2})["query_heads"]
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8, 0.6, 0.8]]).double())
    across = combine_criteria(values, weights, True, pools={"query_heads": 2})["query_heads"]
    torch.testing.assert_close(across, torch.tensor([[3.0, 4.0, 6.0, 8.0]]).double() / 125**0.5)
