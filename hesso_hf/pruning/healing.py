"""Healing: what marked units contribute through the matrix that reads them is refitted into the columns that stay.

With X the activations that a matrix W reads, S the units that stay and R the marked ones, W_S takes on W_R B, where
B = argmin |X_R - X_S B^T|^2 + ridge |B|^2 says the marked units by the others. The matrices are taken in the order of
the forward pass, each on activations that its healed predecessors make: one forward pass of all examples finds all.
Shapes: N examples, T tokens, C columns of a matrix, O outputs; S and R index columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..hf_models.tiny_model import attention_in_fp32, ieee_fp32
from .fisher import OutputFisher, output_fisher
from .ranking import lowest_units
from .readers import Reader, readers_of
from .reconstruction import RIDGE, removal_costs
from .saliency import PerUnit, float_sums, no_units
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

RIDGES = (1e-2, 1e-1, 1.0)  # times the mean square of an activation
# A smaller one may serve held-out tokens a little better by much larger weights, with which gradients explode. That is
# worth it where others repeat what goes: there it leaves less than this share of the error.
SMALL_RIDGE, WORTH_IT = 1e-6, 0.5
HELD_OUT = 4  # every fourth token chooses the ridge, and whether there is anything to gain
HEALING_TOKENS = 8192  # that a run heals on, or 16 examples where these have more
CHUNK = 2048  # tokens that are multiplied at a time
LONGEST = 512  # tokens of a row: a batch of 16 has as many as are worth reading
WIDEST = 4  # times the mean length: what is padded is computed too


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
        self._told: set[str] = set()

    def fewer(self, tokens: int) -> Healer:
        """Return one that works on so many tokens about, of examples spread over the batch."""
        rows = len(self._batch["attention_mask"])
        step = max(1, int(self._tokens.sum()) // tokens)
        fewer = Healer(self._model, {name: value[:: min(step, rows)] for name, value in self._batch.items()})
        fewer._told = self._told  # what the one has said the other needn't
        return fewer

    def readers(self, bound: BoundGroups) -> list[Reader]:
        """Return the matrices that are refitted where the units go that they read."""
        return readers_of(self._model, bound)

    def fisher(self, bound: BoundGroups) -> OutputFisher:
        """Look how much the model, as it is, minds errors behind its readers; where that fails, all count alike."""
        rows = zip(self._batch["input_ids"], self._batch["attention_mask"], strict=True)
        examples = [ids[real.bool()][None] for ids, real in rows]
        modules, found, reason = {r.name: r.module for r in self.readers(bound)}, OutputFisher(), ""
        try:
            with _looking_at(self._model):
                found = output_fisher(self._model, examples, modules)
            if missing := sorted(modules.keys() - found.rows.keys()):
                of = f"{len(missing)} of {len(modules)} matrices of {type(self._model).__name__}, such as {missing[0]}"
                reason = f"no gradient of logits that is finite reaches {of}"
        except torch.OutOfMemoryError:
            longest = max(example.numel() for example in examples)
            reason = f"a backward pass of {longest} tokens, beside what training holds, doesn't fit"
        except torch.AcceleratorError:  # of whatever was computed before: the device is lost
            raise
        except Exception as error:  # model code may fail with any exception type
            reason = f"the backward pass of {type(self._model).__name__} failed ({type(error).__name__}: {error})"
        if reason:
            self._warn(f"healing: errors count alike, whatever the token and output: {reason}")
        return found

    @torch.no_grad()
    def corrections(
        self, bound: BoundGroups, marked: PerUnit, pruned: PerUnit, fisher: OutputFisher | None = None
    ) -> dict[str, torch.Tensor]:
        """Return what is to be added to each reader's weight by the time its marked units are at zero.

        Args:
            fisher: what `fisher` has found; by default it is looked for.
        """
        found: dict[str, torch.Tensor] = {}
        readers, fisher = self.readers(bound), fisher or self.fisher(bound)
        self._name_unread(readers, marked)

        def refit(reader: Reader, rows: torch.Tensor) -> torch.Tensor:
            gone, weight = reader.columns(marked), reader.weight(bound)
            stays = ~gone & ~reader.columns(pruned)
            counted = fisher.of_tokens(reader.name, rows[self._tokens])
            said = self._said_by_others(counted, weight[:, gone], gone, stays)
            if said is not None:
                correction = torch.zeros_like(weight)
                correction[:, stays] = (weight[:, gone].to(said.dtype) @ said).to(weight.dtype)
                found[reader.name] = correction if reader.dim == 1 else correction.T.contiguous()
            return _healed(rows, said, gone, stays)

        self._read([reader for reader in readers if bool(reader.columns(marked).any())], refit)
        for name, correction in found.items():
            _leave_out(bound, name, correction, marked, pruned)
        return found

    @torch.no_grad()
    def costs(
        self,
        bound: BoundGroups,
        pruned: PerUnit,
        going: Mapping[str, int] | None = None,
        fisher: OutputFisher | None = None,
    ) -> PerUnit:
        """Return what is lost with each unit though the others are refitted, (L, U), of structures that are healed.

        See `reconstruction.removal_costs`: a unit's cost is what it adds where cheaper ones of its layer went before.

        Args:
            going: how many units of each pool of a layer will have gone, by structure. Each layer is then judged on
                what it reads where the cheapest of the earlier layers are gone and healed.
            fisher: what `fisher` has found, by which errors count; by default it is looked for.
        """
        shapes, pools = bound.shapes(), {name: group.pools for name, group in bound.groups.structures.items()}
        fisher = fisher or self.fisher(bound)
        found = {name: torch.zeros(shape, dtype=float_sums(bound.device)) for name, shape in shapes.items()}
        seen: set[tuple[str, int]] = set()

        def add(reader: Reader, rows: torch.Tensor) -> torch.Tensor | None:
            gram = _gram(fisher.of_tokens(reader.name, rows[self._tokens]))
            weight = fisher.of_errors(reader.name, reader.weight(bound).to(gram.dtype))
            leaving = no_units(shapes, bound.device)
            for structure, layer, axis in reader.axes:
                units = axis.layout.expand(torch.arange(shapes[structure][1], device=rows.device), -1)
                gone = pruned[structure][layer]
                costs = removal_costs(gram, weight, units, gone)
                found[structure][layer] += costs.to(found[structure].device)
                seen.add((structure, layer))
                if going is not None:
                    cheapest = lowest_units(costs[None], gone[None], going[structure], False, pools[structure])[0]
                    leaving[structure][layer] = cheapest & ~gone
            columns = reader.columns(leaving)
            if not bool(columns.any()):
                return None
            stays = ~columns & ~reader.columns(pruned)
            return _healed(rows, _solve(gram, RIDGE, columns, stays), columns, stays)

        self._read(self.readers(bound), add)
        return {
            name: costs.to(bound.device)
            for name, costs in found.items()
            if all((name, layer) in seen for layer in range(len(costs)))
        }

    def _name_unread(self, readers: list[Reader], marked: PerUnit) -> None:
        """Warn of structures whose units no linear layer reads; channels of the stream are never healed."""
        read = {structure for reader in readers for structure, _, _ in reader.axes} | {"embedding_channels"}
        for structure in sorted(name for name, units in marked.items() if bool(units.any()) and name not in read):
            of = f"{structure} of {type(self._model).__name__}"
            self._warn(f"healing: {of} aren't healed: no linear layer reads them")

    def _warn(self, message: str) -> None:
        """Warn, each message once: there are many periods, and in a process there may be several runs."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)

    def _read(self, readers: list[Reader], look: Callable[[Reader, torch.Tensor], torch.Tensor | None]) -> None:
        """Run the model, without its head, on the batch, and show what each reader is given, as far as there is room.

        Args:
            look: takes the rows (N T, C), padding among them, and returns what the reader is to be given instead.
        """
        looked = 0

        def hook(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = args[0].flatten(0, -2)
            if len(rows) != len(self._tokens):
                self._warn(f"{reader.name} isn't healed: it reads {len(rows)} rows of {len(self._tokens)} tokens")
                return args
            instead = look(reader, rows)
            nonlocal looked
            looked += 1
            return args if instead is None else (instead.view_as(args[0]), *args[1:])

        handles = [reader.module.register_forward_pre_hook(partial(hook, reader)) for reader in readers]
        try:
            with _looking_at(self._model):
                self._model.base_model(**self._batch, use_cache=False)
        except torch.OutOfMemoryError:
            left = f"{len(readers) - looked} of {len(readers)} matrices of {type(self._model).__name__}"
            self._warn(
                f"healing: beside what training holds there is no room to look at {left}: units go unhealed there"
            )
        finally:
            for handle in handles:
                handle.remove()

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
        errors[SMALL_RIDGE] = _error(check, weight, _solve(fit, SMALL_RIDGE, gone, stays), gone, stays)
        if errors[SMALL_RIDGE] < WORTH_IT * errors[best]:
            best = SMALL_RIDGE
        if not errors[best] < unhealed:
            return None
        return _solve(fit + check, best, gone, stays)


def _healed(rows: torch.Tensor, said: torch.Tensor | None, gone: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return what an old matrix makes of as the healed one makes of the units that stay.

    Args:
        said: the marked units by the others, (R, S); None where nothing is refitted.
    """
    healed = rows.clone()
    healed[:, gone] = 0 if said is None else (rows[:, stays].to(said.dtype) @ said.T).to(rows.dtype)
    return healed


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
def _looking_at(model: nn.Module) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with attention_in_fp32(model), ieee_fp32():  # a ridge of 1e-6 means nothing to TF32
            yield
    finally:
        for module in training:
            module.training = True


def unreadable(examples: list[Mapping[str, Any]]) -> str:
    """Return why a healer can't work on single examples, "" where it can."""
    for example in examples:
        if "input_ids" not in example:
            return f"the examples hold {sorted(example)}, no `input_ids`"
        other = [key for key, value in example.items() if torch.is_tensor(value) and _is_signal(value)]
        if other:
            return f"the examples hold `{other[0]}`, and it gives the model tokens alone"
    return ""


def _is_signal(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 2


def padded(examples: list[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Put the tokens of single examples, (n, T) each, into one batch that is padded on the right.

    Of a long row a window is taken, of the first row at its beginning, of the last at its end, of others between.
    """
    rows: list[torch.Tensor] = []
    for example in examples:
        ids = example["input_ids"]
        mask = example.get("attention_mask", torch.ones_like(ids))
        rows += [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    width = min(LONGEST, math.ceil(WIDEST * sum(map(len, rows)) / max(1, len(rows))))
    for index, row in enumerate(rows):
        start = max(0, len(row) - width) * index // max(1, len(rows) - 1)
        rows[index] = row[start : start + width]
    batch = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
    return {name: nn.utils.rnn.pad_sequence(each, batch_first=True).to(device) for name, each in batch.items()}
