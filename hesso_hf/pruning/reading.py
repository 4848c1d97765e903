"""What a model reads on a few examples, matrix by matrix, and how much it minds errors behind each.

Where processes hold parts of the matrices, all run the same pass and put one matrix together at a time; the main one
alone looks.
Shapes: N examples, T tokens, C columns of a matrix, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed.collectives import is_main_process
from ..distributed.passes import evaluating, run_up_to_head
from ..errors import HessoError
from ..hf_models.tiny_model import attention_in_fp32, ieee_fp32
from .fisher import OutputFisher, output_fisher
from .readers import Reader, readers_of
from .refit import StandIn
from .token_rows import TokenRows
from .weights.bound_groups import BoundGroups

logger = logging.get_logger(__name__)

FEWEST_TOKENS = 2048  # that units are judged and healed on, if there are as many
Look = Callable[[], torch.Tensor | None]
_FAILURES = {
    torch.OutOfMemoryError: "beside what training holds there is no room to look at",
    torch.linalg.LinAlgError: "values that aren't finite, or are too large, are read by",  # no factor of X^T X
}
_UNHEALED = "units go unhealed there"


class NoRoom(Exception):
    """A pass of all examples doesn't fit beside what training holds; one of half as many may."""


class ModelReading:
    """Passes of a model over a few examples.

    Args:
        model: which is run.
        batch: what its forward pass takes: `input_ids` (N, T) and `attention_mask`, padded on the right.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        self._model, self._batch = model, dict(batch)
        self._places = self._batch["attention_mask"].flatten().nonzero().flatten()  # of tokens among all rows
        self._told: set[str] = set()
        self._may_be_halved = False

    @property
    def tokens(self) -> int:
        """How many tokens a pass reads, padding left out."""
        return len(self._places)

    def fewer(self, tokens: int) -> Self:
        """Return one that works on so many tokens about, of examples spread over the batch."""
        rows = len(self._batch["attention_mask"])
        step = max(1, len(self._places) // tokens)
        fewer = type(self)(self._model, {name: value[:: min(step, rows)] for name, value in self._batch.items()})
        fewer._told = self._told  # what the one has said the other needn't
        return fewer

    @contextmanager
    def halving(self) -> Iterator[None]:
        """Have a pass that doesn't fit raise `NoRoom` meanwhile, where half of the examples are enough to look at."""
        self._may_be_halved = self.tokens >= 2 * FEWEST_TOKENS and len(self._batch["attention_mask"]) > 1
        try:
            yield
        finally:
            self._may_be_halved = False

    def halved(self) -> Self:
        """Return one that works on every second example, and say so."""
        fewer = self.fewer(self.tokens // 2)
        self._warn(
            f"healing: beside what training holds there is no room to read {self.tokens:,} tokens: from now on units "
            f"are judged and healed on {fewer.tokens:,}; set `healing_tokens` to as many as fit"
        )
        return fewer

    def on(self, model: PreTrainedModel) -> Self:
        """Return one that works on the model as an engine has prepared it, which may be another object."""
        other = copy.copy(self)
        other._model = model
        return other

    def readers(self, bound: BoundGroups) -> list[Reader]:
        """Return the matrices that are refitted where the units go that they read."""
        return readers_of(self._model, bound)

    def fisher(self, bound: BoundGroups, trial: Mapping[str, StandIn] | None = None) -> OutputFisher:
        """Look how much the model minds errors behind its readers; where that fails, all count alike.

        Args:
            trial: what stands in for units on trial, by reader; by default the model is looked at as it is.
        """
        rows = zip(self._batch["input_ids"], self._batch["attention_mask"], strict=True)
        examples = [ids[real.bool()][None] for ids, real in rows]
        readers, found, reason = self.readers(bound), OutputFisher(), ""
        modules = {reader.name: reader.module for reader in readers}
        try:
            with _on_trial(readers, trial or {}), _looking_at(self._model), bound.passes():
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
            alike = "healing: errors count alike, whatever the token and output"
            then = "CRIC: units are judged as the model is" if trial else alike
            self._warn(f"{then}: {reason}")
        return found

    def _counted(self, name: str, rows: torch.Tensor, fisher: OutputFisher) -> TokenRows:
        """Return what a reader is given of the tokens, as much of each as errors count there."""
        return TokenRows(rows, self._places, fisher.scale_of(name, len(self._places)))

    def _looked(
        self, bound: BoundGroups, reader: Reader, rows: torch.Tensor, look: Look, else_: str = _UNHEALED
    ) -> torch.Tensor | None:
        """Have the main process alone look where processes hold parts; None on the others, and where it has no room."""
        if not bound.sharded:
            return look()
        try:
            with torch.autocast(rows.device.type, enabled=False):  # the whole model was called, which may turn it on
                return look() if is_main_process() else None
        except tuple(_FAILURES) as error:  # the others go on with the pass, and so must this one
            self._warn(f"healing: {_FAILURES[type(error)]} {reader.name}: {else_}")
            return None

    def _warn(self, message: str) -> None:
        """Warn, each message once: there are many periods, and in a process there may be several runs."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)

    def _read(
        self,
        bound: BoundGroups,
        readers: list[Reader],
        look: Callable[[Reader, torch.Tensor], torch.Tensor | None],
        else_: str = _UNHEALED,
    ) -> None:
        """Run the model, without its head, on the batch, and show what each reader is given, as far as there is room.

        Args:
            look: takes the rows (N T, C), padding among them, and returns what the reader is to be given instead.
            else_: what a warning says of the readers that there is no room for.

        Raises:
            NoRoom: where there is none on this device, and whoever calls may take half of the examples (`halving`).
        """
        if not readers:
            return
        looked, called = set[str](), set[str]()

        def hook(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            called.add(reader.name)
            rows = args[0].flatten(0, -2)
            if len(rows) != self._batch["attention_mask"].numel():
                given = self._batch["attention_mask"].numel()
                self._warn(f"{reader.name} isn't healed: it reads {len(rows)} rows of {given} tokens")
                return args
            instead = look(reader, rows)
            looked.add(reader.name)
            return args if instead is None else (instead.view_as(args[0]), *args[1:])

        try:
            with _hooked(readers, hook), _looking_at(self._model), bound.passes():
                run_up_to_head(self._model, {**self._batch, "use_cache": False})
        except tuple(_FAILURES) as error:
            if isinstance(error, torch.OutOfMemoryError) and self._may_be_halved and not bound.sharded:
                raise NoRoom from None
            why = _FAILURES[type(error)]
            left = f"{len(readers) - len(looked)} of {len(readers)} matrices of {type(self._model).__name__}"
            if bound.sharded:  # the others wait for this process
                raise HessoError(f"`healing`: {why} {left}; use 'off'") from error
            self._warn(f"healing: {why} {left}: {else_}")
        else:
            if missing := [reader.name for reader in readers if reader.name not in called]:
                of = f"{len(missing)} of {len(readers)} matrices of {type(self._model).__name__}, such as {missing[0]}"
                self._warn(f"healing: a forward pass calls no module for {of}: {else_}")


@contextmanager
def _hooked(readers: list[Reader], hook: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    with ExitStack() as hooks:
        for reader in readers:
            hooks.enter_context(reader.module.register_forward_pre_hook(partial(hook, reader)))
        yield


def _on_trial(readers: list[Reader], trial: Mapping[str, StandIn]) -> AbstractContextManager[None]:
    """Have readers read what stands in for units on trial."""

    def read(reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = args[0].flatten(0, -2)
        return (trial[reader.name].healed(rows).view_as(args[0]), *args[1:])

    return _hooked([reader for reader in readers if reader.name in trial], read)


@contextmanager
def _looking_at(model: nn.Module) -> Iterator[None]:
    with evaluating(model), attention_in_fp32(model), ieee_fp32():  # a ridge of 1e-6 means nothing to TF32
        yield
