"""What a trainer asks of DeepSpeed's ZeRO, whose own engine does backward passes, clipping and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from ...config import HessoConfig
from ...distributed.parts import named_parameters
from ...errors import HessoError
from ...export.decision import NOTHING_CUT, Decision
from ...export.report import PruningReport
from ...export.write import Output, write_uncut
from ...pruning.calibration import LossCurves
from ...structures.cut import device_with_room
from ..engine import Engine, Run, refuse_where_divided, write_divided
from .export import ZeroSource, loading_whole
from .holdings import divide_frozen
from .state import (
    check_trained,
    check_zero_state,
    load_zero_state,
    reading_what_is_there,
    reads_universal,
    save_zero_state,
)
from .steps import ZeroSteps

logger = logging.get_logger(__name__)


class DeepSpeedEngine(Engine[ZeroSteps]):
    """ZeRO 1 to 3: HESSO is around the steps of DeepSpeed's engine, on its fp32 masters."""

    measures_quality = False
    turns_stream = False
    keeps_whole = False
    compacts = False

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
        """Say that flat buffers can't be cut."""
        return "DeepSpeed divides it over the processes"

    def prepare(self, run: Run, plain: Callable[[], Any]) -> Any:
        """Make the pruning state while the model may still be whole, and put it on the masters when there are some."""
        universal = reads_universal(self._settings)
        if run.resume_from is not None:
            check_zero_state(run.resume_from, self._stage, universal)
        process = run.new_process()
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
            steps.process = run.plan.process(steps.process.schedule)
            steps.attach(self.accelerator.deepspeed_engine_wrapped.engine, named_parameters(run.model))

    def measure(self, model: PreTrainedModel, curves: Callable[[], LossCurves]) -> LossCurves:
        """Measure before DeepSpeed takes the model, on the device that trains.

        ZeRO-3 may have sharded the model already, or only all processes together hold it: it isn't measured then.
        """
        device, place = self.args.device, model.device
        size = 2 * sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        hindrance = remedy = ""
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            hindrance = "the model was sharded by ZeRO-3 while it was loaded"
            remedy = "load the model before the TrainingArguments are made"
        elif device_with_room(device, size) != device:
            hindrance = f"the model and its gradients ({size / 1e9:.1f} GB) don't fit {device}"
            remedy = "use FSDP2, where it is measured on the shards"
        if hindrance:
            logger.warning(
                f"{hindrance}, so the split between structures can't be measured: they share the cut evenly. Give "
                "`structures` shares ({'mlp_channels': 3, 'attention_heads': 1}) or set `target_sizes`, or " + remedy
            )
            return LossCurves({}, {})
        try:
            model.to(device)  # type: ignore[arg-type]
            return curves()
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
    if config.cric and config.cric_mode == "probe":
        raise HessoError(
            "`cric_mode` ('probe') isn't supported with DeepSpeed, whose backward passes belong to steps; use 'path'"
        )
    if config.stream_basis == "principal":
        raise HessoError(
            "`stream_basis` ('principal') needs the whole model on every process, which DeepSpeed doesn't have; use "
            "'auto' or 'given', or turn the model beforehand (hesso_hf.pruning.turn_stream) and save it"
        )
    if config.prune_vocabulary:
        raise HessoError(
            "`prune_vocabulary` (True) isn't supported with DeepSpeed; leave it out, and trim the saved model on one "
            "process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
        )
