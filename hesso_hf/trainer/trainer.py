"""`HessoTrainer`: a Trainer that comes out with a smaller model; `HessoMixin` does that for any Trainer subclass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import HessoConfig
from ..config.files import REPORT_NAME
from ..distributed.together import Together
from ..engines.engine import Engine, Steps
from ..errors import TrainingDivergedError
from ..export.checkpoint_state import check_resumable, last_checkpoint, load_converted_
from ..export.report import PruningReport, add_to_card
from ..export.storage import check_not_base
from ..structures.lora import lora_layers, with_adapter
from .arguments import checked_config, engine_of, refuse
from .callbacks import OWN_CALLBACKS, metrics
from .hub import upload, upload_on_the_way
from .peeked import peeked
from .reference import settle_reference
from .restart import Restarts
from .run import PruningRun
from .saving import (
    end_training,
    pruned_model,
    resolve_checkpoint,
    save_dense,
    save_smaller,
    write_beside,
    writing_checkpoint,
)

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _TrainerBase = Trainer
else:
    _TrainerBase = object


class HessoMixin(_TrainerBase):
    """Adds pruning to a `Trainer` class: `class X(HessoMixin, SomeTrainer)`.

    Args:
        hesso_config: what to prune and when; all other arguments are the trainer's own.
        peft_config: a `LoraConfig`: the model's own weights are frozen then, and an adapter is trained.

    Attributes:
        hesso_counted: names of attributes in which the trainer's loss counts tokens or collects metrics: a loss that is
            only measured leaves them as they were. A subclass adds its own.
        hesso_generated: names of attributes in which a trainer keeps what it generates to learn from: with one that has
            such an attribute nothing is measured before training. A subclass adds its own.
        hesso_engine: what trains the model: one process or DDP, FSDP2, DeepSpeed.
        hesso_run: what is pruned, and when.
        pruning_report: of the last smaller model that was saved.
        told_to_stop: whether training ended with the checkpoint that `enable_jit_checkpoint` writes at a SIGTERM.

    Raises:
        HessoError: before any work, where the model or the budget doesn't allow what is asked for.
    """

    hesso_counted: ClassVar[tuple[str, ...]] = ("_metrics", "_total_train_tokens")  # TRL's trainers
    hesso_generated: ClassVar[tuple[str, ...]] = ("_buffered_inputs",)  # TRL's online trainers
    hesso_engine: Engine
    hesso_plan = property(attrgetter("hesso_run.plan"))
    kept_tokens = property(attrgetter("hesso_run.kept_tokens"))
    distillation = property(attrgetter("hesso_run.teaching.distillation"))
    replay = property(attrgetter("hesso_run.teaching.replay"))
    _process = property(attrgetter("hesso_run.process"))

    def __init__(
        self, *args: Any, hesso_config: HessoConfig | None = None, peft_config: Any = None, **kwargs: Any
    ) -> None:
        self.hesso_config = checked_config(super().__init__, hesso_config, args, kwargs)
        self.pruning_report: PruningReport | None = None
        self.told_to_stop = False
        self._checkpoint = Together()
        if peft_config is not None:
            args, kwargs = with_adapter(peft_config, super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # for losses before training
        settle_reference(self)
        for name in ("train_dataset", "eval_dataset"):
            setattr(self, name, peeked(getattr(self, name), name))
        refuse(self, self.hesso_engine, adapters=bool(lora_layers(self.model)))  # type: ignore[arg-type]
        attributes = self.hesso_counted, self.hesso_generated
        self.hesso_run = PruningRun(self, self.hesso_config, lambda: self.hesso_engine, *attributes)
        self._restarts = Restarts(self, lambda: self.hesso_engine, self.hesso_run)  # type: ignore[arg-type]
        for callback in OWN_CALLBACKS:
            self.add_callback(callback(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and the engine over it."""
        super().create_accelerator_and_postprocess()
        self.hesso_engine = engine_of(self, self.hesso_config)

    @property
    def hesso_optimizer(self) -> Steps | None:
        """HESSO around the optimizer's steps, once there is one: a `HessoOptimizer`, under DeepSpeed `ZeroSteps`."""
        return self.hesso_engine.steps

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does.

        Raises:
            TrainingDivergedError: naming the last checkpoint, when several gradients in a row weren't finite.
            CheckpointMismatchError: where the checkpoint belongs to another pruning run.
        """
        self.told_to_stop, output_dir = False, self.args.output_dir or ""  # TrainingArguments fills it in
        folder = resolve_checkpoint(resume_from_checkpoint, output_dir)
        self.hesso_run.resume_from = Path(folder) if folder is not None else None
        if self.hesso_run.resume_from is not None:
            check_resumable(self.hesso_run.resume_from, self.hesso_run.model)
        try:
            output = super().train(folder, *args, **kwargs)
        except TrainingDivergedError as error:
            last = last_checkpoint(Path(output_dir))
            raise TrainingDivergedError(f"{error}. Last checkpoint: {last or 'none was written'}") from error
        finally:
            self._restarts.reset()
            if self.hesso_engine.steps is not None:
                self._process.bound.frozen.reveal(False)
        if self.hesso_engine.steps is not None:
            end_training(self._process)
        return output

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Create both for so many steps, which needs no training data."""
        self.hesso_run.total_steps = num_training_steps
        super().create_optimizer_and_scheduler(num_training_steps)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the trainer's optimizer and put HESSO around it."""
        base = super().create_optimizer() if model is None else super().create_optimizer(model)
        self.optimizer = self.hesso_engine.around(base, self.hesso_run)
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Wrap the model, and take the optimizer that a subclass' own `create_optimizer` has made a moment before."""
        if training and self.optimizer is not None:
            self.optimizer = self.hesso_engine.around(self.optimizer, self.hesso_run)
        return super()._wrap_model(model, training, dataloader)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        plain = super()._prepare_for_training
        prepared = self.hesso_engine.prepare(self.hesso_run, lambda: plain(*args, **kwargs))
        self._restarts.prepared()
        return prepared

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where memory ran out before (`auto_find_batch_size`), from the first state."""
        self._restarts.enter()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, but none where the run that is resumed was over: `Trainer` would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one micro-batch as the trainer does, and keep its loss for the early warning."""
        if self.hesso_engine.steps is None:  # called by hand, before there is an optimizer
            return super().training_step(*args, **kwargs)
        if self._process.wants_probe:
            self.hesso_run.probe()
        self._process.prepare_gradients()
        with self.hesso_run.teaching.replaying():
            loss = super().training_step(*args, **kwargs)
        self.hesso_engine.note_loss(loss, self.hesso_run)
        return self.hesso_run.teaching.users(loss)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss; in training mode mixed with what a teacher adds, and with that of replay."""
        return self.hesso_run.teaching.loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        plain = super()._clip_grad_norm
        return self.hesso_engine.clip(model, self.args.max_grad_norm, lambda: plain(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        plain: Callable[..., Any] = super()._get_grad_norm
        if grad_norm is None:  # clipping is off
            return self.hesso_engine.clip(model, float("inf"), lambda: plain(model))
        return plain(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the trainer's metrics and, with the training loss, HESSO's."""
        if "loss" in logs and self.hesso_engine.steps is not None:
            logs.update(metrics(self.hesso_engine.steps, self.hesso_plan.parameters))
            logs.update(self.hesso_run.teaching.logs())
        super().log(logs, *args, **kwargs)

    # -- saving and loading ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the smaller model once pruning has finished; before that the dense one, with a warning.

        Raises:
            HessoError: where it would replace the base model, unless `overwrite_base` is set.
            StorageError: where it can't be written; it is saved elsewhere then, if that can be.
            VerificationError: where the smaller model doesn't reproduce the trained one, which is saved beside it then.
        """
        plain = super().save_model
        if self._checkpoint.underway:
            plain(output_dir, _internal_call=_internal_call)
            return self._checkpoint.meet()
        target = Path(output_dir or self.args.output_dir or "")
        check_not_base(target, self.hesso_run.base_folder, self.hesso_config.overwrite_base)
        steps = self.hesso_engine.steps
        if steps is None or not steps.process.finished:
            dense = partial(plain, output_dir, _internal_call=_internal_call)
            return save_dense(self.hesso_engine, self.hesso_run, target, dense)
        trained = partial(plain, _internal_call=True)
        self.pruning_report = save_smaller(self.hesso_engine, self.hesso_run, target, trained)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def pruned_model(self) -> PreTrainedModel:
        """Return the smaller model in memory, adapters merged, compared with the trained one as `save_model` does it.

        Raises:
            HessoError: while pruning isn't over, and where no process has the model whole.
            VerificationError: where the smaller model doesn't reproduce the trained one.
        """
        return pruned_model(self.hesso_engine, self.hesso_run)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a resumable checkpoint with the pruning state beside it."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_checkpoint(folder, self.hesso_run, self._checkpoint.doing(self.hesso_engine.keeps_whole)):
            if self.args.should_save:
                write_beside(folder, self.hesso_run, self.hesso_config)
            self._checkpoint.meet()  # nobody writes before what was there is gone
            self.hesso_engine.save(self.hesso_run, folder)
            super()._save_checkpoint(model, trial)

    def store_flos(self) -> None:
        """Count the operations of all processes: each comes to that, whatever a subclass wrote before it."""
        self._checkpoint.meet()
        super().store_flos()

    def _save_rng_state(self, output_dir: str) -> None:
        """Save every process' random state before the file that says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self._checkpoint.meet()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.hesso_run.compacting.is_due:
            return  # loaded when there is an optimizer, with which the model becomes as small
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_converted_(self.hesso_run.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        plain = super()._load_optimizer_and_scheduler
        if checkpoint is None:
            return plain(None)
        if self._process.state.compaction is not None and self.hesso_engine.keeps_whole:  # else loaded once prepared
            self._load_from_checkpoint(checkpoint)
        return self.hesso_engine.load(self.hesso_run, Path(checkpoint), lambda: plain(checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Only a model whose pruning has ended can be the best one."""
        return self._process.finished and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        self.hesso_engine.load_best(
            self.hesso_run, Path(self.state.best_model_checkpoint or ""), super()._load_best_model
        )
        self._process.reapply()
        self._process.bound.publish()

    # -- the Hub --------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the smaller model in `output_dir` and upload it with its card; a dense one is never pushed."""
        steps = self.hesso_engine.steps
        if steps is None or not steps.process.finished:
            logger.warning("nothing is pushed to the Hub: pruning hasn't finished, the model is still dense")
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            asked = {} if private is None else {"private": private}  # which Transformers takes since 5.23
            self.init_hf_repo(token=token, **asked)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return upload(self, commit_message, token, revision or self.args.hub_revision, blocking)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the pruned model's own card and add what is given (`tags`, `language`, `license`, ...)."""
        folder = Path(self.args.output_dir or "")
        if not (folder / REPORT_NAME).exists():
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            add_to_card(folder, kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the smaller model with a checkpoint, once there is one; a dense model is never pushed in its place."""
        if not self._process.finished:
            logger.warning("nothing is pushed to the Hub yet: the model is still dense")
            return
        if self.args.hub_strategy == "end":
            return
        with self._checkpoint.paused():
            self.save_model(_internal_call=True)  # by all processes: they wait for the one that writes
        if self.is_world_process_zero():
            upload_on_the_way(self)


class HessoTrainer(HessoMixin, Trainer):
    """`transformers.Trainer` that prunes while it trains: `HessoTrainer(..., hesso_config=HessoConfig(...))`.

    Example:
        trainer = HessoTrainer(model, args, train_dataset=data, hesso_config=HessoConfig(pruning_ratio=0.5))
        trainer.train()
        trainer.save_model("small")
    """
