"""What a trainer asks of the engine that trains its model, and the engine that shares nothing out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from ..config import HessoConfig
from ..distributed.collectives import on_all, world_size
from ..errors import HessoError
from ..export import export_pruned
from ..export.checkpoint_state import load_converted_
from ..export.decision import NOTHING_CUT, Compaction, Decision
from ..export.parameters import ParameterSource
from ..export.report import PruningReport
from ..export.write import DTYPES, Output, write_pruned
from ..pruning.compaction import compact, compact_as, parallel_of, why_not_compact, why_not_refit_parallel
from ..pruning.optimizer import HessoOptimizer, check_wrappable
from ..pruning.process import PruningProcess
from ..structures.groups import KeptUnits, PruningGroups
from .checkpoint import load_pruning_alone, load_random_states, save_pruning_alone, save_random_states
from .run import Run


class Steps(Protocol):
    """HESSO around an optimizer's steps.

    Attributes:
        process: the pruning state.
        seconds: spent in HESSO, all steps together.
    """

    process: PruningProcess
    seconds: float


_Steps = TypeVar("_Steps", bound=Steps)


class Compacts(ABC):
    """That the model in memory becomes the smaller one."""

    @abstractmethod
    def why_not_compact(self, base: Optimizer | None, model: nn.Module | None = None) -> str:
        """Return why the model in memory can't become the smaller one, "" where it can.

        Args:
            base: the optimizer that HESSO is around, where there is one already.
            model: in all that it is wrapped in, once it is prepared.
        """

    @abstractmethod
    def compact(self, run: Run, model: nn.Module) -> Compaction:
        """Have the model in memory become the smaller one, where nothing is against it.

        Raises:
            HessoError: where it can't; all is as it was then.
        """

    def shrink(
        self,
        model: PreTrainedModel,
        process: PruningProcess,
        base: Optimizer | None,
        compaction: Compaction,
        kept: KeptUnits,
    ) -> None:
        """Make a model as small as that of a checkpoint, before it is prepared and its weights are loaded.

        Args:
            base: the optimizer that HESSO is around, where there is one already.
            kept: the checkpoint's decision.
        """
        compact_as(model, process, base, compaction, kept)


class Engine(Compacts, Generic[_Steps]):
    """How a model is trained, and how its state and the smaller model are saved from there.

    Each method that takes `plain` stands around one of `Trainer`'s own, which `plain` calls.

    Args:
        args: the trainer's.
        accelerator: the trainer's.
        config: what to prune and when.

    Attributes:
        steps: HESSO around the optimizer's steps, once there is one.
    """

    measures_shards = False  # whether the split is measured on what `prepare` has shared out, not before
    measures_quality = True  # whether the model computes a loss outside training's steps
    keeps_whole = True  # whether every process has the whole model while it trains

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, config: HessoConfig) -> None:
        self.args, self.accelerator, self.config = args, accelerator, config
        self.steps: _Steps | None = None

    @property
    def made_steps(self) -> _Steps:
        """The steps, where there must be some.

        Raises:
            HessoError: before `around` or `prepare` has made them.
        """
        if self.steps is None:
            raise HessoError(
                "there is no pruning state before there is an optimizer: call `train()`, or, in a loop of your own, "
                "`create_optimizer_and_scheduler(num_training_steps)` first"
            )
        return self.steps

    @abstractmethod
    def refuse(self, adapters: bool) -> None:
        """Refuse what doesn't work under this engine.

        Args:
            adapters: whether LoRA adapters are trained.

        Raises:
            HessoError: naming the setting and the remedy.
        """

    # -- training -------------------------------------------------------------------------------------------------

    def around(self, base: Optimizer, run: Run) -> Optimizer:
        """Return what takes the place of the trainer's optimizer, itself where the engine steps by its own means."""
        return base

    def prepare(self, run: Run, plain: Callable[[], Any]) -> Any:
        """Have model and optimizer prepared, with pruning on what comes out."""
        return plain()

    @contextmanager
    def computing(self, model: PreTrainedModel) -> Iterator[str]:
        """Have the model compute before `prepare` divides it; yields on all processes why it can't, "" where it can."""
        yield ""

    def note_loss(self, loss: torch.Tensor, run: Run) -> None:
        """Count a micro-batch's loss after its backward pass, where the engine's own step doesn't see it."""
        return None

    def clip(self, model: nn.Module, max_norm: float, plain: Callable[[], Any]) -> Any:
        """Return the gradient's norm, having shown HESSO the gradient before it is clipped."""
        return plain()

    # -- saving and loading ---------------------------------------------------------------------------------------

    @abstractmethod
    def save(self, run: Run, folder: Path) -> None:
        """Write what belongs to a checkpoint and the trainer's own doesn't hold; all processes call it."""

    @abstractmethod
    def load(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Load optimizer and pruning state from a checkpoint."""

    def load_best(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Load the weights of the best checkpoint."""
        plain()
        load_converted_(run.model, folder)

    def save_dense(self, run: Run, target: Path, plain: Callable[[], None]) -> None:
        """Write the model as it is."""
        plain()

    @abstractmethod
    def export(self, run: Run, target: Path) -> PruningReport | None:
        """Write the smaller model and return its report; all processes call it, and all raise what one does.

        Raises:
            HessoError: where it can't be written; `target` is untouched then.
            VerificationError: where the smaller model's logits differ.
        """

    # -- teachers -------------------------------------------------------------------------------------------------

    @property
    def has_weights(self) -> bool:
        """Whether this process has the model's weights before `prepare`."""
        return True

    def place_frozen(self, model: PreTrainedModel, student: type) -> tuple[PreTrainedModel, bool]:
        """Put a model that isn't trained on the device, or divide it over the devices as the trained one is.

        Args:
            student: class of the model that is trained.

        Returns:
            The model, and whether it is divided.
        """
        return model.to(self.accelerator.device), False  # type: ignore[arg-type]


def refuse_where_divided(adapters: bool) -> None:
    """Refuse what needs a whole model on every process."""
    if adapters:
        raise HessoError("LoRA together with FSDP or DeepSpeed isn't supported; use DDP, or merge the adapter first")


def write_divided(
    engine: Engine[Any], run: Run, target: Path, source: Callable[[Decision], ParameterSource]
) -> PruningReport:
    """Write the smaller model from the parts that the engine's processes hold, which `source` knows."""
    dtype = engine.config.export_dtype
    output = Output(target, DTYPES[dtype] if dtype else run.model.dtype, run.tokenizer)
    process = engine.made_steps.process
    decision = Decision(run.plan.groups, process.kept_units())
    if process.state.compaction is not None:  # nothing is left to cut
        decision = Decision(PruningGroups({}), NOTHING_CUT, compaction=process.state.compaction)
    return write_pruned(on_all(lambda: source(decision)), output, run.record())


class PlainEngine(Engine[HessoOptimizer]):
    """One process, or DDP: every process has the whole model."""

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, config: HessoConfig) -> None:
        super().__init__(args, accelerator, config)
        self._step_loss: torch.Tensor | None = None

    def refuse(self, adapters: bool) -> None:
        """Refuse a loss scale on gradients that adapters don't see."""
        if adapters and self.args.fp16:
            raise HessoError("`fp16` (True) with LoRA: frozen weights' gradients would keep the loss scale; use bf16")

    def around(self, base: Optimizer, run: Run) -> Optimizer:
        """Put HESSO around an optimizer, once; Accelerate may have put something around both since."""
        if isinstance(getattr(base, "optimizer", base), HessoOptimizer):
            return base
        check_wrappable(base)  # before the run measures anything
        run.compacting.check(base)
        self.steps, self._step_loss = HessoOptimizer(base, run.new_process()), None
        run.compacting.to_resume(self.steps.process, base)
        return self.steps

    def why_not_compact(self, base: Optimizer | None, model: nn.Module | None = None) -> str:
        """Return what stands against it in the optimizer, or in what trains the model."""
        if self.accelerator.state.dynamo_plugin.use_regional_compilation:
            return "regional compilation trains a copy of it"
        against = why_not_compact(base, self.config.layer_widths)
        return against or ("" if model is None else why_not_refit_parallel(model))

    def compact(self, run: Run, model: nn.Module) -> Compaction:
        """Cut it on every process."""
        return compact(parallel_of(model) or run.whole, self.made_steps)

    def note_loss(self, loss: torch.Tensor, run: Run) -> None:
        """Add up the losses of a step."""
        noted = run.noted_loss(loss)
        self._step_loss = noted if self._step_loss is None else self._step_loss + noted

    def clip(self, model: nn.Module, max_norm: float, plain: Callable[[], Any]) -> Any:
        """Show HESSO the gradient between unscaling and clipping, and tell it norm and loss."""
        if self.accelerator.mixed_precision == "fp16":  # the scaler allows unscaling once, so clipping is done here too
            self.accelerator.unscale_gradients()
            self.made_steps.observe_gradients()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            self.made_steps.observe_gradients()
            norm = plain()
        self.made_steps.report_gradient_norm(norm)
        if self._step_loss is not None:
            self.made_steps.report_loss(self._step_loss)
            self._step_loss = None
        return norm

    def save(self, run: Run, folder: Path) -> None:
        """Write the random states that a snapshot returns to and, without an optimizer, the pruning state."""
        if world_size() > 1:
            save_random_states(self.made_steps, folder)
        if self.args.save_only_model and self.args.should_save:
            save_pruning_alone(self.made_steps, folder)

    def load(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Load the optimizer, whose state holds pruning's; where it wasn't saved, that alone."""
        plain()
        load_pruning_alone(self.made_steps, folder)
        if world_size() > 1:  # all that the others share is process 0's
            load_random_states(self.made_steps, folder)

    def export(self, run: Run, target: Path) -> PruningReport | None:
        """Write it from one process of each folder; the others have no report."""

        def exported() -> PruningReport | None:
            if not self.args.should_save:
                return None
            return export_pruned(
                run.whole, target, kept_units=self.made_steps.process.kept_units(), groups=run.plan.groups,
                tokenizer=run.tokenizer, dtype=self.config.export_dtype, training=run.record(),
                overwrite_base=True,  # it was looked at where the base was read
            )  # fmt: skip

        return on_all(exported)
