"""Replay: what the base model knew is kept by text that it wrote itself before training, on which the student's
next-token distributions stay near the base model's.

The loss of a micro-batch is (1 - share) times the trainer's own plus share times KL(base || student) on windows of
replay, the mean over their tokens, which come in a forward pass of their own.
Shapes: R windows a micro-batch, T tokens each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..compat import whole_rows
from ..config import HessoConfig
from ..config.names import AUTO_REPLAY_SHARE, TAUGHT_REPLAY_SHARE
from ..distributed.collectives import from_main, is_main_process
from ..errors import CheckpointMismatchError, HessoError, counted
from ..hf_models.tiny_model import attention_in_fp32
from ..pruning.compaction import parallel_of
from .distillation import StepMean, accumulated, is_scaled
from .divergence import divergence
from .replay_text import Script, load_windows, order, read_windows, save_windows, write_windows
from .teacher import Teacher

logger = logging.get_logger(__name__)

LONGEST = 512  # tokens of a window
# What writing may cost where nobody asks for it, in tokens written a token of the run: writing one takes a forward
# pass, training on one three times that, so this is 5% of the run.
MOST_WRITTEN = 0.15
FEWEST = 16  # windows: fewer are learnt by heart
JUDGED, JUDGED_SHARE = 4096, 0.25  # tokens to judge units on where none are trained on, and of the run's tokens at most
FOLDER = "replay"


@dataclass(frozen=True)
class ReplaySizes:
    """How much replay a run takes.

    Attributes:
        share: of all tokens trained on.
        rows, length: windows a micro-batch of one process, and their tokens.
        windows: different ones.
        dear: whether writing them takes more than `MOST_WRITTEN` of the run.
    """

    share: float
    rows: int
    length: int
    windows: int
    dear: bool = False

    @classmethod
    def of(cls, share: float, micro_batch: int, micro_batches: int, longest: int | None = None) -> ReplaySizes:
        """Choose them for a run of `micro_batches`, over all processes, of so many tokens each.

        Args:
            longest: tokens that the model can read at once, where there is a limit.
        """
        wanted = share / (1 - share) * micro_batch
        rows = max(1, math.ceil(wanted / min(LONGEST, longest or LONGEST)))
        length = max(2, round(wanted / rows))
        most = int(MOST_WRITTEN * micro_batch * micro_batches / length)
        return cls(share, rows, length, min(rows * micro_batches, max(FEWEST, most)), most < FEWEST)

    def to_judge(self, tokens: int) -> ReplaySizes:
        """Return what is written for units to be judged on alone, in a run of so many tokens."""
        count = max(1, round(min(JUDGED, JUDGED_SHARE * tokens) / self.length))
        return replace(self, share=0.0, rows=0, windows=count)


@dataclass(frozen=True)
class Known:
    """What the base model knew, for units to be judged on.

    Attributes:
        windows: that it wrote, token ids (N, T).
        record: what a checkpoint says of them.
    """

    windows: torch.Tensor
    record: dict[str, Any]

    def examples(self, tokens: int) -> list[dict[str, torch.Tensor]]:
        """Return about so many tokens of it, or all that there are, as examples of one window each."""
        count = max(1, round(tokens / self.windows.shape[1]))
        return [{"input_ids": window} for window in self.windows[:count].split(1)]


class Replay:
    """The replay of a run, the loss that it adds, and what that was lately.

    Args:
        trainer: whose loss it is mixed with.
        teacher: the base model.
        sizes: how much of it.
        windows: token ids, (N, T).
        source: what wrote them.
    """

    def __init__(
        self, trainer: Trainer, teacher: Teacher, sizes: ReplaySizes, windows: torch.Tensor, source: str
    ) -> None:
        self._trainer, self.teacher, self.sizes, self.windows, self.source = trainer, teacher, sizes, windows, source
        self._step, self._taken = -1, 0  # the step that is being made, and its micro-batches so far
        self._scaled = True  # whether losses are shares of an accumulated batch already
        self._added: torch.Tensor | None = None  # what the last micro-batch's loss has of replay
        self._noted = StepMean(trainer)

    def mixed(self, loss: torch.Tensor, model: nn.Module, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """Return the loss to train on: the trainer's own of a micro-batch, mixed with that of its replay.

        Args:
            num_items: as the trainer's own `compute_loss` took it.
        """
        ids = self._next_windows()
        ids = (ids.pin_memory() if loss.is_cuda else ids).to(loss.device, non_blocking=True)
        inputs = {"input_ids": ids}  # with a mask the host would wait to know whether it masks anything
        if (parallel := parallel_of(model)) is not None:  # it looks for unused parameters in one forward, the user's
            model = parallel.module
        with whole_rows(inputs):
            logits = model(**inputs, use_cache=False).logits
        term = divergence(self.teacher, inputs, logits, None, temperature=1.0) / ids.numel()
        parts = accumulated(self._trainer)
        self._scaled = is_scaled(self._trainer, num_items)
        share = self.sizes.share
        mixed = (1 - share) * loss + share * term / (parts if self._scaled else 1)
        self._noted.add(term.detach() / parts)
        self._added = (mixed.detach() - loss.detach()).mean() / (1 if self._scaled else parts)
        return mixed

    def _next_windows(self) -> torch.Tensor:
        """Return a micro-batch's windows (R, T): they follow from the step, so a resumed run goes on with the same."""
        trainer, rows = self._trainer, self.sizes.rows
        if trainer.state.global_step != self._step:
            self._step, self._taken = trainer.state.global_step, 0
        processes = trainer.accelerator.num_processes
        micro = self._step * trainer.args.gradient_accumulation_steps + self._taken
        self._taken += 1
        place = (micro * processes + trainer.accelerator.process_index) * rows
        return self.windows[order(len(self.windows), place, rows, trainer.args.seed)]

    # -- what it was lately ---------------------------------------------------------------------------------------

    def without(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the last micro-batch's loss without replay, as the trainer would have counted it."""
        return loss if self._added is None else loss - self._added

    def mean(self) -> float:
        """Return the mean divergence a step since the last call; NaN where there was none."""
        return self._noted.mean()

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint and the report say of it."""
        return {**asdict(self.sizes), "source": self.source, "fingerprint": self.teacher.fingerprint}


def check_replay(saved: Mapping[str, Any], teacher: Teacher, folder: str) -> None:
    """Compare the base model with the one whose replay a checkpoint was trained with.

    Raises:
        CheckpointMismatchError: where it was another one.
    """
    if saved["fingerprint"] != teacher.fingerprint:
        raise CheckpointMismatchError(
            f"{folder} was trained with replay of another base model: make the trainer with the original model, the "
            "checkpoint's weights are loaded on resuming"
        )


def share_of(config: HessoConfig, taught: bool = False) -> float:
    """Return the share of replay that is asked for.

    Args:
        taught: whether the base model teaches the user's data too.
    """
    automatic = TAUGHT_REPLAY_SHARE if taught else AUTO_REPLAY_SHARE
    return automatic if config.replay_share == "auto" else float(config.replay_share or 0.0)


def why_not(model: PreTrainedModel) -> str:
    """Return why there is no replay for a model, "" where there can be."""
    if model.config.is_encoder_decoder or not model.can_generate():
        return f"{type(model).__name__} writes no text from its own beginning"
    return ""


def make_replay(trainer: Trainer, teacher: Teacher, config: HessoConfig, sizes: ReplaySizes, tokenizer: Any) -> Replay:
    """Have the windows of a run written, or read from what is given; made once, and found again in `output_dir`.

    Raises:
        HessoError: where the model can't write, or the data set can't be read, or there are too few windows.
    """
    source, seed = config.replay_dataset or teacher.source, trainer.args.seed
    folder = Path(trainer.args.output_dir or "") / FOLDER
    described = {"source": source, "fingerprint": teacher.fingerprint, "seed": seed, **asdict(sizes)}
    kept = {name: str(value) for name, value in described.items()}
    windows: torch.Tensor | None = from_main(load_windows(folder, kept) if is_main_process() else None)
    if windows is None:
        shown = is_main_process() and not trainer.args.disable_tqdm
        windows = _windows(teacher, config, sizes, tokenizer, seed, shown)
        save_windows(folder, windows, kept)
    return Replay(trainer, teacher, sizes, windows, source)


def _windows(
    teacher: Teacher, config: HessoConfig, sizes: ReplaySizes, tokenizer: Any, seed: int, shown: bool
) -> torch.Tensor:
    if config.replay_dataset is None:
        logger.info(f"the model writes {sizes.windows} windows of {sizes.length} tokens for replay")
        with teacher.whole() as model, attention_in_fp32(model):
            return write_windows(model, Script.of(model, tokenizer), sizes.windows, sizes.length, seed, shown)
    found = read_windows(config.replay_dataset, tokenizer, sizes.windows, sizes.length)
    if len(found) < (fewest := min(FEWEST, sizes.windows)):
        raise HessoError(
            f"`replay_dataset` ({config.replay_dataset!r}) gives {counted(len(found), 'window')} of {sizes.length} "
            f"tokens; give {fewest} at least"
        )
    return found
