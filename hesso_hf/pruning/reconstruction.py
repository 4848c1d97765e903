"""Reconstruction: a unit is redundant where the others can say what it says.

With A = X^T X of what a matrix W reads, the least squared error behind W without unit u, the others refitted, is
tr(W_u [(A^-1)_uu]^-1 W_u^T): structured optimal brain surgery, as in ZipLM (arXiv 2302.04089) and SlimGPT
(arXiv 2412.18110).
Shapes: C columns of a matrix, O outputs, U units of k columns each.
"""

from __future__ import annotations

import torch

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
    columns = units.argsort(stable=True).view(len(pruned), -1)  # (U, k)
    alive = (~pruned).nonzero().flatten()
    costs = torch.zeros(len(pruned), dtype=gram.dtype, device=gram.device)
    inverse, weight = _inverse(gram, columns[alive].flatten()), weight.clone()
    floor = torch.zeros((), dtype=gram.dtype, device=gram.device)
    while len(alive):
        now = _costs(inverse, weight, columns[alive])
        cheapest = now.argsort(stable=True)[: max(1, len(alive) // AT_ONCE)]
        # those that go together ascend by what they cost alone, and none costs less than one that went before
        costs[alive[cheapest]] = torch.maximum(now[cheapest], floor)
        floor = costs[alive[cheapest[-1]]] * (1 + 1e-9)
        _remove_(inverse, weight, columns[alive[cheapest]].flatten())
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[cheapest] = False
        alive = alive[stays]
    return costs


def _inverse(gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a ridge matrix among some columns, zero elsewhere, (C, C)."""
    among = gram[columns][:, columns]
    among.diagonal().add_(RIDGE * among.diagonal().mean() + torch.finfo(torch.float32).tiny)
    inverse = torch.zeros_like(gram)
    inverse[columns[:, None], columns] = torch.cholesky_inverse(torch.linalg.cholesky(among))
    return inverse


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
