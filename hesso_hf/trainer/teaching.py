"""What a run learns beside the user's own loss: from a teacher on the user's data, from the base model on replay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import from_all, world_size
from ..engines.engine import Engine
from ..errors import CheckpointMismatchError, HessoError
from ..structures.cut import device_with_room
from .distillation import Distillation, check_labels
from .measure import Measurer
from .reached import Reached
from .replay import Known, Replay, ReplaySizes, check_replay, make_replay, share_of, why_not
from .replay_text import Script
from .teacher import Teacher, make_teacher, teacher_size

logger = logging.get_logger(__name__)

_DEAR = "the run is so short that writing it would take more than a twentieth of the time"
_ON_SOME = "; units are judged on a little of it all the same (windows: {})"
_OF_THE_TRAINER = ("every_n_layers", "offload")  # among the arguments of checkpointing, and not torch's


class Teaching:
    """Distillation and replay of a run, as far as they are asked for.

    Teachers are made with this, before a step is taken or a checkpoint is loaded.

    Args:
        trainer: whose loss is mixed with theirs.
        config: of the run.
        engine: which divides teachers as it divides the student.
        model: the student.
        tokenizer: the student's.
        measurer: which has the run's examples.

    Attributes:
        distillation: from a teacher, where there is one.
        replay: of what the base model wrote, where there is some; `begin` or `go_on` makes it.
        known: the windows of that, or where none are trained on some that units are judged on alone.

    Raises:
        HessoError: where there can't be such a teacher, or no replay for such a model.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: HessoConfig,
        engine: Engine,
        model: PreTrainedModel,
        tokenizer: Any,
        measurer: Measurer,
    ) -> None:
        self._trainer, self._config, self._tokenizer = trainer, config, tokenizer
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._measurer, self._replays = measurer, False
        self._reached = Reached(trainer, config)
        self.distillation: Distillation | None = None
        self.replay: Replay | None = None
        self.known: Known | None = None
        self._base: Teacher | None = None
        self._unlearnt: dict[str, Any] | None = None  # a teacher that doesn't know the user's data
        alpha = config.distillation_alpha
        asks = config.distill_from is not None or alpha not in (0, "auto")  # else the base model, where replay has it
        if asks:
            check_labels(trainer, config, measurer)
        if _wants_replay(trainer, config, engine, model, tokenizer, measurer):
            self._base = make_teacher(None, model, tokenizer, engine, f"`replay_share` ({config.replay_share!r})")
        if asks:
            teacher = self._base if config.distill_from is None else None
            asked = f"`distillation_alpha` ({alpha!r})"
            teacher = teacher or make_teacher(config.distill_from, model, tokenizer, engine, asked)
            self.distillation = Distillation(trainer, config, teacher)

    def begin(self, steps: int) -> None:
        """Have replay written for a run of so many optimizer steps; all processes call it."""
        self._learn_from(self._base)  # however short the run is
        if self.distillation is not None and not self.distillation.knows(self._measurer):
            self._unlearnt, self.distillation = self.distillation.record() | {"alpha": 0.0}, None
        if self._base is not None:
            self._take(self._written(self._base, steps))

    def _take(self, written: Replay | None) -> None:
        """Have what was written, and the base model no longer than it is learnt from."""
        self.known = Known(written.windows, written.record()) if written is not None else None
        self.replay = written if written is not None and written.sizes.share else None
        if self.replay is None and (self.distillation is None or self.distillation.teacher is not self._base):
            self._base = None

    def _written(self, base: Teacher, steps: int) -> Replay | None:
        if reason := self._measurer.why_none():
            _say_without(self._config, reason)
            return None
        tokens = self._measurer.tokens_per_micro_batch()
        batches = steps * self._trainer.args.gradient_accumulation_steps * world_size()
        taught = self.distillation is not None and self.distillation.teacher is base
        sizes = ReplaySizes.of(share_of(self._config, taught), tokens, batches, self._longest)
        if sizes.dear and self._config.replay_share == "auto" and self._config.replay_dataset is None:
            sizes, judges = sizes.to_judge(tokens * batches), self._config.reads_examples
            _say_without(self._config, _DEAR + judges * _ON_SOME.format(sizes.windows))
            if not judges:
                return None
        return make_replay(self._trainer, base, self._config, sizes, self._tokenizer)

    def _learn_from(self, base: Teacher | None) -> None:
        wanted = self._config.distillation_alpha == "auto" and self._config.distill_from is None
        if wanted and base is not None and self.distillation is None and self._unlearnt is None:
            self.distillation = Distillation(self._trainer, self._config, base)

    def go_on(self, saved: Mapping[str, Any], folder: str, judges: bool) -> None:
        """Compare teachers with those that a checkpoint was trained with, and have the same replay.

        Args:
            saved: the record of the run in the checkpoint.
            judges: whether units are yet to be judged.

        Raises:
            CheckpointMismatchError: where they were others.
        """
        taught, replayed, known = (saved.get(name) for name in ("distillation", "replay", "known"))
        if taught is not None and not taught["alpha"]:  # it didn't know the data
            self._unlearnt, self.distillation, taught = taught, None, None
        elif taught is not None:
            self._learn_from(self._base)
        if self.distillation is not None:
            self.distillation.go_on(taught, folder)
        found = replayed or (known if judges else None)
        if self._base is None and (found is not None or (taught is not None and self.distillation is None)):
            what = "replay" if replayed or not taught else "a teacher"
            raise CheckpointMismatchError(
                f"{folder} was trained with {what}, and here there is none (a warning says why); go on where there can "
                "be, or start anew with `replay_share=0`"
            )
        if found is None or self._base is None:
            return self._take(None)
        check_replay(found, self._base, folder)
        sizes = ReplaySizes(**{name: found[name] for name in ReplaySizes.__dataclass_fields__})
        return self._take(make_replay(self._trainer, self._base, self._config, sizes, self._tokenizer))

    # -- the loss -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Mix losses with those of replay meanwhile: while a step is made, not where a loss is only measured."""
        self._replays = True
        self._reached.steps += 1
        try:
            yield
        finally:
            self._replays = False

    def loss(
        self,
        plain: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items: torch.Tensor | int | None,
    ) -> Any:
        """Return the trainer's loss; in training mode mixed with what a teacher adds, and with that of replay.

        Args:
            plain: the trainer's own `compute_loss`.
        """
        teacher = self.distillation
        self._reached.losses += model.training
        if teacher is None or not model.training or (teacher.auto and not self._replays):
            found: Any = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        else:
            found = teacher.loss(plain, model, inputs, return_outputs, num_items)
        if self.replay is None or not self._replays:
            return found
        loss, *outputs = found if return_outputs else (found,)
        loss = self.replay.mixed(loss, model, num_items)
        return (loss, *outputs) if return_outputs else loss

    def check_reached(self) -> None:
        """After the first step: let teachers go that a subclass' own step or loss passes by; refuse those asked for.

        A teacher goes too that nothing can be learnt from.
        """
        no_replay, no_teacher = self._reached.passed_by(self.replay is not None, self.distillation)
        no_teacher = no_teacher or (self.distillation is not None and self.distillation.impossible)
        if no_replay or no_teacher:
            self._base, self.replay = None, None if no_replay else self.replay
            self.distillation = None if no_teacher else self.distillation
        share = self.replay.sizes.share if self.replay is not None else 0.0
        if no_teacher and share and share < share_of(self._config):
            logger.warning(
                f"replay stays at {share:g} of the tokens, as beside a teacher; `distillation_alpha=0` takes "
                f"{share_of(self._config):g} from the start"
            )

    def users(self, loss: torch.Tensor) -> torch.Tensor:
        """Return what a mixed loss of a micro-batch was on the user's data, with what a subclass added to it."""
        loss = loss if self.replay is None else self.replay.without(loss)
        return loss if self.distillation is None else self.distillation.without(loss)

    def noted(self, loss: torch.Tensor) -> torch.Tensor:
        """Count what a micro-batch's loss has of teachers; return what it was on the user's data, which is watched."""
        if self.distillation is not None:
            self.distillation.note()
        return self.users(loss)

    def logs(self) -> dict[str, float]:
        """Return the mean divergences a step since the last call; all processes call it."""
        found: dict[str, Distillation | Replay | None] = {
            "hesso/distillation_loss": self.distillation, "hesso/replay_loss": self.replay,
        }  # fmt: skip
        means = {name: part.mean() for name, part in found.items() if part is not None}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}  # nothing was learnt from it

    def record(self) -> dict[str, Any]:
        """Return what checkpoints and the report say of them."""
        parts: dict[str, Distillation | Replay | None] = {"distillation": self.distillation, "replay": self.replay}
        found = {name: None if part is None else part.record() for name, part in parts.items()}
        found["distillation"] = found["distillation"] or self._unlearnt
        return found | {"known": self.known.record if self.known is not None and self.replay is None else None}


def _wants_replay(
    trainer: Trainer, config: HessoConfig, engine: Engine, model: PreTrainedModel, tokenizer: Any, measurer: Measurer
) -> bool:
    """Whether there is to be replay; says so where it can't be.

    Raises:
        HessoError: where it can't be and was asked for.
    """
    if not config.replay_share:
        return False
    reason = why_not(model) or measurer.generates or _why_one_forward(trainer.args, engine)
    reason = reason or _why_whole_sequences(trainer)
    if config.replay_share == "auto" and not reason:
        # of all GPUs
        reason = next(filter(None, from_all(_hindrance(config, tokenizer, engine, model))), "")
    if reason:
        _say_without(config, reason)
    return not reason


def _say_without(config: HessoConfig, reason: str) -> None:
    if config.replay_share != "auto":
        raise HessoError(f"`replay_share` ({config.replay_share}): {reason}; set it to 0")
    logger.warning(
        f"no replay: {reason}. What the base model knew beside the training data isn't kept; `replay_share=0` says "
        "that this is meant"
    )


def _hindrance(config: HessoConfig, tokenizer: Any, engine: Engine, model: PreTrainedModel) -> str:
    """Return what stands against replay that nobody asked for, "" where nothing does."""
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return "the model was divided by ZeRO-3 while it was loaded, so it can't be copied"
    if config.replay_dataset is None:
        try:
            Script.of(model, tokenizer)
        except HessoError as error:
            return str(error)
    size = sum((p.itemsize + 8) * p.numel() for p in model.parameters() if p.requires_grad)  # Adam, grads
    size += teacher_size(model, engine.args.device)
    if not engine.measures_shards and device_with_room(engine.args.device, size) != engine.args.device:
        return f"a copy of the base model and what training takes ({size / 1e9:.1f} GB) don't fit the device"
    return ""


def _why_whole_sequences(trainer: Trainer) -> str:
    """Return why a process can't read windows of its own, "" where it can."""
    parallel: Any = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is None or not (parallel.cp_enabled or parallel.sp_enabled):
        return ""
    return "`parallelism_config` has processes share each sequence (context or sequence parallelism)"


def _why_one_forward(args: TrainingArguments, engine: Engine) -> str:
    """Return why a step can't take a second forward pass, "" where it can."""
    given = args.gradient_checkpointing_kwargs if args.gradient_checkpointing else None
    asked = (
        {name: value for name, value in given.items() if name not in _OF_THE_TRAINER} if isinstance(given, dict) else {}
    )
    # Transformers asks for the other way where it is given nothing, and torch for this one where it isn't named
    if not asked or not asked.get("use_reentrant", True) or world_size() == 1 or not engine.keeps_whole:
        return ""
    return "under DDP, checkpointing with `use_reentrant` (True) allows one forward pass a step (False allows more)"
