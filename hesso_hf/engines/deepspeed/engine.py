"""What a trainer asks of DeepSpeed's ZeRO, whose own engine does backward passes, clipping and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ...config import HessoConfig
from ...distributed.collectives import from_all
from ...distributed.parts import named_parameters
from ...errors import HessoError
from ...export.decision import NOTHING_CUT, Compaction, Decision
from ...export.report import PruningReport
from ...export.write import Output, write_uncut
from ...pruning.compaction import why_not_compact
from ...pruning.process import PruningProcess
from ...structures.cut import device_with_room
from ...structures.groups import KeptUnits
from ..engine import Engine, refuse_where_divided, write_divided
from ..run import Run
from .compaction import compact, why_not_exchange
from .export import ZeroSource, loading_whole
from .holdings import divide_frozen
from .in_place import shrink_divided
from .state import (
    check_trained,
    check_zero_state,
    load_zero_state,
    reading_what_is_there,
    reads_universal,
    save_zero_state,
)
from .steps import ZeroSteps


class DeepSpeedEngine(Engine[ZeroSteps]):
    """ZeRO 1 to 3: HESSO is around the steps of DeepSpeed's engine, on its fp32 masters."""

    measures_quality = False
    keeps_whole = False

    @property
    def _settings(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    @property
    def _stage(self) -> int:
        return int(self._settings["zero_optimization"]["stage"])

    def refuse(self, adapters: bool) -> None:
        """Refuse what ZeRO doesn't allow, and what needs a whole model."""
        refuse_zero(self._settings, self.config)
        refuse_where_divided(adapters)

    def why_not_compact(self, base: Optimizer | None, model: nn.Module | None = None) -> str:
        """Return what stands against it in the optimizer, or in DeepSpeed's config."""
        against = why_not_compact(None, self.config.layer_widths)
        compiles = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        return against or why_not_exchange(base, self._settings, compiles)

    def compact(self, run: Run, model: nn.Module) -> Compaction:
        """Exchange the flat vectors for those of the smaller model."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        return compact(run.model, engine, self.made_steps, self.accelerator._optimizers)

    def shrink(
        self,
        model: PreTrainedModel,
        process: PruningProcess,
        base: Optimizer | None,
        compaction: Compaction,
        kept: KeptUnits,
    ) -> None:
        """Make it as small where it lies: whole, or divided while it was loaded."""
        if why_divided(model):
            shrink_divided(model, process, compaction, kept)
        else:
            super().shrink(model, process, base, compaction, kept)

    def prepare(self, run: Run, plain: Callable[[], Any]) -> Any:
        """Make the pruning state while the model may still be whole, and put it on the masters when there are some."""
        universal = reads_universal(self._settings)
        if run.resume_from is not None:
            check_zero_state(run.resume_from, self._stage, universal)
        process = run.new_process()
        if run.compacting.is_due:
            run.compacting.to_resume(process, None)
        if run.resume_from is not None and universal:
            check_trained(process.bound.parameters, run.resume_from)
        self.steps = ZeroSteps(process, run.noted_loss)
        prepared = plain()
        self._attach(run)
        return prepared

    def _attach(self, run: Run) -> None:
        """Put HESSO around the steps of DeepSpeed's engine, once."""
        steps = self.made_steps
        if not steps.attached:
            if steps.process.state.compaction is None:
                steps.process = run.process_on(steps.process.schedule)
            steps.attach(self.accelerator.deepspeed_engine_wrapped.engine, named_parameters(run.model))

    @contextmanager
    def computing(self, model: PreTrainedModel) -> Iterator[str]:
        """Have the model compute on the device that trains, before DeepSpeed takes it.

        ZeRO-3 may have sharded it already, or only all processes together hold it: it doesn't compute then.
        """
        found = from_all(
            why_not_computing(model, self.args.device)
        )  # on one process a GPU may be fuller than on the others
        if hindrance := next(filter(None, found), ""):
            yield hindrance
            return
        place = model.device
        try:
            model.to(self.args.device)  # type: ignore[arg-type]
            yield ""
        finally:
            model.to(place)  # type: ignore[arg-type]

    def save(self, run: Run, folder: Path) -> None:
        """Write the pruning state beside DeepSpeed's checkpoint."""
        save_zero_state(self.made_steps, folder, self._stage, self.args.should_save)

    def load(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Take the pruning state; DeepSpeed has loaded its own already."""
        self._attach(run)
        plain()
        load_zero_state(self.made_steps, folder, self._stage, reads_universal(self._settings))

    def load_best(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Load the masters, whatever `from_pretrained` would call them."""
        with reading_what_is_there(self.accelerator.deepspeed_engine_wrapped.engine, folder):
            plain()

    def save_dense(self, run: Run, target: Path, plain: Callable[[], None]) -> None:
        """Write the model from the masters; of ZeRO-3's `plain` may write what `from_pretrained` doesn't load."""
        with loading_whole():
            source = ZeroSource(run.model, Decision(run.plan.groups, NOTHING_CUT), self.args.should_save)
            write_uncut(source, Output(target, run.model.dtype, run.tokenizer))

    def export(self, run: Run, target: Path) -> PruningReport:
        """Write it from the masters of all."""
        with loading_whole():
            return write_divided(
                self, run, target, lambda decision: ZeroSource(run.model, decision, self.args.should_save)
            )

    def place_frozen(self, model: PreTrainedModel, student: type) -> tuple[PreTrainedModel, bool]:
        """Divide a model that isn't trained, under ZeRO-3."""
        if self._stage < 3:
            return super().place_frozen(model, student)
        return divide_frozen(model, self._settings, self.args.per_device_train_batch_size), True


def why_divided(model: PreTrainedModel) -> str:
    """Return why a model can't compute or be cut before DeepSpeed has it, "" where it is whole."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "the model was sharded by ZeRO-3 while it was loaded (load it before TrainingArguments are made)"
    return ""


def why_not_computing(model: PreTrainedModel, device: torch.device) -> str:
    """Return why a model can't compute by itself on this process, "" where it can."""
    if divided := why_divided(model):
        return divided
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    if device_with_room(device, size if model.device == device else 2 * size) != device:
        return f"the model and its gradients ({2 * size / 1e9:.1f} GB) don't fit {device} (use FSDP2)"
    return ""


def refuse_zero(engine_config: Mapping[str, Any], config: HessoConfig) -> None:
    """Refuse a DeepSpeed config that pruning doesn't work with.

    Raises:
        HessoError: naming the setting and the remedy.
    """
    zero = engine_config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise HessoError(
            f"`zero_optimization.stage` ({zero.get('stage', 0)}) of DeepSpeed's config must be 1, 2 or 3; without "
            "ZeRO train under DDP"
        )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise HessoError(f"`zero_optimization.{name}.device` ('nvme') isn't supported: use 'cpu'")
    if zero.get("round_robin_gradients"):  # DeepSpeed 0.19 then maps parameters to the wrong part of its fp32 vectors
        raise HessoError("`round_robin_gradients` (True) of DeepSpeed's config isn't supported: leave it out")
    if zero.get("mics_shard_size", -1) > 0:
        raise HessoError(
            f"`zero_optimization.mics_shard_size` ({zero['mics_shard_size']}) isn't supported: leave it out"
        )
    if zero.get("elastic_checkpoint"):  # DeepSpeed 0.19 fails on what it writes then, on as many processes too
        raise HessoError(
            "`zero_optimization.elastic_checkpoint` (True) isn't supported: leave it out, and resume on another number "
            "of processes by `checkpoint.load_universal`"
        )
    for found, name in ((zero, "zenflow"), (engine_config, "torch_autocast"), (engine_config, "tensor_parallel")):
        if found.get(name):
            raise HessoError(f"`{name}` ({found[name]}) of DeepSpeed's config isn't supported: leave it out")
    if config.cric_way == "probe":
        raise HessoError(
            "`cric_mode` ('probe') isn't supported with DeepSpeed, whose backward passes belong to steps; use 'path', "
            "or leave `cric` out"
        )
    if config.prune_vocabulary:
        raise HessoError(
            "`prune_vocabulary` (True) isn't supported with DeepSpeed; leave it out, and trim the saved model on one "
            "process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
        )
