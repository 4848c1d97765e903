"""Healing: what marked units contribute through the matrix that reads them is refitted into the columns that stay.

With X the activations that a matrix W reads, S the units that stay and R the marked ones, W_S takes on W_R B, where
B = argmin |X_R - X_S B^T|^2 + ridge |B|^2 says the marked units by the others. The matrices are taken in the order of
the forward pass, each on activations that its healed predecessors make: one forward pass of all examples finds all.
Where processes hold parts of the matrices, all run the same pass and put one matrix together at a time; the main one
alone looks, and each takes what belongs to its parts.
Shapes: N examples, T tokens, C columns of a matrix, O outputs; S and R index columns.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed.collectives import broadcast_, from_main, is_main_process
from ..distributed.passes import evaluating, gathers_in_hooks
from ..errors import HessoError
from ..hf_models.tiny_model import attention_in_fp32, ieee_fp32
from .fisher import OutputFisher, output_fisher
from .ranking import lowest_units
from .readers import Reader, readers_of
from .reconstruction import RIDGE, removal_costs
from .refit import gram_of, healed, said_by_others, solved
from .saliency import PerUnit, float_sums, no_units, on_device
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

HEALING_TOKENS = 8192  # that a run heals on, or 16 examples where these have more
LONGEST = 512  # tokens of a row: a batch of 16 has as many as are worth reading
WIDEST = 4  # times the mean length: what is padded is computed too
Look = Callable[[], torch.Tensor | None]
_NO_ROOM = "beside what training holds there is no room to look at"


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

    def on(self, model: PreTrainedModel) -> Healer:
        """Return one that works on the model as an engine has prepared it, which may be another object."""
        other = copy.copy(self)
        other._model = model
        return other

    def readers(self, bound: BoundGroups) -> list[Reader]:
        """Return the matrices that are refitted where the units go that they read."""
        return readers_of(self._model, bound)

    def fisher(self, bound: BoundGroups) -> OutputFisher:
        """Look how much the model, as it is, minds errors behind its readers; where that fails, all count alike."""
        rows = zip(self._batch["input_ids"], self._batch["attention_mask"], strict=True)
        examples = [ids[real.bool()][None] for ids, real in rows]
        modules, found, reason = {r.name: r.module for r in self.readers(bound)}, OutputFisher(), ""
        try:
            with _looking_at(self._model), bound.passes():
                found = output_fisher(self._model, examples, modules)
            if missing := sorted(modules.keys() - found.rows.keys()):
                of = f"{len(missing)} of {len(modules)} matrices of {type(self._model).__name__}, such as {missing[0]}"
                reason = f"no gradient of logits that is finite reaches {of}"
        except torch.OutOfMemoryError:
            longest = max(example.numel() for example in examples)
            reason = f"a backward pass of {longest} tokens, beside what training holds, doesn't fit"
            if bound.sharded:  # the others wait for this process
                raise HessoError(f"`healing`: {reason}; use 'off'") from None
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
    ) -> dict[str, list[torch.Tensor]]:
        """Return what is to be added to each reader's weight by the time its marked units are at zero.

        Args:
            fisher: what `fisher` has found; by default it is looked for.

        Returns:
            By the reader's name, what belongs to each piece of it that this process holds: all of it where that is one.
        """
        readers, fisher = self.readers(bound), fisher or self.fisher(bound)
        made: dict[str, torch.Tensor] = {}
        found: dict[str, list[torch.Tensor]] = {}
        self._name_unread(readers, marked)

        def refit(reader: Reader, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            gone = reader.columns(marked).to(rows.device)
            stays = ~gone & ~reader.columns(pruned).to(rows.device)
            counted = fisher.of_tokens(reader.name, rows[self._tokens])
            said = said_by_others(counted, weight[:, gone], gone, stays)
            if said is not None:
                added = torch.zeros_like(weight)
                added[:, stays] = (weight[:, gone].to(said.dtype) @ said).to(weight.dtype)
                made[reader.name] = added if reader.dim == 1 else added.T.contiguous()
                _leave_out(bound, reader.name, made[reader.name], marked, pruned)
            return healed(rows, said, gone, stays)

        def look(reader: Reader, rows: torch.Tensor) -> torch.Tensor | None:
            weight, held = reader.weight(bound), bound.held[reader.name]
            instead = self._looked(bound, reader, rows, lambda: refit(reader, weight, rows))
            if bound.sharded:
                made.setdefault(reader.name, weight.new_zeros(held.shape))
                broadcast_([made[reader.name]])
            if reader.name in made:
                found[reader.name] = held.pieces_of(made.pop(reader.name))
            return instead

        self._read(bound, [reader for reader in readers if bool(reader.columns(marked).any())], look)
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

        def add(reader: Reader, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
            gram = gram_of(fisher.of_tokens(reader.name, rows[self._tokens]))
            weight = fisher.of_errors(reader.name, weight.to(gram.dtype))
            leaving = no_units(shapes, rows.device)
            for structure, layer, axis in reader.axes:
                units = axis.layout.expand(torch.arange(shapes[structure][1], device=rows.device), -1)
                gone = pruned[structure][layer].to(rows.device)
                costs = removal_costs(gram, weight, units, gone)
                found[structure][layer] += costs.to(found[structure].device)
                seen.add((structure, layer))
                if going is not None:
                    cheapest = lowest_units(costs[None], gone[None], going[structure], False, pools[structure])[0]
                    leaving[structure][layer] = cheapest & ~gone
            columns = reader.columns(leaving)
            if not bool(columns.any()):
                return None
            stays = ~columns & ~reader.columns(pruned).to(rows.device)
            return healed(rows, solved(gram, RIDGE, columns, stays), columns, stays)

        def look(reader: Reader, rows: torch.Tensor) -> torch.Tensor | None:
            weight = reader.weight(bound)
            return self._looked(bound, reader, rows, lambda: add(reader, weight, rows))

        self._read(bound, self.readers(bound), look)
        judged = {name: c for name, c in found.items() if all((name, layer) in seen for layer in range(len(c)))}
        return on_device(from_main(judged) if bound.sharded else judged, bound.device)

    def _looked(self, bound: BoundGroups, reader: Reader, rows: torch.Tensor, look: Look) -> torch.Tensor | None:
        """Have the main process alone look where processes hold parts; None on the others, and where it has no room."""
        if not bound.sharded:
            return look()
        try:
            with torch.autocast(rows.device.type, enabled=False):  # the whole model was called, which may turn it on
                return look() if is_main_process() else None
        except torch.OutOfMemoryError:  # the others go on with the pass, and so must this one
            self._warn(f"healing: {_NO_ROOM} {reader.name}: units go unhealed there")
            return None

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

    def _read(
        self, bound: BoundGroups, readers: list[Reader], look: Callable[[Reader, torch.Tensor], torch.Tensor | None]
    ) -> None:
        """Run the model, without its head, on the batch, and show what each reader is given, as far as there is room.

        Args:
            look: takes the rows (N T, C), padding among them, and returns what the reader is to be given instead.
        """
        looked: set[str] = set()

        def hook(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = args[0].flatten(0, -2)
            if len(rows) != len(self._tokens):
                self._warn(f"{reader.name} isn't healed: it reads {len(rows)} rows of {len(self._tokens)} tokens")
                return args
            instead = look(reader, rows)
            looked.add(reader.name)
            return args if instead is None else (instead.view_as(args[0]), *args[1:])

        try:
            with _hooked(readers, hook), _looking_at(self._model), bound.passes():
                _run(self._model, self._batch)
        except torch.OutOfMemoryError as error:
            left = f"{len(readers) - len(looked)} of {len(readers)} matrices of {type(self._model).__name__}"
            if bound.sharded:  # the others wait for this process
                raise HessoError(f"`healing`: {_NO_ROOM} {left}; use 'off'") from error
            self._warn(f"healing: {_NO_ROOM} {left}: units go unhealed there")


def _leave_out(bound: BoundGroups, name: str, correction: torch.Tensor, marked: PerUnit, pruned: PerUnit) -> None:
    """Put what would be added to units that go themselves at zero, such as channels of the stream."""
    for structure, layer, axis in bound.axes[name]:
        if structure in marked:
            gone = marked[structure][layer] | pruned[structure][layer]
            correction.mul_(axis.spread((~gone).to(correction), correction.dim()))


@contextmanager
def _hooked(readers: list[Reader], hook: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    handles = [reader.module.register_forward_pre_hook(partial(hook, reader)) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Run a model up to its last reader."""
    if not gathers_in_hooks(model):
        model.base_model(**batch, use_cache=False)
        return
    # what lies in no layer is gathered where the whole model is called: its head is computed, of as little as may be
    one = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    model(**batch, use_cache=False, **one)


@contextmanager
def _looking_at(model: nn.Module) -> Iterator[None]:
    with evaluating(model), attention_in_fp32(model), ieee_fp32():  # a ridge of 1e-6 means nothing to TF32
        yield


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
