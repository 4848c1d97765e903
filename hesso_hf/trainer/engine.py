"""Which engine trains, and what is refused under any."""

from __future__ import annotations

from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import world_size
from ..engines.deepspeed.engine import DeepSpeedEngine
from ..engines.engine import Engine, PlainEngine
from ..engines.fsdp.engine import Fsdp2Engine
from ..errors import HessoError

logger = logging.get_logger(__name__)


def engine_of(trainer: Trainer, config: HessoConfig) -> Engine:
    """Return the engine that Accelerate's settings name: no other place asks."""
    chosen: type[Engine] = PlainEngine
    if trainer.is_deepspeed_enabled:
        chosen = DeepSpeedEngine
    elif trainer.is_fsdp_enabled:
        chosen = Fsdp2Engine
    return chosen(trainer.args, trainer.accelerator, config)


def refuse(trainer: Trainer, engine: Engine, adapters: bool) -> None:
    """Refuse what can't work, before any work.

    Args:
        adapters: whether LoRA adapters are trained.

    Raises:
        HessoError: naming the engine or the argument and the remedy.
    """
    if getattr(trainer, "is_distributed_loading_by_transformers", False):  # newer than the oldest Transformers
        raise HessoError(
            "`model` was sharded while it was loaded (`tp_plan` or `distributed_config`), which pruning doesn't "
            "support; load it whole and choose FSDP2 in Accelerate's config"
        )
    engine.refuse(adapters)
    args = trainer.args
    if args.auto_find_batch_size and (world_size() > 1 or type(engine) is not PlainEngine):
        raise HessoError(
            "`auto_find_batch_size` (True) works on one process without FSDP and DeepSpeed: one of several that runs "
            "out of memory can't have the others begin again; set a batch size that fits"
        )
    if args.push_to_hub and args.hub_strategy in ("checkpoint", "all_checkpoints"):
        logger.warning(f"`hub_strategy` ({args.hub_strategy}): only the smaller model is pushed, no checkpoints")
