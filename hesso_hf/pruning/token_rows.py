"""What a matrix reads of tokens, copied a few at a time: no second one of its size is made.

Shapes: M rows, padding among them; N tokens that count; C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

CHUNK = 2048  # tokens that are copied, and multiplied, at a time


@dataclass(frozen=True)
class TokenRows:
    """The rows of the tokens that count, X (N, C), each as much as it counts.

    Attributes:
        rows: what the matrix reads, (M, C).
        places: where the tokens lie in it, (N,).
        scale: what a token's row is multiplied by, (N,); None where all count alike.
    """

    rows: torch.Tensor
    places: torch.Tensor
    scale: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def columns(self) -> int:
        """C."""
        return self.rows.shape[1]

    def chosen(self, tokens: torch.Tensor) -> TokenRows:
        """Return those of some tokens: places, or bool (N,)."""
        scale = None if self.scale is None else self.scale[tokens]
        return replace(self, places=self.places[tokens], scale=scale)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield copies of a few rows in turn, fp32 (n, C)."""
        for start in range(0, len(self), CHUNK):
            few = self.rows[self.places[start : start + CHUNK]].float()
            yield few if self.scale is None else few * self.scale[start : start + CHUNK, None]

    def all(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of all rows, (N, C)."""
        return torch.cat([few.to(dtype) for few in self.chunks()])

    def gram(self) -> torch.Tensor:
        """Return X^T X, (C, C): fp64 on a CPU, fp32 elsewhere, since most GPUs are far slower in fp64."""
        dtype = torch.float64 if self.rows.device.type == "cpu" else torch.float32
        total = torch.zeros(self.columns, self.columns, dtype=dtype, device=self.rows.device)
        for few in self.chunks():
            total += few.T @ few  # sums of so few tokens are exact enough in fp32
        return total
