"""How a teacher and a student, or the data, differ: sums over positions, from the teacher's logits a chunk at a time.

Shapes: B batch, T tokens, V vocabulary, n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..distributed.collectives import mean_over_ranks
from .teacher import Teacher

IGNORED = -100


class _DivergenceSum(torch.autograd.Function):
    """Sum over positions of KL(teacher || student), both at a temperature.

    The gradient for the student's logits is computed on the way, while a chunk of the teacher's is there. It is all
    that is kept for the backward pass, and takes the place of the student's logits, which nothing else needs by then.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: Iterator[Any], ignored: torch.Tensor | None, temperature: float
    ) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        flat, gradient = logits.flatten(0, 1), torch.zeros_like(logits)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for chunk, teacher in rows:
            unread = None if ignored is None else ignored[chunk, None]
            wanted, found = (_log_softmax(each.to(dtype) / temperature, unread) for each in (teacher, flat[chunk]))
            total += nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
            gradient.view_as(flat)[chunk] = ((found.exp_() - wanted.exp_()) / temperature).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def _log_softmax(logits: torch.Tensor, unread: torch.Tensor | None) -> torch.Tensor:
    """Return log-probabilities, uniform at positions that don't count: equal ones have no divergence, nor gradient."""
    return (logits if unread is None else logits.masked_fill_(unread, 0.0)).log_softmax(-1)


def divergence(
    teacher: Teacher, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Return the sum of T^2 KL(teacher || student) over the positions that have a target; the host waits for nothing.

    T^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        logits: the student's, (B, T, V), with gradients.
        targets: (B, T), -100 where nothing is to be learnt; None where all positions count.
    """
    ignored = None if targets is None else targets.flatten() == IGNORED
    total: torch.Tensor = _DivergenceSum.apply(logits, teacher.rows(inputs), ignored, temperature)
    return total * temperature**2


def num_targets(targets: torch.Tensor) -> torch.Tensor:
    """Return how many positions count, 1 at least."""
    return (targets != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def lead(teacher: Teacher, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return by how many nats per token the teacher predicts a batch better than the student, the mean over processes.

    Args:
        logits: the student's, (B, T, V).
        targets: (B, T), -100 where nothing is to be learnt.
    """
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    behind = torch.zeros((), device=logits.device)
    for chunk, known in teacher.rows(inputs):
        student, its = (
            nn.functional.cross_entropy(each.float(), wanted[chunk], reduction="sum", ignore_index=IGNORED)
            for each in (flat[chunk], known)
        )
        behind += student - its
    return mean_over_ranks(behind / num_targets(targets), behind.device)


@torch.no_grad()
def surprise(teacher: Teacher, batches: Iterable[tuple[Mapping[str, Any], torch.Tensor]]) -> float:
    """Return by how many nats per token a teacher's loss lies above what it expects it to be, its entropy there.

    Near zero, or below, where it knows the text: whoever predicts as the text is distributed has a loss as high as the
    entropy. The same batches on all processes.

    Args:
        batches: inputs, and targets (B, T) that are -100 where nothing is to be learnt.
    """
    excess = torch.zeros((), device=teacher.device)
    counted = torch.zeros((), device=teacher.device)
    for inputs, targets in batches:
        wanted = targets.flatten()
        for chunk, logits in teacher.rows(inputs):
            log_p = logits.float().log_softmax(-1)
            excess += nn.functional.nll_loss(log_p, wanted[chunk], reduction="sum", ignore_index=IGNORED)
            entropy = torch.special.entr(log_p.exp()).sum(-1)
            excess -= entropy.masked_fill_(wanted[chunk] == IGNORED, 0.0).sum()
        counted += (wanted != IGNORED).sum()
    return mean_over_ranks(excess / counted.clamp(min=1), teacher.device)
