"""Engines: what changes for a trainer whose parameters FSDP2 or DeepSpeed shards, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from ..budget.solver import TargetSizes
from ..config import HessoConfig
from ..distributed.collectives import barrier, from_main, world_size
from ..distributed.parts import named_parameters
from ..engines.checkpoint import load_random_states, save_random_states
from ..engines.deepspeed.export import export_zero
from ..engines.deepspeed.state import check_zero_state, load_zero_state, save_zero_state
from ..engines.deepspeed.steps import ZeroSteps
from ..engines.deepspeed.support import refuse_zero
from ..engines.deepspeed.universal import check_trained, reading_what_is_there, reads_universal
from ..engines.fsdp.export import Writers, export_sharded, write_dense
from ..engines.fsdp.state import load_pruning_state, save_pruning_state
from ..errors import HessoError
from ..export.report import PruningReport
from ..pruning.calibration import LossCurves
from ..pruning.optimizer import HessoOptimizer
from ..pruning.plan import PruningPlan
from ..pruning.process import PruningProcess
from ..structures.cut import device_with_room
from ..structures.groups import KeptUnits
from ..structures.lora import base_of, lora_layers
from .hub import HubMixin

logger = logging.get_logger(__name__)

SET_SHARES = "Give `structures` shares ({'mlp_channels': 3, 'attention_heads': 1}) or set `target_sizes`"


class EngineMixin(HubMixin):
    """What a trainer with a `hesso_plan` does where FSDP2 or DeepSpeed's ZeRO shards what it trains."""

    hesso_plan: PruningPlan
    hesso_config: HessoConfig
    _resume_from: str | None
    _measure_curves: Callable[[], LossCurves]
    _new_process: Callable[[], PruningProcess]
    _noted_loss: Callable[[torch.Tensor], torch.Tensor]
    _training_record: Callable[[], dict[str, Any]]
    _saved_tokenizer: Callable[[], Any]

    def _bare_model(self) -> PreTrainedModel:
        """Return the transformers model, with its adapters in place."""
        return base_of(self._unwrapped_model())

    def _unwrapped_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled

    def _refuse_engines(self) -> None:
        """Refuse what can't work, before any work.

        Raises:
            HessoError: naming the engine or the argument and the remedy.
        """
        if self.is_deepspeed_enabled:
            refuse_zero(self._engine_config, self.hesso_config)
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise HessoError("`fsdp_version` (1) keeps flat parameters whose rows can't be told apart; set it to 2")
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise HessoError(
                "`model` was sharded while it was loaded (`tp_plan` or `distributed_config`), which pruning doesn't "
                "support; load it whole and choose FSDP2 in Accelerate's config"
            )
        if lora_layers(self._bare_model()):
            if self._is_sharded or self.is_deepspeed_enabled:
                raise HessoError(
                    "LoRA together with FSDP or DeepSpeed isn't supported; use DDP, or merge the adapter first"
                )
            if self.args.fp16:
                raise HessoError(
                    "`fp16` (True) with LoRA: frozen weights' gradients would keep the loss scale; use bf16"
                )
        if self.args.auto_find_batch_size:
            raise HessoError("`auto_find_batch_size` (True) starts training over midway; set a batch size that fits")
        if self._is_sharded and self.hesso_config.prune_vocabulary:
            raise HessoError(
                "`prune_vocabulary` (True) isn't supported where parameters are sharded; leave it out, and trim the "
                "saved model on one process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
            )
        if self.args.push_to_hub and self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            logger.warning(
                f"`hub_strategy` ({self.args.hub_strategy}): only the smaller model is pushed, no checkpoints"
            )

    # -- after sharding -------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled:
            if self._resume_from is not None:
                check_zero_state(Path(self._resume_from), self._zero_stage, reads_universal(self._engine_config))
            process = self._new_process()  # while the model may still be whole
            if self._resume_from is not None and reads_universal(self._engine_config):
                check_trained(process.bound.parameters, Path(self._resume_from))
            self.hesso_optimizer = ZeroSteps(process, self._noted_loss)
        if self._is_sharded and self.args.torch_compile:
            # compiled as a whole, the model isn't the root of what FSDP2 shards: its forwards pass the hooks by
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._is_sharded and self._resume_from is None:
            self._settle_sizes()
            self._renew()
        if self.is_deepspeed_enabled:
            self._attach()
        return prepared

    @property
    def _engine_config(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config

    @property
    def _zero_stage(self) -> int:
        return int(self._engine_config["zero_optimization"]["stage"])

    def _attach(self) -> None:
        """Put HESSO around the steps of DeepSpeed's engine, once."""
        assert isinstance(self.hesso_optimizer, ZeroSteps)
        if not self.hesso_optimizer.attached:
            self._renew()
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self.hesso_optimizer.attach(engine, named_parameters(self._bare_model()))

    def _measure_whole(self) -> LossCurves:
        """Measure before DeepSpeed takes the model, on the device that trains it; ZeRO-3 may have sharded it."""
        model = self._bare_model()
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            logger.warning(
                "the model was sharded by ZeRO-3 while it was loaded, so the split between structures can't be "
                f"measured: they share the cut evenly. {SET_SHARES}, or load the model before the TrainingArguments "
                "are made"
            )
            return LossCurves({}, {})
        place, size = model.device, sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        if device_with_room(self.args.device, 2 * size) != self.args.device:
            logger.warning(
                f"the model and its gradients ({2 * size / 1e9:.1f} GB) don't fit {self.args.device}, so the split "
                f"between structures can't be measured: they share the cut evenly. {SET_SHARES}, or use FSDP2, where "
                "it is measured on the shards"
            )
            return LossCurves({}, {})
        try:
            model.to(self.args.device)  # type: ignore[arg-type]
            return self._measure_curves()
        finally:
            model.to(place)  # type: ignore[arg-type]

    def _renew(self) -> None:
        """Begin anew on the parameters that sharding has put in the place of the model's, on the device they are on."""
        assert self.hesso_optimizer is not None
        self.hesso_optimizer.process = self.hesso_plan.process(self._process.schedule)

    def _settle_sizes(self) -> None:
        """Measure the split between structures, and take what the main process found."""
        self.hesso_plan.settle(self._measure_whole if self.is_deepspeed_enabled else self._measure_curves)
        self.hesso_plan.target = TargetSizes.from_dict(from_main(self.hesso_plan.target.to_dict()))
        sizes = self.hesso_plan.target.sizes
        logger.info(f"HESSO prunes {self.hesso_plan.target.parameter_ratio:.1%} of the parameters: {sizes}")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if self._is_sharded:
            self._renew()
        if self.is_deepspeed_enabled:
            self._attach()
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.hesso_optimizer, ZeroSteps):
            universal = reads_universal(self._engine_config)
            return load_zero_state(self.hesso_optimizer, Path(checkpoint), self._zero_stage, universal)
        assert isinstance(self.hesso_optimizer, HessoOptimizer)
        if self._is_sharded:
            return load_pruning_state(self.hesso_optimizer, self._bare_model(), Path(checkpoint))
        if world_size() > 1:  # all that the others share is process 0's
            load_random_states(self.hesso_optimizer, Path(checkpoint))
        return None

    def _load_best_model(self) -> None:
        if not self.is_deepspeed_enabled:
            return super()._load_best_model()
        best, engine = Path(self.state.best_model_checkpoint or ""), self.accelerator.deepspeed_engine_wrapped.engine
        with reading_what_is_there(engine, best):
            super()._load_best_model()

    def _write_shards(self, folder: Path) -> None:
        """Write beside a sharded checkpoint what torch leaves out: the pruning state, config and tokenizer."""
        if self.is_deepspeed_enabled:
            assert isinstance(self.hesso_optimizer, ZeroSteps)
            save_zero_state(self.hesso_optimizer, folder, self._zero_stage, self.args.should_save)
        if not self._is_sharded:
            return
        if self.args.should_save:
            self._bare_model().config.save_pretrained(folder)
            if self._saved_tokenizer() is not None:
                self._saved_tokenizer().save_pretrained(folder)
        assert isinstance(self.hesso_optimizer, HessoOptimizer)
        save_pruning_state(self.hesso_optimizer, self._bare_model(), folder, self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save every process' random state before the file that says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        if world_size() > 1 and not self._is_sharded and isinstance(self.hesso_optimizer, HessoOptimizer):
            save_random_states(self.hesso_optimizer, Path(output_dir))
        barrier()

    # -- the smaller model ----------------------------------------------------------------------------------------

    def _export_sharded(self, kept: KeptUnits, target: Path) -> PruningReport:
        return export_sharded(self._bare_model(), target, writers=self._writers(), **self._export_options(kept))

    def _export_zero(self, kept: KeptUnits, target: Path) -> PruningReport:
        return export_zero(self._bare_model(), target, writes=self.args.should_save, **self._export_options(kept))

    def _export_options(self, kept: KeptUnits) -> dict[str, Any]:
        return {
            "kept_units": kept,
            "groups": self.hesso_plan.groups,
            "tokenizer": self._saved_tokenizer(),
            "dtype": self.hesso_config.export_dtype,
            "training": self._training_record(),
        }

    def _save_dense_sharded(self, target: Path) -> None:
        write_dense(self._bare_model(), target, self.hesso_plan.groups, self._saved_tokenizer(), self._writers())

    def _writers(self) -> Writers:
        """Return who writes files: all processes into one folder, or those of each node into one of the node's own."""
        if self.args.save_on_each_node:
            return Writers(self.args.local_process_index, self._processes_a_node(), self.args.should_save)
        return Writers(self.args.process_index, world_size(), self.args.should_save)

    def _processes_a_node(self) -> int:
        """Return how many processes this node has; another one may have more or fewer."""
        shared: list[Any] = [None] * world_size()
        dist.all_gather_object(shared, self.args.local_process_index)
        first = self.args.process_index - self.args.local_process_index
        return sum(rank - position == first for rank, position in enumerate(shared))
