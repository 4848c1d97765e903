"""Healing: what marked units contribute through the matrix that reads them is refitted into the columns that stay.

With X the activations that a matrix W reads, S the units that stay and R the marked ones, W_S takes on W_R B, where
B = argmin |X_R - X_S B^T|^2 + ridge |B|^2 says the marked units by the others. The matrices are taken in the order of
the forward pass, each on activations that its healed predecessors make: one forward pass of all examples finds all.
Shapes: N examples, T tokens, C columns of a matrix, O outputs; S and R index columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..structures.groups import Axis
from .saliency import PerUnit, float_sums
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # times the mean square of an activation
HELD_OUT = 4  # every fourth token chooses the ridge, and whether there is anything to gain
CHUNK = 2048  # tokens that are multiplied at a time


@dataclass(frozen=True)
class Reader:
    """A matrix that reads units: by its input's dimension `dim` it weighs what they say."""

    name: str
    module: nn.Module
    dim: int
    axes: tuple[tuple[str, int, Axis], ...]

    def columns(self, units: PerUnit) -> torch.Tensor:
        """Return the columns of units that are chosen, bool (C,)."""
        chosen = [axis.layout.expand(units[structure][layer], False) for structure, layer, axis in self.axes]
        return torch.stack(chosen).any(0)


def readers_of(model: nn.Module, bound: BoundGroups) -> list[Reader]:
    """Return the linear layers whose input is made of units: down projections and attention outputs."""
    modules = dict(model.named_modules())
    found = []
    for name, axes in bound.axes.items():
        module = modules.get(name.removesuffix(".weight"))
        dim = _input_dim(module)
        read = tuple(entry for entry in axes if entry[2].dim == dim and entry[0] != "embedding_channels")
        if module is not None and dim is not None and read and not any(axis.power for _, _, axis in read):
            found.append(Reader(name, module, dim, read))
    return found


def _input_dim(module: nn.Module | None) -> int | None:
    """Return which dimension of a linear layer's weight its input has, None for other modules."""
    module = getattr(module, "base_layer", module)  # under an adapter
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


class Healer:
    """Refits matrices on a few examples.

    Args:
        model: on whose activations it works.
        batch: what its forward pass takes: `input_ids` (N, T) and `attention_mask`, padded on the right.

    Example:
        optimizer.process.heal_with(Healer(model, tokenizer(texts, return_tensors="pt", padding=True)))
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        self._model, self._batch = model, dict(batch)
        self._tokens = self._batch["attention_mask"].flatten().bool()

    @torch.no_grad()
    def corrections(self, bound: BoundGroups, marked: PerUnit, pruned: PerUnit) -> dict[str, torch.Tensor]:
        """Return what is to be added to each reader's weight by the time its marked units are at zero."""
        found: dict[str, torch.Tensor] = {}
        handles = []
        readers = readers_of(self._model, bound)
        self._name_unread(readers, marked)
        for reader in readers:
            gone = reader.columns(marked)
            if bool(gone.any()):
                handles.append(self._hook(reader, gone, ~gone & ~reader.columns(pruned), bound, found))
        try:
            with _in_eval(self._model):
                self._trunk()(**self._batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        for name, correction in found.items():
            _leave_out(bound, name, correction, marked, pruned)
        return found

    def _name_unread(self, readers: list[Reader], marked: PerUnit) -> None:
        """Warn of structures whose units no linear layer reads; channels of the stream are never healed."""
        read = {structure for reader in readers for structure, _, _ in reader.axes} | {"embedding_channels"}
        for structure in sorted(name for name, units in marked.items() if bool(units.any()) and name not in read):
            logger.warning_once(
                f"healing: {structure} of {type(self._model).__name__} aren't healed: no linear layer reads them"
            )

    def _trunk(self) -> nn.Module:
        """Return the model without its head, whose logits nobody needs."""
        return self._model.base_model

    def _hook(
        self, reader: Reader, gone: torch.Tensor, stays: torch.Tensor, bound: BoundGroups, found: dict[str, Any]
    ) -> RemovableHandle:
        def refit(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = args[0]
            rows = inputs.flatten(0, -2)
            if len(rows) != len(self._tokens):
                logger.warning_once(
                    f"{reader.name} isn't healed: it reads {len(rows)} rows of {len(self._tokens)} tokens"
                )
                return args
            weight = bound.effective(reader.name)
            weight = weight if reader.dim == 1 else weight.T
            said = self._said_by_others(rows[self._tokens], weight[:, gone], gone, stays)
            healed = rows.clone()
            if said is None:
                healed[:, gone] = 0
            else:
                correction = torch.zeros_like(weight)
                correction[:, stays] = (weight[:, gone].to(said.dtype) @ said).to(weight.dtype)
                found[reader.name] = correction if reader.dim == 1 else correction.T.contiguous()
                # what the healed matrix makes of the units that stay, the old one makes of this
                healed[:, gone] = (rows[:, stays].to(said.dtype) @ said.T).to(rows.dtype)
            return healed.view_as(inputs), *args[1:]

        return reader.module.register_forward_pre_hook(refit)

    def _said_by_others(
        self, rows: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor, stays: torch.Tensor
    ) -> torch.Tensor | None:
        """Return B (R, S), with the ridge that serves held-out tokens best; None where none lowers their error.

        Args:
            weight: of the marked units, (O, R): errors count by what they do behind it.
        """
        held = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        held[::HELD_OUT] = True
        fit, check = _gram(rows[~held]), _gram(rows[held])
        weight = weight.to(fit.dtype)
        unhealed = _error(check, weight, None, gone, stays)
        errors = {ridge: _error(check, weight, _solve(fit, ridge, gone, stays), gone, stays) for ridge in RIDGES}
        best = min(errors, key=lambda ridge: errors[ridge])
        if not errors[best] < unhealed:
            return None
        return _solve(fit + check, best, gone, stays)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Return X^T X, (C, C)."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=float_sums(rows.device), device=rows.device)
    for chunk in rows.split(CHUNK):
        chunk = chunk.float()
        total += chunk.T @ chunk  # sums of so few tokens are exact enough in fp32
    return total


def _solve(gram: torch.Tensor, ridge: float, gone: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
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


def _leave_out(bound: BoundGroups, name: str, correction: torch.Tensor, marked: PerUnit, pruned: PerUnit) -> None:
    """Put what would be added to units that go themselves at zero, such as channels of the stream."""
    for structure, layer, axis in bound.axes[name]:
        if structure in marked:
            gone = marked[structure][layer] | pruned[structure][layer]
            correction.mul_(axis.spread((~gone).to(correction.dtype), correction.dim()))


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def padded(examples: list[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Put the tokens of single examples, (n, T) each, into one batch that is padded on the right."""
    rows, masks = [], []
    for example in examples:
        ids = example["input_ids"]
        mask = example.get("attention_mask", torch.ones_like(ids))
        for row, real in zip(ids, mask, strict=True):
            rows.append(row[real.bool()])
            masks.append(torch.ones_like(rows[-1]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "input_ids": ids.to(device),
        "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True).to(device),
    }
