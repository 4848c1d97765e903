"""Saliency criteria: how much a unit matters, by formulas on its sums (section 3.3 of arXiv 2409.09085).

Legend: L layers, U units per layer, C criteria.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..config.names import RECONSTRUCTION
from .saliency import PerUnit, UnitSums

_NEEDS = {
    "magnitude": ("x2",),
    "avg_magnitude": ("x2",),
    "cosine_similarity": ("xg", "x2", "g2"),
    "taylor_first_order": ("xg",),
    "taylor_second_order": ("xg2",),
    RECONSTRUCTION: ("xg2",),  # for structures that it can't be computed of, whose second-order Taylor term counts
}


def needed_sums(weights: Iterable[str]) -> tuple[str, ...]:
    """Return which of the sums x*g, (x*g)^2, g^2 and x^2 the criteria in use need."""
    return tuple(sorted({term for name in weights for term in _NEEDS[name]}))


def criteria_of(
    sums: UnitSums,
    names: Iterable[str],
    elements: Mapping[str, int],
    signed: bool = False,
    costs: PerUnit | None = None,
) -> dict[str, torch.Tensor]:
    """Return each criterion's values, shape (C, L, U) per structure, C criteria in the order of `names`.

    Args:
        elements: number of elements n of one unit, per structure.
        signed: whether the first-order term keeps its sign, as it does along a path to zero.
        costs: of reconstruction, for the structures that have such; for others its stand-in counts.
    """

    def value(name: str, structure: str, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name == RECONSTRUCTION and costs and structure in costs:
            return costs[structure]
        return criterion(name, terms, sums.batches, elements[structure], signed)

    return {
        structure: torch.stack([value(name, structure, terms) for name in names])
        for structure, terms in sums.sums.items()
    }


def combine_criteria(
    values: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    across_layers: bool,
    competing: Mapping[str, torch.Tensor] | None = None,
    pools: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Combine the criteria's values (C, L, U) to one score per unit, (L, U); the lowest are redundant.

    Args:
        weights: weight of each criterion; each is divided by its L2 norm over the units that compete.
        across_layers: whether units compete across layers or within each.
        competing: per structure the units (L, U) that still compete, bool; all by default.
        pools: runs of a layer's units that compete each for itself, per structure; one by default.
    """
    scores = {}
    for structure, stacked in values.items():
        total = torch.zeros_like(stacked[0])
        for score, weight in zip(stacked, weights.values(), strict=True):
            rivals = score if competing is None else score.masked_fill(~competing[structure], 0.0)
            norm = rivals.norm() if across_layers else _norms(rivals, pools[structure] if pools else 1)
            total += weight * score / norm.clamp_min(torch.finfo(score.dtype).tiny)
        scores[structure] = total
    return scores


def criterion(
    name: str, terms: Mapping[str, torch.Tensor], batches: int, elements: int, signed: bool = False
) -> torch.Tensor:
    """Apply one criterion's formula to sums over `batches` batches, elementwise over units."""
    batches = max(1, batches)
    if name == "magnitude":
        return (terms["x2"] / batches).sqrt()
    if name == "avg_magnitude":
        return (terms["x2"] / batches / elements).sqrt()
    if name == "taylor_first_order":
        slope = terms["xg"] / batches
        return -slope if signed else slope.abs()  # -x*g is the rise of the loss when x goes
    if name in ("taylor_second_order", RECONSTRUCTION):
        return 0.5 * terms["xg2"] / batches
    assert name == "cosine_similarity"
    # a gradient along x means that shrinking x lowers the loss: such a unit is redundant
    norms = (terms["x2"] * terms["g2"]).sqrt()
    return 1.0 - terms["xg"] / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _norms(scores: torch.Tensor, pools: int) -> torch.Tensor:
    """Return the norm over each pool, for each of its units: shape (L, U), or (L, 1) where a layer is one pool."""
    if pools == 1:
        return scores.norm(dim=1, keepdim=True)
    norms = scores.reshape(len(scores), pools, -1).norm(dim=2)
    return norms.repeat_interleave(scores.shape[1] // pools, dim=1)
