"""`HessoTrainer`: a Trainer that comes out with a smaller model; `HessoMixin` does that for any Trainer subclass."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..budget.solver import TargetSizes
from ..config import HessoConfig
from ..distributed.collectives import barrier, on_all
from ..engines.checkpoint import begin_checkpoint
from ..errors import HessoError, TrainingDivergedError
from ..export.checkpoint_state import (
    check_config,
    check_resumable,
    last_checkpoint,
    last_common_checkpoint,
    load_converted_,
    read_state,
    write_state,
)
from ..export.export import export_pruned
from ..export.plots import PLOT_NAME
from ..export.report import CARD_NAME, REPORT_NAME, PruningReport
from ..hf_models.tiny_model import attention_in_fp32
from ..pruning.calibration import LossCurves, measure_curves, usable
from ..pruning.cric_state import PROBE_BATCH_SIZE, PROBE_BATCHES
from ..pruning.optimizer import HessoOptimizer
from ..pruning.plan import PruningPlan
from ..pruning.process import PruningProcess
from ..pruning.schedule import Schedule, resolve_schedule
from ..pruning.weights.snapshot import kept_random_state
from ..structures.lora import with_adapter
from ..structures.uneven_layers import MODULE_NAME
from ..vocabulary.keep import ROUND_TO, check_countable, keep_tokens
from ..vocabulary.tokens import KeptTokens
from .callbacks import HessoProgressCallback, metrics, uncounted
from .distillation import DistillationMixin
from .engine import EngineMixin
from .preemption import StopTogether

logger = logging.get_logger(__name__)


class HessoMixin(EngineMixin, DistillationMixin):
    """Adds pruning to a `Trainer` class: `class X(HessoMixin, SomeTrainer)`.

    Args:
        hesso_config: what to prune and when; all other arguments are the trainer's own.
        peft_config: a `LoraConfig`: the model's own weights are frozen then, and an adapter is trained.

    Attributes:
        told_to_stop: whether training ended with the checkpoint that `enable_jit_checkpoint` writes at a SIGTERM.

    Raises:
        HessoError: before any work, where the model or the budget doesn't allow what is asked for.
    """

    hesso_plan: PruningPlan

    def __init__(
        self, *args: Any, hesso_config: HessoConfig | None = None, peft_config: Any = None, **kwargs: Any
    ) -> None:
        if hesso_config is None:
            raise HessoError(f"{type(self).__name__} needs `hesso_config=HessoConfig(pruning_ratio=...)`; got None")
        if not isinstance(hesso_config, HessoConfig):
            raise HessoError(
                f"`hesso_config` ({type(hesso_config).__name__}) must be a HessoConfig: HessoConfig(pruning_ratio=...)"
            )
        self.hesso_config = hesso_config
        self.pruning_report: PruningReport | None = None
        self.kept_tokens: KeptTokens | None = None
        self.hesso_optimizer = None
        self.distillation = None
        self.told_to_stop = False
        self._resume_from: str | None = None
        self._saving_checkpoint = False
        self._step_loss: torch.Tensor | None = None
        if peft_config is not None:
            args, kwargs = with_adapter(peft_config, super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        self._refuse_engines()
        if hesso_config.prune_vocabulary:
            check_countable(self._saved_tokenizer(), self.train_dataset)
        self.hesso_plan = PruningPlan.prepare(self._unwrapped_model(), hesso_config)
        self.distillation = self._prepare_distillation(self._bare_model(), self._saved_tokenizer())
        self.add_callback(HessoProgressCallback(self))
        self.add_callback(StopTogether(self))

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does.

        Raises:
            TrainingDivergedError: naming the last checkpoint, when several gradients in a row weren't finite.
            CheckpointMismatchError: where the checkpoint belongs to another pruning run.
        """
        self.told_to_stop = False
        self._resume_from = self._resolve_checkpoint(resume_from_checkpoint)
        if self._resume_from is not None:
            check_resumable(Path(self._resume_from))
        try:
            output = super().train(self._resume_from, *args, **kwargs)
        except TrainingDivergedError as error:
            last = last_checkpoint(Path(self._output_dir))
            raise TrainingDivergedError(f"{error}. Last checkpoint: {last or 'none was written'}") from error
        finally:
            if self.hesso_optimizer is not None:
                self._process.bound.frozen.reveal(False)
        process = self.hesso_optimizer.process if self.hesso_optimizer else None
        if process is not None and process.on_trial is not None:
            logger.warning("training ended in the middle of a CRIC cycle: the weights from before it are put back")
            process.leave_trial()
        if process is not None and not process.finished:
            logger.warning(
                f"training ended at step {process.step} of pruning, which needs {process.schedule.end} (skipped steps "
                "don't count): the model is still dense"
            )
        return output

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the trainer's optimizer and put HESSO around it."""
        base = super().create_optimizer() if model is None else super().create_optimizer(model)
        self.optimizer = self._with_hesso(base)
        return self.optimizer

    def _with_hesso(self, base: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Put HESSO around an optimizer, once."""
        if self.is_deepspeed_enabled:
            return base  # HESSO comes around DeepSpeed's own step
        if isinstance(getattr(base, "optimizer", base), HessoOptimizer):
            return base
        process = self._new_process()
        if self.hesso_config.prune_vocabulary:
            self.kept_tokens = keep_tokens(
                self._saved_tokenizer(), self.train_dataset, self._bare_model(),
                round_to=self.hesso_config.round_to or ROUND_TO,
            )  # fmt: skip
        self.hesso_optimizer = HessoOptimizer(base, process)
        return self.hesso_optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Wrap the model, and take the optimizer that a subclass' own `create_optimizer` has made a moment before."""
        if training and self.optimizer is not None:
            self.optimizer = self._with_hesso(self.optimizer)
        return super()._wrap_model(model, training, dataloader)

    def _new_process(self) -> PruningProcess:
        if self.hesso_plan.model is not self._bare_model():  # `model_init` made a new one
            self.hesso_plan = PruningPlan.prepare(self._unwrapped_model(), self.hesso_config)
        return self.hesso_plan.process(self._settle())

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, but none where the run that is resumed was over: `Trainer` would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one micro-batch as the trainer does, and keep its loss for the early warning."""
        if self._process.wants_probe:
            self._probe()
        self._process.prepare_gradients()
        loss = super().training_step(*args, **kwargs)
        if self.is_deepspeed_enabled:
            return loss  # its step is over, and has seen it
        noted = self._noted_loss(loss)
        self._step_loss = noted if self._step_loss is None else self._step_loss + noted
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        plain = super()._clip_grad_norm
        return self._observed_norm(model, self.args.max_grad_norm, lambda: plain(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # clipping is off
            plain = super()._get_grad_norm
            return self._observed_norm(model, float("inf"), lambda: plain(model))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _observed_norm(self, model: Any, max_norm: float, clip: Callable[[], Any]) -> Any:
        """Show HESSO the gradient between unscaling and clipping, and tell it the norm."""
        if not isinstance(self.hesso_optimizer, HessoOptimizer):
            return clip()  # DeepSpeed has clipped
        if self.accelerator.mixed_precision == "fp16":  # the scaler allows unscaling once, so clipping is done here too
            self.accelerator.unscale_gradients()
            self.hesso_optimizer.observe_gradients()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            self.hesso_optimizer.observe_gradients()
            norm = clip()
        self.hesso_optimizer.report_gradient_norm(norm)
        if self._step_loss is not None:
            self.hesso_optimizer.report_loss(self._step_loss)
            self._step_loss = None
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the trainer's metrics and, with the training loss, HESSO's."""
        if "loss" in logs and self.hesso_optimizer is not None:
            logs.update(metrics(self.hesso_optimizer, self.hesso_plan.parameters))
            if self.distillation is not None:
                logs["hesso/distillation_loss"] = self.distillation.mean(self.state.global_step)
        super().log(logs, *args, **kwargs)

    # -- the plan -------------------------------------------------------------------------------------------------

    def _settle(self) -> Schedule:
        """Fix target sizes and schedule: from the checkpoint that is resumed, else by measuring and counting."""
        if self._resume_from is not None:
            state = read_state(Path(self._resume_from))
            check_config(state["config"], self.hesso_config.to_dict(), self._resume_from)
            if self.distillation is not None:
                self.distillation.check(state["training"].get("distillation"), self._resume_from)
            self.hesso_plan.target = TargetSizes.from_dict(state["target"])
            schedule = Schedule.from_dict(state["schedule"])
            if schedule.end > self._total_steps():
                raise HessoError(
                    f"`max_steps` ({self._total_steps()}) ends before pruning does (step {schedule.end} in "
                    f"{self._resume_from}); train for at least {schedule.end} steps"
                )
            return schedule
        schedule = resolve_schedule(self.hesso_config, self._total_steps())
        if not self._is_sharded:  # there it is measured on the shards, when they have been made
            self._settle_sizes()
        return schedule

    def _total_steps(self) -> int:
        if self.state.max_steps > 0:
            return self.state.max_steps
        if self.args.max_steps > 0:
            return self.args.max_steps
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return max_steps

    def _measure_curves(self) -> LossCurves:
        with kept_random_state(self.args.device):  # collators may draw random numbers
            batches = [self._prepare_inputs(batch) for batch in self._calibration_batches()]
        model, groups = self._bare_model(), self.hesso_plan.groups
        shown = self.is_world_process_zero() and not self.args.disable_tqdm
        with uncounted(self), attention_in_fp32(model):  # autocast comes with Accelerate, later
            return measure_curves(model, groups, batches, self._batch_loss, self.hesso_config, progress=shown)

    def _batch_loss(self, model: PreTrainedModel, batch: Any) -> torch.Tensor:
        with self.compute_loss_context_manager():
            items = self._get_num_items_in_batch([batch], self.args.device)
            loss = self.compute_loss(model, dict(batch), num_items_in_batch=items)  # it may take labels out of the dict
        return loss[0] if isinstance(loss, tuple) else loss

    def _calibration_batches(self) -> list[Any]:
        """Take single examples to measure the split on."""
        if self.train_dataset is None:
            logger.warning("there is no `train_dataset` to measure on: the structures share the cut evenly")
            return []
        return self._single_examples(self.hesso_config.calibration_examples)

    def _single_examples(self, count: int) -> list[Any]:
        """Take examples spread over the training data (a stream's first ones), one a batch.

        So the batch size and the number of processes don't matter to what is measured on them.
        """
        dataset: Any = self.train_dataset
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
            step = max(1, len(dataset) // count)
            examples = [dataset[index] for index in range(0, len(dataset), step)][:count]
        else:
            examples = list(itertools.islice(iter(dataset), count))
        return [collate([example]) for example in examples]

    def _probe(self) -> None:
        """Let CRIC look along the way to zero, by gradients of a few examples that are the same on all processes."""
        if self.train_dataset is None:
            raise HessoError("`cric_mode` ('probe') takes batches from `train_dataset` (None); give one, or use 'path'")
        assert isinstance(self.hesso_optimizer, HessoOptimizer)
        self._bare_model().train()  # as the trainer does before each step, the optimizer's mode with it
        if callable(getattr(self.hesso_optimizer, "train", None)):
            self.hesso_optimizer.train()  # type: ignore[attr-defined]
        with kept_random_state(self.args.device), uncounted(self):
            count = PROBE_BATCHES * PROBE_BATCH_SIZE
            examples = [self._prepare_inputs(example) for example in self._single_examples(count)]
            examples = usable(self._bare_model(), examples, self._batch_loss)
            if not examples:
                raise HessoError("`cric_mode` ('probe'): no example of `train_dataset` gives a finite loss; use 'path'")
            batches = [examples[start : start + PROBE_BATCH_SIZE] for start in range(0, count, PROBE_BATCH_SIZE)]
            scale = 1024.0 if self.accelerator.mixed_precision == "fp16" else 1.0
            self.hesso_optimizer.probe([self._loss_of(batch, scale) for batch in batches if batch], scale)

    def _loss_of(self, examples: list[Any], loss_scale: float) -> Callable[[], torch.Tensor]:
        """Return what computes the mean loss of some examples, with all but the last one's gradients taken already."""
        scale = loss_scale / len(examples)

        def loss() -> torch.Tensor:
            torch.manual_seed(self.args.seed)  # the same dropout at every point
            for example in examples[:-1]:
                (self._batch_loss(self._bare_model(), example) * scale).backward()
            return self._batch_loss(self._bare_model(), examples[-1]) * scale

        return loss

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the smaller model once pruning has finished; before that the dense one, with a warning.

        Raises:
            VerificationError: where the smaller model doesn't reproduce the trained one; nothing is written then.
        """
        if self._saving_checkpoint:
            return super().save_model(output_dir, _internal_call=_internal_call)
        process = self.hesso_optimizer.process if self.hesso_optimizer else None
        target = Path(output_dir or self._output_dir)
        if process is None or not process.finished:
            done = "has not begun" if process is None else f"is at step {process.step} of {process.schedule.end}"
            logger.warning(f"pruning {done}: the dense model is saved in {target}, not a smaller one")
            if self.args.should_save:
                _remove_export(target)
            with self._before_trial():
                if self._is_sharded:
                    return self._save_dense_sharded(target)
                return super().save_model(output_dir, _internal_call=_internal_call)
        self._export(process, target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    @contextlib.contextmanager
    def _before_trial(self) -> Iterator[None]:
        """Where CRIC has the weights on their way to zero, put those that they will return to in their place."""
        snapshot = self.hesso_optimizer.process.on_trial if self.hesso_optimizer else None
        if snapshot is None:
            yield
            return
        logger.warning("CRIC has the weights on trial: those from before it are saved")
        snapshot.swap_weights()
        try:
            yield
        finally:
            snapshot.swap_weights()

    def _export(self, process: PruningProcess, target: Path) -> None:
        """Write the smaller model from one process, or from the shards of all; an error is raised on all."""
        if self._is_sharded:
            self.pruning_report = self._export_sharded(process.kept_units(), target)
            return
        if self.is_deepspeed_enabled:
            self.pruning_report = self._export_zero(process.kept_units(), target)
            return
        options = self._export_options(process.kept_units())
        self.pruning_report = on_all(
            lambda: export_pruned(self._unwrapped_model(), target, **options) if self.args.should_save else None
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a dense, resumable checkpoint with the pruning state beside it."""
        self._saving_checkpoint = True
        try:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.args.should_save:
                begin_checkpoint(folder)
                write_state(folder, self._process.decision(), self.hesso_config, self._training_record())
            barrier()  # nobody writes before what was there is gone
            self._write_shards(folder)
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _training_record(self) -> dict[str, Any]:
        process = self._process
        curves = self.hesso_plan.curves
        return {
            "base_model": self._bare_model().config.name_or_path,
            "hesso_config": self.hesso_config.to_dict(),
            "target": process.target.to_dict(),
            "schedule": process.schedule.to_dict(),
            "saliency": self.hesso_config.saliency_weights,
            "calibration": curves.to_dict() if curves else None,
            "steps": process.step,
            "cric": process.cric_report(),
            "distillation": self._distillation_record(),
            "vocabulary": self.kept_tokens.to_dict() if self.kept_tokens else None,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_converted_(self._bare_model(), Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Only a model whose pruning has ended can be the best one."""
        if not self._process.finished:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # it has loaded the masters, whatever `from_pretrained` would call them
            load_converted_(self._bare_model(), Path(self.state.best_model_checkpoint or ""))
        self._process.reapply()
        self._process.bound.publish()

    # -- checks ---------------------------------------------------------------------------------------------------

    def _saved_tokenizer(self) -> Any:
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _resolve_checkpoint(self, resume: str | bool | None) -> str | None:
        """Return the folder to resume from; for True the last whole one, as a killed run may leave half a one.

        Raises:
            HessoError: where True was asked for and there is none.
        """
        if resume is not True:
            return str(resume) if resume else None
        last = last_common_checkpoint(Path(self._output_dir))
        if last is None:
            raise HessoError(f"`resume_from_checkpoint` (True): no whole checkpoint in {self._output_dir!r}")
        return str(last)


def _remove_export(folder: Path) -> None:
    """Remove the report, card and modelling file of a smaller model that a dense one replaces."""
    if (folder / REPORT_NAME).exists():
        for name in (REPORT_NAME, CARD_NAME, PLOT_NAME, f"{MODULE_NAME}.py"):
            (folder / name).unlink(missing_ok=True)


class HessoTrainer(HessoMixin, Trainer):
    """`transformers.Trainer` that prunes while it trains: `HessoTrainer(..., hesso_config=HessoConfig(...))`.

    Example:
        trainer = HessoTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer,
                               hesso_config=HessoConfig(pruning_ratio=0.5))
        trainer.train()
        trainer.save_model("small")
    """
