"""What a trainer prunes: the plan, its sizes and schedule, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..budget.target_sizes import TargetSizes
from ..config import HessoConfig
from ..distributed.collectives import from_main, world_size
from ..distributed.parts import stock_class
from ..engines.engine import Engine
from ..errors import HessoError, counted
from ..export.checkpoint_state import check_config, keep_defaults, read_state
from ..export.page.losses import Losses
from ..pruning.basis import StreamBasis
from ..pruning.calibration import LossCurves
from ..pruning.healing import Healer, enough_tokens
from ..pruning.optimizer import HessoOptimizer
from ..pruning.plan import PruningPlan
from ..pruning.process import PruningProcess
from ..pruning.ranking import ranked
from ..pruning.readers import columns_of
from ..pruning.schedule import Schedule, resolve_schedule
from ..pruning.windows import LONGEST, padded, unreadable
from ..structures.lora import base_of, parameters_of
from ..structures.turned_base import heal_base_, read_turn, turn_base_
from ..vocabulary.keep import ROUND_TO, check_countable, keep_tokens
from ..vocabulary.tokens import KeptTokens
from .basis import settle_in_basis
from .compacting import Compacting
from .dense import check_checkpoints_spare, warn_where_saved
from .ladder import Ladder
from .measure import Measurer
from .quality import Quality
from .teacher import check_teacher
from .teaching import Teaching

logger = logging.get_logger(__name__)

HYPERPARAMETERS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16",
)  # fmt: skip
TRIAL_TOKENS = 2048  # on which trial removals are healed: there are many, and only their order matters


class PruningRun:
    """What is pruned in one trainer, and when.

    Args:
        trainer: whose model is pruned.
        config: what to prune and when.
        engine: returns the trainer's engine of now.
        counted, generated: as `Measurer` takes them.

    Attributes:
        plan: groups, budget and target sizes.
        measurer: what measures with the trainer's loss.
        teaching: what is learnt beside the user's loss.
        compacting: when the model in memory becomes the smaller one.
        ladder: the models that are saved on the way.
        basis: how the stream was turned, None in the given basis.
        kept_tokens: the vocabulary that stays, None where all of it does.
        resume_from: the checkpoint that training goes on from.
        total_steps: of the run, where they were given; else they are counted.
        base_folder: that the model was read from, None where it was no folder.
        first_state: the pruning state that the run began with, where it begins again from that.
        origin: what else the record says: the command, the recipe and the data sets that the run came of.
        quality: the base model's loss and the smaller one's.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: HessoConfig,
        engine: Callable[[], Engine],
        counted: Iterable[str],
        generated: Iterable[str],
    ) -> None:
        self._trainer, self._config, self._engine = trainer, config, engine
        self.resume_from: Path | None = None
        self.total_steps: int | None = None
        self.first_state: dict[str, Any] | None = None
        self.origin: dict[str, Any] = {}
        self.basis: StreamBasis | None = None
        self.kept_tokens: KeptTokens | None = None
        self._healer: Healer | None = None
        check_teacher(config.distill_from)
        if config.prune_vocabulary:
            check_countable(self.tokenizer, trainer.train_dataset)
        self.measurer = Measurer(trainer, config, counted, generated)
        self.measurer.check_examples(self.measurer.generates)
        self.compacting = Compacting(trainer, config, engine, self)
        self.compacting.check()
        self.ladder = Ladder(trainer, config, engine, self)
        self.plan = _prepared(trainer, self.whole, config)
        name = self.model.config.name_or_path
        self.base_folder = Path(name).absolute() if name and Path(name).is_dir() else None
        self.ladder.check(self.base_folder)
        self.quality = Quality(trainer, config, engine, self.measurer, lambda: self.model)
        self.teaching = Teaching(trainer, config, engine(), self.model, self.tokenizer, self.measurer)
        self._new_healer = lambda: _make_healer(self, config, engine())

    @property
    def whole(self) -> nn.Module:
        """What the trainer was given: the model, or a PeftModel around it."""
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that is trained, adapters in place."""
        return base_of(self.whole)

    @property
    def tokenizer(self) -> Any:
        """What is saved with a model, None where there is nothing."""
        return self._trainer.processing_class or getattr(self._trainer.data_collator, "tokenizer", None)

    @property
    def process(self) -> PruningProcess:
        """The pruning state, which `create_optimizer` has made."""
        return self._engine().made_steps.process

    # -- beginning ------------------------------------------------------------------------------------------------

    def new_process(self) -> PruningProcess:
        """Fix sizes and schedule, and make the pruning state."""
        self.measurer.check_examples(self.measurer.why_none())
        if self.plan.model is not self.model:  # `model_init` made a new one
            self.plan = _prepared(self._trainer, self.whole, self._config)
        check_checkpoints_spare(self.base_folder, self._trainer.args, self._config.overwrite_base, self.resume_from)
        process = self.process_on(self._settle())
        warn_where_saved(self, self._config.overwrite_base)
        if self._config.prune_vocabulary:
            self.kept_tokens = _fewer_tokens(self, self._trainer.train_dataset, self._config.round_to or ROUND_TO)
        return process

    def process_on(self, schedule: Schedule) -> PruningProcess:
        """Make the pruning state of a run that begins, on the parameters that the model has now."""
        process = self.plan.process(schedule)
        if self._healer is not None:
            process.heal_with(self._healer.on(self.model))
        return process

    def _settle(self) -> Schedule:
        """Fix sizes and schedule: a checkpoint's, or those of the first state, else by measuring and counting."""
        first = self.first_state
        if first is not None and first["step"]:
            return Schedule.from_dict(first["schedule"])
        if first is None and self.resume_from is not None:
            return self._settle_from(self.resume_from)
        schedule, engine = resolve_schedule(self._config, self.count_steps()), self._engine()
        if first is None and not engine.measures_shards:
            self.quality.begin()
        self.teaching.begin(schedule.total_steps)
        self._healer = self._new_healer()
        if first is not None:  # sizes and basis are settled
            return schedule
        if not engine.measures_shards:
            self.settle()
        return schedule

    def _settle_from(self, folder: Path) -> Schedule:
        state = read_state(folder)
        keep_defaults(state["config"], self._config, str(folder))
        check_config(state["config"], self._config.to_dict(), str(folder))
        self.compacting.check_resumable(state, str(folder))
        self.teaching.go_on(state["training"], str(folder), judges=not state["finished"])
        self._healer = self._new_healer()
        self.quality.go_on(state["training"].get("quality"))
        turned = state["training"].get("stream_basis")
        tensors = read_turn(folder)
        self.basis = StreamBasis(**turned, tensors=tensors) if turned else None
        trained = {name for name, parameter in parameters_of(self.model).items() if parameter.requires_grad}
        turn_base_(self.model, tensors, trained)  # a checkpoint's own weights are turned already
        if state["training"].get("compaction") is None:  # else the matrices are those of the smaller model
            heal_base_(parameters_of(self.model), folder)
        self.plan.target = TargetSizes.from_dict(state["target"])
        self.plan.rungs = tuple(map(TargetSizes.from_dict, state.get("rungs", ())))
        schedule = Schedule.from_dict(state["schedule"])
        if schedule.end > self.count_steps():
            raise HessoError(
                f"`max_steps` ({self.count_steps()}) ends before pruning does (step {schedule.end} in "
                f"{folder}); train for at least {counted(schedule.end, 'step')}"
            )
        return schedule

    def count_steps(self) -> int:
        """Return how many optimizer steps the run has."""
        trainer = self._trainer
        if self.total_steps is not None:
            return self.total_steps
        for given in (trainer.state.max_steps, trainer.args.max_steps):
            if given > 0:
                return given
        if not self.measurer.has_data:
            raise HessoError(
                "the optimizer needs to know how many steps the run has: set `max_steps`, give `train_dataset`, or "
                "call `create_optimizer_and_scheduler(num_training_steps)`"
            )
        *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        return max_steps

    def settle(self) -> None:
        """Choose the basis and measure the split between structures, as the engine has the model compute."""
        with self._engine().computing(self.model) as hindrance:
            sizes = partial(_settle_sizes, self.plan, partial(_unmeasured, hindrance) if hindrance else self.curves)
            self.basis = settle_in_basis(self.plan, self.model, self.measurer, sizes, self._config, hindrance)

    def curves(self) -> LossCurves:
        """Measure what each structure costs."""
        healer = self._healer.on(self.model).fewer(TRIAL_TOKENS) if self._healer is not None else None
        return self.measurer.curves(self.model, self.plan.groups, healer)

    # -- on the way -----------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Let CRIC look along the way to zero."""
        steps = self._engine().steps
        assert isinstance(steps, HessoOptimizer), "other engines refuse it"
        self.measurer.probe(self.model, steps)

    def noted_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Count a micro-batch's loss, and return the one to watch for a collapse."""
        return self.teaching.noted(loss)

    def record(self) -> dict[str, Any]:
        """Return what checkpoints and the report say of the run."""
        process, on = self.process, self.ladder.on
        return {
            "base_model": self.model.config.name_or_path,
            **_code_of(self.model),
            "hesso_config": self._config.to_dict(),
            "target": (process.target if on is None else process.rungs[on]).to_dict(),
            "schedule": process.schedule.to_dict(),
            "phases": {name: list(span) for name, span in process.schedule.phases_to(on).items()},
            **_decided(process, self.plan, self._config),
            "stream_basis": self.basis.to_dict() if self.basis else None,
            "steps": process.step,
            **(_as_trained(self._trainer, self.quality) | self.origin),
            "cric": process.cric_report(),
            "compaction": process.state.compaction.to_dict() if process.state.compaction else None,
            **self.teaching.record(),
            "vocabulary": self.kept_tokens.to_dict() if self.kept_tokens else None,
        }


def _code_of(model: nn.Module) -> dict[str, bool]:
    """Say of a model of a class that isn't Transformers' that an export needs the code of that."""
    return {} if stock_class(base_of(model)).__module__.startswith("transformers.") else {"own_code": True}


def _fewer_tokens(run: PruningRun, dataset: Any, round_to: int) -> KeptTokens | None:
    """Return the tokens that stay, None where all are needed."""
    kept = keep_tokens(run.tokenizer, dataset, run.model, round_to=round_to)
    if kept.num_removed:
        return kept
    logger.warning(f"`prune_vocabulary` (True): data and tokenizer need all {kept.vocab_size:,} tokens, so all stay")
    return None


def _unmeasured(hindrance: str) -> LossCurves:
    logger.warning(
        f"the split between structures can't be measured: {hindrance}: they share the cut evenly. Give `structures` "
        "shares ({'mlp_channels': 3, 'attention_heads': 1}) or set `target_sizes`"
    )
    return LossCurves({}, {})


def _settle_sizes(plan: PruningPlan, measure: Callable[[], LossCurves]) -> None:
    """Measure the split between structures, and take what the main process found."""
    plan.settle(measure)
    target, *rungs = from_main([plan.target, *plan.rungs])
    plan.target, plan.rungs = target, tuple(rungs)
    logger.info(f"HESSO prunes {target.parameter_ratio:.1%} of the parameters: {target.sizes}")


def _decided(process: PruningProcess, plan: PruningPlan, config: HessoConfig) -> dict[str, Any]:
    """Return how it was decided what goes, and what share of the parameters was gone after which step."""
    ended = {0: Fraction(0)} | {p.end: p.share for p in process.schedule.periods if p.end <= process.step}
    kept = {step: plan.parameters(process.run.ranking.kept_after(share)) for step, share in ended.items()}
    return {
        "saliency": config.saliency_weights,
        "calibration": plan.curves.to_dict() if plan.curves else None,
        "scores": ranked(process.state.judged, process.state.pruned(), config.layer_widths == "per_layer"),
        "removed_by_step": [[step, 1 - float(left) / plan.parameters.full] for step, left in kept.items()],
    }


def _as_trained(trainer: Trainer, quality: Quality) -> dict[str, Any]:
    """Return the losses of a run, what was measured and what it was trained with, plain JSON types."""
    losses, given = Losses.of(trainer.state.log_history), trainer.args.to_dict()
    hyperparameters = {name: given[name] for name in HYPERPARAMETERS} | {"processes": world_size()}
    return {
        "losses": losses.to_dict() if losses else None,
        "quality": quality.record(),
        "hyperparameters": hyperparameters,
    }


def _make_healer(run: PruningRun, config: HessoConfig, engine: Engine) -> Healer | None:
    """Take the examples that units are judged and healed on: the user's, and what the base model wrote."""
    if not config.reads_examples:
        return None
    model, measurer, known = run.model, run.measurer, run.teaching.known
    if reason := _why_not_healed(model, measurer):
        logger.warning(f"`healing` ({config.healing!r}): nothing is healed: {reason}")
        return None
    tokens = config.healing_tokens or enough_tokens(max(map(columns_of, run.whole.modules())))
    examples = measurer.tokens(tokens, between=True, longest=LONGEST)
    examples += [] if known is None else known.examples(tokens)
    return Healer(model, padded(examples, engine.args.device))


def _prepared(trainer: Trainer, model: nn.Module, config: HessoConfig) -> PruningPlan:
    """Make a plan, with a budget of latency timed where and as a trainer computes."""
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    return PruningPlan.prepare(model, config, trainer.args.device, dtype)


def _why_not_healed(model: PreTrainedModel, measurer: Measurer) -> str:
    """Return why nothing can be healed, "" where it can."""
    if model.config.is_encoder_decoder:
        return "it knows one stack of layers, not an encoder with a decoder"
    return measurer.why_none() or unreadable(measurer.examples(4))
