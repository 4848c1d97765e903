"""What a trainer asks of DeepSpeed's ZeRO, whose own engine does backward passes, clipping and steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...distributed.parts import named_parameters
from ...errors import HessoError
from ...export.report import PruningReport
from ...pruning.calibration import LossCurves
from ...structures.cut import device_with_room
from ..engine import NO_ADAPTERS, NOT_TURNED, Engine, Run, export_options
from .export import export_zero
from .holdings import divide_frozen
from .state import check_zero_state, load_zero_state, save_zero_state
from .steps import ZeroSteps
from .support import refuse_zero
from .universal import check_trained, reading_what_is_there, reads_universal

logger = logging.get_logger(__name__)

SET_SHARES = "Give `structures` shares ({'mlp_channels': 3, 'attention_heads': 1}) or set `target_sizes`"


class DeepSpeedEngine(Engine[ZeroSteps]):
    """ZeRO 1 to 3: HESSO is around the steps of DeepSpeed's engine, on its fp32 masters."""

    turns_stream = False

    @property
    def _settings(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    @property
    def _stage(self) -> int:
        return int(self._settings["zero_optimization"]["stage"])

    def refuse(self, adapters: bool) -> None:
        """Refuse what `refuse_zero` does, and adapters."""
        refuse_zero(self._settings, self.config)
        if self.config.stream_basis == "principal":
            raise HessoError(NOT_TURNED)
        if adapters:
            raise HessoError(NO_ADAPTERS)

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
        """Measure before DeepSpeed takes the model, where it is whole and fits the device."""
        return measure_whole(model, self.args.device, curves)

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

    def export(self, run: Run, target: Path) -> PruningReport:
        """Write it from the masters of all."""
        return export_zero(run.model, target, writes=self.args.should_save, **export_options(self, run))

    def place_frozen(self, model: PreTrainedModel, student: type) -> tuple[PreTrainedModel, bool]:
        """Divide a model that isn't trained, under ZeRO-3."""
        if self._stage < 3:
            return super().place_frozen(model, student)
        return divide_frozen(model, self._settings, self.args.per_device_train_batch_size), True


def measure_whole(model: PreTrainedModel, device: torch.device, curves: Callable[[], LossCurves]) -> LossCurves:
    """Measure on the device that trains; ZeRO-3 may have sharded the model, or only all processes together hold it."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        logger.warning(
            "the model was sharded by ZeRO-3 while it was loaded, so the split between structures can't be "
            f"measured: they share the cut evenly. {SET_SHARES}, or load the model before the TrainingArguments "
            "are made"
        )
        return LossCurves({}, {})
    place, size = model.device, sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    if device_with_room(device, 2 * size) != device:
        logger.warning(
            f"the model and its gradients ({2 * size / 1e9:.1f} GB) don't fit {device}, so the split "
            f"between structures can't be measured: they share the cut evenly. {SET_SHARES}, or use FSDP2, where "
            "it is measured on the shards"
        )
        return LossCurves({}, {})
    try:
        model.to(device)  # type: ignore[arg-type]
        return curves()
    finally:
        model.to(place)  # type: ignore[arg-type]
