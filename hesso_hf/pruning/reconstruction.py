"""Reconstruction: a unit is redundant where the others can say what it says.

With A = X^T X of what a matrix W reads, the least squared error behind W without unit u, the others refitted, is
tr(W_u [(A^-1)_uu]^-1 W_u^T): structured optimal brain surgery, as in ZipLM (arXiv 2302.04089) and SlimGPT
(arXiv 2412.18110).
Shapes: C columns of a matrix, O outputs, U units of k columns each.
"""

from __future__ import annotations

import torch

from .saliency import float_sums

RIDGE = 1e-2  # times the mean square of an activation: order, not weights, depends on it
AT_ONCE = 8  # of so many units that are left, the cheapest go together, before the others are looked at again


def removal_costs(gram: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Return the squared error that each unit's going adds, one after the other, the cheapest first: shape (U,).

    Costs ascend in the order in which units go, and are 0 for pruned ones.

    Args:
        gram: A, (C, C).
        weight: W, (O, C).
        units: of which unit each column is, (C,).
        pruned: bool (U,).
    """
    try:
        return _removal_costs(gram, weight, units, pruned)
    except torch.linalg.LinAlgError:
        wider = float_sums(gram.device)
        if gram.dtype == wider:
            raise
        return _removal_costs(gram.to(wider), weight.to(wider), units, pruned)


def _removal_costs(gram: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    alive = (~pruned).nonzero().flatten()
    places = units.argsort(stable=True).view(len(pruned), -1)[alive]  # (n, k), n units that are left
    costs = torch.zeros(len(pruned), dtype=gram.dtype, device=gram.device)
    floor = torch.zeros((), dtype=gram.dtype, device=gram.device)
    inverse, weight, places = _among(gram, weight, places)
    inverse = _inverse_(inverse)
    while len(alive):  # without the host's waiting for what goes
        now = _costs(inverse, weight, places)
        cheapest, dearer = now.argsort(stable=True).tensor_split([max(1, len(alive) // AT_ONCE)])
        # those that go together ascend by what they cost alone, and none costs less than one that went before
        costs[alive[cheapest]] = torch.maximum(now[cheapest], floor)
        floor = costs[alive[cheapest[-1:]]] * (1 + 1e-9)
        _remove_(inverse, weight, places[cheapest].flatten())
        stays = dearer.sort().values
        alive, places = alive[stays], places[stays]
        if places.numel() <= len(inverse) // 2:
            inverse, weight, places = _among(inverse, weight, places)
    return costs


def _among(
    square: torch.Tensor, weight: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return copies of a matrix (C, C) and of W with the columns of units alone, and where these are then."""
    columns = places.flatten()
    then = torch.arange(len(columns), device=columns.device).view(places.shape)
    return square[columns][:, columns], weight[:, columns], then


def _inverse_(gram: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a ridge matrix."""
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))


def _costs(inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return what each unit's going would cost now, (n,), of units with the given columns (n, k)."""
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (n, k, k)
    parts = weight[:, columns].permute(1, 2, 0)  # (n, k, O)
    return (_divided(parts, blocks) * parts).sum((1, 2))


def _remove_(inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> None:
    """Take columns out: the others' weights are refitted to stand in for them."""
    rows = _divided(inverse[columns], inverse[columns][:, columns])
    weight -= weight[:, columns] @ rows
    inverse -= inverse[:, columns] @ rows
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0


def _divided(rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return block^-1 rows, of positive definite blocks (..., k, k) and rows (..., k, n)."""
    if block.shape[-1] == 1:
        return rows / block
    return torch.cholesky_solve(rows, torch.linalg.cholesky(block))
