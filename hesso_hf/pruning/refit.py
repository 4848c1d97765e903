"""The refit of one matrix: what its marked columns read, said by those that stay.

Shapes: N tokens, C columns, O outputs; S columns stay, R are marked; masks of columns are bool (C,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .saliency import float_sums
from .token_rows import CHUNK, TokenRows

RIDGES = (1e-2, 1e-1, 1.0)  # times the mean square of an activation
# A smaller one may serve held-out tokens a little better by much larger weights, with which gradients explode. That is
# worth it where others repeat what goes: there it leaves less than this share of the error.
# In fp32 rounding is as much as a ridge of 1e-4 where columns are many.
SMALL_RIDGE, WORTH_IT = {torch.float64: 1e-6, torch.float32: 1e-4}, 0.5
HELD_OUT = 4  # every fourth token chooses the ridge, and whether there is anything to gain


def said_by_others(
    tokens: TokenRows, weight: torch.Tensor, gone: torch.Tensor, stays: torch.Tensor
) -> torch.Tensor | None:
    """Return B (R, S), with the ridge that serves held-out tokens best; None where none lowers their error.

    Args:
        tokens: X, (N, C).
        weight: of the marked units, (O, R): errors count by what they do behind it.
    """
    places = torch.arange(len(tokens), device=tokens.places.device)
    check = tokens.chosen(places[::HELD_OUT])
    fit = tokens.chosen(places[places % HELD_OUT != 0])
    if len(tokens) < tokens.columns:
        few, held = (TokenSums(part.all(float_sums(part.rows.device)), gone, stays) for part in (fit, check))
        return _with_best_ridge(few, held, weight)
    sums, held_out = (ColumnSums(part.gram(), gone, stays) for part in (fit, check))
    return _with_best_ridge(sums, held_out, weight)


def _with_best_ridge(fit: Sums, check: Sums, weight: torch.Tensor) -> torch.Tensor | None:
    weight = weight.to(fit.dtype)
    wanted, held = fit.behind(weight), check.behind(weight)
    unhealed = check.unhealed(weight, held)
    small = SMALL_RIDGE[fit.dtype]
    ridges: tuple[float, ...] = (*RIDGES, small)
    left: list[torch.Tensor] = [check.error(held, unhealed, fit.solved(wanted, ridge)) for ridge in ridges]
    found: list[float] = torch.stack([*left, unhealed]).tolist()  # the host waits once
    errors = dict(zip(ridges, found, strict=False))
    best = min(RIDGES, key=lambda ridge: errors[ridge])
    if errors[small] < WORTH_IT * errors[best]:
        best = small
    if not errors[best] < found[-1]:
        return None
    fit.add_(check)
    return fit.said(best)


@dataclass(frozen=True)
class StandIn:
    """What stands in for the marked columns of a matrix.

    Attributes:
        said: the marked columns by those that stay, (R, S); None where nothing is refitted.
        gone, stays: places of columns, or bool (C,).
    """

    said: torch.Tensor | None
    gone: torch.Tensor
    stays: torch.Tensor

    def healed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the old matrix makes of as the healed one makes of the columns that stay, (N, C)."""
        found, said = rows.clone(), self.said
        for start in range(0, len(rows), CHUNK):
            few, old = found[start : start + CHUNK], rows[start : start + CHUNK]
            few[:, self.gone] = 0 if said is None else (old[:, self.stays].to(said.dtype) @ said.T).to(rows.dtype)
        return found

    def as_read(self, dtype: torch.dtype) -> StandIn:
        """Return it for many passes, with numbers of the dtype that is read."""
        return replace(self, said=None if self.said is None else self.said.to(dtype))


class RidgeRegression(ABC):
    """Ridge regression of marked columns on those that stay, by sums over what a matrix reads."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That sums are kept and systems solved in."""

    @abstractmethod
    def solved(self, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return the coefficients of the columns that stay (S, n), of n things that are `wanted`."""

    @property
    @abstractmethod
    def gone_columns(self) -> torch.Tensor:
        """The marked columns as `solved` wants them."""

    def said(self, ridge: float) -> torch.Tensor:
        """Return B, (R, S)."""
        return self.solved(self.gone_columns, ridge).T

    def behind(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what marked columns do behind the matrix, as `solved` wants it, of their weights (O, R)."""
        return self.gone_columns @ weight.T


@dataclass
class ColumnSums(RidgeRegression):
    """By the second moments of columns.

    Attributes:
        gram: X^T X, (C, C).
        gone, stays: places of columns, or bool (C,).
    """

    gram: torch.Tensor
    gone: torch.Tensor
    stays: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.gram.dtype

    @property
    def gone_columns(self) -> torch.Tensor:
        return self.gram[self.stays][:, self.gone]

    def add_(self, other: ColumnSums) -> None:
        """Look at the other's rows too."""
        self.gram += other.gram

    def solved(self, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
        return _ridge_solved(self._among, wanted, ridge * self.gram.diagonal().mean())

    def unhealed(self, weight: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """Return the squared error behind the matrix where marked columns are missing, over all outputs."""
        return ((weight @ self.gram[self.gone][:, self.gone]) * weight).sum()

    def error(self, behind: torch.Tensor, unhealed: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return what is left of it where so much (S, O) is added to the weights of the columns that stay."""
        return unhealed - 2 * (behind * added).sum() + ((self._among @ added) * added).sum()

    @property
    def _among(self) -> torch.Tensor:
        return self.gram[self.stays][:, self.stays]


@dataclass
class TokenSums(RidgeRegression):
    """By the products of tokens, which are fewer than columns: no matrix (C, C) is made.

    With K = X_S X_S^T, (X_S^T X_S + ridge)^-1 X_S^T = X_S^T (K + ridge)^-1.

    Attributes:
        rows: X, (N, C).
        gone, stays: places of columns, or bool (C,).
    """

    rows: torch.Tensor
    gone: torch.Tensor
    stays: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def gone_columns(self) -> torch.Tensor:
        return self.rows[:, self.gone]

    def add_(self, other: TokenSums) -> None:
        """Look at the other's rows too."""
        self.rows = torch.cat([self.rows, other.rows])

    def solved(self, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
        among = self.rows[:, self.stays]
        mean = self.rows.square().sum() / self.rows.shape[1]
        return among.T @ _ridge_solved(among @ among.T, wanted, ridge * mean)

    def unhealed(self, weight: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """Return the squared error behind the matrix where marked columns are missing, over all outputs."""
        return behind.square().sum()

    def error(self, behind: torch.Tensor, unhealed: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return what is left of it where so much (S, O) is added to the weights of the columns that stay."""
        return (behind - self.rows[:, self.stays] @ added).square().sum()


Sums = TypeVar("Sums", ColumnSums, TokenSums)


def solved(gram: torch.Tensor, ridge: float, gone: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression of the marked columns on the others, (R, S)."""
    return ColumnSums(gram, gone, stays).said(ridge)


def places_of(columns: torch.Tensor) -> torch.Tensor:
    """Return where columns lie, of a mask (C,): the host waits to know it once, not whenever they are looked up."""
    return columns.nonzero().flatten()


def _ridge_solved(matrix: torch.Tensor, wanted: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Return (M + ridge)^-1 Y, zeros where that isn't positive definite: rows repeat each other, the ridge is small."""
    matrix.diagonal().add_(ridge + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed > 0, 0.0, torch.cholesky_solve(wanted, factor))
