"""Measuring with a trainer's own loss: what structures cost before training, and CRIC's way to zero."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import from_all, from_main
from ..distributed.parts import is_sharded, named_parameters
from ..errors import HessoError
from ..hf_models.tiny_model import attention_in_fp32
from ..pruning.calibration import LossCurves, measure_curves, usable
from ..pruning.cric_state import PROBE_BATCH_SIZE, PROBE_BATCHES
from ..pruning.healing import Healer
from ..pruning.optimizer import HessoOptimizer
from ..pruning.weights.snapshot import kept_random_state
from ..structures.groups import PruningGroups
from .rows import SingleExamples, is_indexed, tokens_of

logger = logging.get_logger(__name__)

NO_EXAMPLES = "there is neither a `train_dataset` nor a `get_train_dataloader` of the trainer's own over rows by index"


def _made(loader: DataLoader, count: int, between: bool) -> list[Any]:
    """Return the main process' first batches, or those between them, on all processes; no worker is started for it."""
    assert loader.batch_sampler is not None
    indices = itertools.islice(loader.batch_sampler, int(between), 2 * count, 2)
    return from_main([loader.collate_fn([loader.dataset[index] for index in batch]) for batch in indices])


def makes_its_loader(trainer: Trainer) -> bool:
    """Whether the batches come of another loader than Trainer makes, the class' own or one put in its place."""
    made_by = getattr(trainer.get_train_dataloader, "__func__", None)
    return made_by is not Trainer.get_train_dataloader


def _items_in(trainer: Trainer, batch: Any) -> Any:
    """Return what a loss is divided by, as a trainer counts it over processes, which all have this batch.

    It isn't gathered from them: one that fails alone would leave the others waiting.
    """
    args, count = trainer.args, trainer._get_num_items_in_batch
    if args.world_size == 1 or not args.average_tokens_across_devices:
        return count([batch], args.device)
    args.average_tokens_across_devices = False
    try:
        items = count([batch], args.device)
    finally:
        args.average_tokens_across_devices = True
    return None if items is None else items * args.world_size


class Measurer:
    """Measures a model with a trainer's loss on examples, and leaves the trainer as it was.

    Args:
        trainer: whose data and loss are used.
        config: of the run.
        counted: names of the trainer's attributes in which its loss counts; those that it hasn't don't matter.
        generated: names of attributes in which a trainer keeps what it generates to learn from.

    Attributes:
        generates: says so of a trainer that has one of these, "" of others.
        singles: takes examples of its data sets.
    """

    def __init__(self, trainer: Trainer, config: HessoConfig, counted: Iterable[str], generated: Iterable[str]) -> None:
        self._trainer, self._config, self._counted = trainer, config, tuple(counted)
        self.singles = SingleExamples(trainer)
        self.generates = ""
        if not vars(trainer).keys().isdisjoint(generated):
            self.generates = f"what {type(trainer).__name__} learns from it generates while it trains"

    @property
    def has_data(self) -> bool:
        """Whether the trainer has training data, in a data set or by a loader of its own."""
        return self._trainer.train_dataset is not None or makes_its_loader(self._trainer)

    def why_none(self) -> str:
        """Return why there are no examples before training, "" where there are."""
        if self._trainer.train_dataset is None and self._loader() is None:
            return NO_EXAMPLES
        return self.generates

    def curves(self, model: PreTrainedModel, groups: PruningGroups, healer: Healer | None = None) -> LossCurves:
        """Measure what each structure costs, healed where the run heals."""
        trainer, config = self._trainer, self._config
        if reason := self.why_none():
            logger.warning(f"nothing is measured before training, the structures share the cut evenly: {reason}")
            return LossCurves({}, {})
        examples = self.examples(config.calibration_examples)
        shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
        found, reason = LossCurves({}, {}), ""
        try:
            with self._uncounted(), attention_in_fp32(model):  # autocast comes with Accelerate, later
                found = measure_curves(model, groups, examples, self._loss, config, healer, progress=shown)
        except torch.OutOfMemoryError:
            longest = max(map(tokens_of, examples))
            reason = f"there is no room for a backward pass of {longest:,} tokens (gradient checkpointing makes some)"
            if is_sharded(named_parameters(model).values()):  # the others wait for this process
                number = config.calibration_examples
                raise HessoError(f"`calibration_examples` ({number}): {reason}; set it to 0") from None
        if reason := next(filter(None, from_all(reason)), ""):  # on all processes, where it fails on one
            logger.warning(f"what structures cost isn't measured, they share the cut evenly: {reason}")
            return LossCurves({}, {})
        return found

    def probe(self, model: PreTrainedModel, optimizer: HessoOptimizer) -> None:
        """Let CRIC look along the way to zero, by gradients of a few examples that are the same on all processes."""
        trainer = self._trainer
        if reason := self.why_none():
            raise HessoError(f"`cric_mode` ('probe') takes examples of the training data: {reason}; use 'path'")
        model.train()  # as the trainer does before each step, the optimizer's mode with it
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # type: ignore[attr-defined]
        with kept_random_state(trainer.args.device), self._uncounted():
            count = PROBE_BATCHES * PROBE_BATCH_SIZE
            examples = usable(model, self.examples(count), self._loss)
            if not examples:
                raise HessoError("`cric_mode` ('probe'): no example of `train_dataset` gives a finite loss; use 'path'")
            batches = [examples[start : start + PROBE_BATCH_SIZE] for start in range(0, count, PROBE_BATCH_SIZE)]
            scale = 1024.0 if trainer.accelerator.mixed_precision == "fp16" else 1.0
            optimizer.probe([self._loss_of(model, batch, scale) for batch in batches if batch], scale)

    def check_examples(self, why_none: str) -> None:
        """Refuse, where there are no examples, what was asked for by name and can't be had without.

        Args:
            why_none: the reason, "" where there are some.

        Raises:
            HessoError: naming the option and the remedy.
        """
        config, first = self._config, "" if self.generates else "give the trainer one, or "
        needing = {
            "cric_mode": config.cric_way == "probe",
            "stream_basis": config.stream_basis == "principal",
            "replay_share": config.replay_share and config.replay_share != "auto",
        }
        for name in (name for name, asked in needing.items() if asked and why_none):
            raise HessoError(f"`{name}` ({getattr(config, name)!r}): {why_none}; {first}leave `{name}` out")

    def examples(self, count: int, between: bool = False) -> list[Any]:
        """Take examples spread over the training data (a stream's first ones), one a batch.

        So the batch size and the number of processes don't matter to what is measured on them. They are on the device,
        the same on all processes, which all call this. Where a trainer has a loader of its own, they are batches as
        that makes them, the first ones of the main process.

        Args:
            between: take those that lie between, as far as there are others.
        """
        trainer = self._trainer
        with kept_random_state(trainer.args.device):  # collators and samplers may draw random numbers
            if (loader := self._loader()) is not None:
                taken = _made(loader, count, between)
            else:
                taken = self.singles.of(trainer.train_dataset, count, between)
            return [trainer._prepare_inputs(example) for example in taken]

    def _loader(self) -> DataLoader | None:
        """Return the data loader of a trainer that makes its own; None where it reads a stream, perhaps but once."""
        if not makes_its_loader(self._trainer):
            return None
        loader = self._trainer.get_train_dataloader()
        indexed = isinstance(loader, DataLoader) and loader.batch_sampler is not None and is_indexed(loader.dataset)
        return loader if indexed else None

    def tokens(self, count: int, between: bool = False, longest: int | None = None) -> list[Any]:
        """Take examples with about so many tokens that the model reads, or all that there are.

        Args:
            longest: tokens of a row that are read at most; by default all are.
        """
        return self.examples(max(16, math.ceil(count / self.tokens_per_example(longest))), between)

    def tokens_per_example(self, longest: int | None = None) -> float:
        """Return how many tokens the model reads of what `examples` gives, by a few of them, at least 1."""
        few = self.examples(16)
        return max(1.0, sum(tokens_of(example, longest) for example in few) / max(1, len(few)))

    def tokens_per_micro_batch(self) -> int:
        """Return about how many tokens a process reads in one forward pass of training."""
        in_each = self._trainer._train_batch_size if self._loader() is None else 1  # a loader's own are whole batches
        return round(self.tokens_per_example() * in_each)

    def loss(self, model: PreTrainedModel, batch: Any) -> torch.Tensor:
        """Return the trainer's loss of a batch, which nothing counts."""
        with self._uncounted(), attention_in_fp32(model):
            return self._loss(model, batch)

    def _loss(self, model: PreTrainedModel, batch: Any) -> torch.Tensor:
        trainer = self._trainer
        with trainer.compute_loss_context_manager():
            items = _items_in(trainer, batch)
            # it may take labels out of the dict
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        return loss[0] if isinstance(loss, tuple) else loss

    def _loss_of(self, model: PreTrainedModel, examples: list[Any], loss_scale: float) -> Callable[[], torch.Tensor]:
        """Return what computes the mean loss of some examples, with all but the last one's gradients taken already."""
        scale = loss_scale / len(examples)

        def loss() -> torch.Tensor:
            torch.manual_seed(self._trainer.args.seed)  # the same dropout at every point
            for example in examples[:-1]:
                (self._loss(model, example) * scale).backward()
            return self._loss(model, examples[-1]) * scale

        return loss

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Put back what the trainer counted where it computed a loss; one batch is all that is accumulated here."""
        held = vars(self._trainer)
        names = ("current_gradient_accumulation_steps", *self._counted)
        before = {name: copy.deepcopy(held[name]) for name in names if name in held}
        held["current_gradient_accumulation_steps"] = 1
        try:
            yield
        finally:
            held.update(before)
