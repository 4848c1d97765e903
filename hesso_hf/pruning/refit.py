"""The refit of one matrix: what its marked columns read, said by those that stay.

Shapes: N tokens, C columns, O outputs; S columns stay, R are marked; masks of columns are bool (C,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .saliency import float_sums

RIDGES = (1e-2, 1e-1, 1.0)  # times the mean square of an activation
# A smaller one may serve held-out tokens a little better by much larger weights, with which gradients explode. That is
# worth it where others repeat what goes: there it leaves less than this share of the error.
SMALL_RIDGE, WORTH_IT = 1e-6, 0.5
HELD_OUT = 4  # every fourth token chooses the ridge, and whether there is anything to gain
CHUNK = 2048  # tokens that are multiplied at a time


def said_by_others(
    rows: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor, stays: torch.Tensor
) -> torch.Tensor | None:
    """Return B (R, S), with the ridge that serves held-out tokens best; None where none lowers their error.

    Args:
        rows: X, (N, C).
        weight: of the marked units, (O, R): errors count by what they do behind it.
    """
    held = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    held[::HELD_OUT] = True
    fit, check = gram_of(rows[~held]), gram_of(rows[held])
    weight = weight.to(fit.dtype)
    unhealed = _error(check, weight, None, gone, stays)
    errors = {ridge: _error(check, weight, solved(fit, ridge, gone, stays), gone, stays) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    errors[SMALL_RIDGE] = _error(check, weight, solved(fit, SMALL_RIDGE, gone, stays), gone, stays)
    if errors[SMALL_RIDGE] < WORTH_IT * errors[best]:
        best = SMALL_RIDGE
    if not errors[best] < unhealed:
        return None
    return solved(fit + check, best, gone, stays)


@dataclass(frozen=True)
class StandIn:
    """What stands in for the marked columns of a matrix.

    Attributes:
        said: the marked columns by those that stay, (R, S); None where nothing is refitted.
        gone, stays: bool (C,), or their places.
    """

    said: torch.Tensor | None
    gone: torch.Tensor
    stays: torch.Tensor

    def healed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the old matrix makes of as the healed one makes of the columns that stay, (N, C)."""
        found, said = rows.clone(), self.said
        found[:, self.gone] = 0 if said is None else (rows[:, self.stays].to(said.dtype) @ said.T).to(rows.dtype)
        return found

    def as_read(self, dtype: torch.dtype) -> StandIn:
        """Return it for many passes: numbers of the dtype that is read, and places, which no host needs to wait for."""
        gone, stays = (columns.nonzero().flatten() for columns in (self.gone, self.stays))
        return StandIn(None if self.said is None else self.said.to(dtype), gone, stays)


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """Return X^T X, (C, C)."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=float_sums(rows.device), device=rows.device)
    for chunk in rows.split(CHUNK):
        chunk = chunk.float()
        total += chunk.T @ chunk  # sums of so few tokens are exact enough in fp32
    return total


def solved(gram: torch.Tensor, ridge: float, gone: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression of the marked columns on the others, (R, S)."""
    among = gram[stays][:, stays]
    among.diagonal().add_(ridge * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(among)
    if bool(failed):  # columns that repeat each other, and a small ridge
        return torch.zeros(int(gone.sum()), int(stays.sum()), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(gram[stays][:, gone], factor).T


def _error(
    gram: torch.Tensor, weight: torch.Tensor, said: torch.Tensor | None, gone: torch.Tensor, stays: torch.Tensor
) -> float:
    """Return the squared error behind the matrix, summed over tokens and outputs."""
    of_gone = gram[gone][:, gone]
    total = ((weight @ of_gone) * weight).sum()
    if said is not None:
        refitted = weight @ said
        total = total - 2 * ((weight @ gram[gone][:, stays]) * refitted).sum()
        total = total + ((refitted @ gram[stays][:, stays]) * refitted).sum()
    return float(total)
