"""A trainer's arguments: which engine they choose, and what of them is refused, under any engine or under one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.collectives import world_size
from ..engines.deepspeed.engine import DeepSpeedEngine
from ..engines.engine import Engine, PlainEngine
from ..engines.fsdp.engine import Fsdp2Engine
from ..errors import HessoError
from ..pruning.plan import check_unquantised

logger = logging.get_logger(__name__)


def engine_of(trainer: Trainer, config: HessoConfig) -> Engine:
    """Return the engine that Accelerate's settings name: no other place asks."""
    chosen: type[Engine] = PlainEngine
    if trainer.is_deepspeed_enabled:
        chosen = DeepSpeedEngine
    elif trainer.is_fsdp_enabled:
        chosen = Fsdp2Engine
    return chosen(trainer.args, trainer.accelerator, config)


def checked_config(
    make: Callable[..., Any], config: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> HessoConfig:
    """Return the HessoConfig where a trainer's arguments are such as they have to be when it is made.

    Args:
        make: the trainer's `__init__`, whose first arguments are the model and its own arguments.

    Raises:
        HessoError: naming the argument, its type and what to give.
    """
    if not isinstance(config, HessoConfig):
        raise HessoError(
            f"`hesso_config` ({'None' if config is None else type(config).__name__}) must be a HessoConfig: "
            "`hesso_config=HessoConfig(pruning_ratio=...)`"
        )
    given = dict(zip(("model", "args"), args, strict=False)) | dict(kwargs)
    if isinstance(given.get("args"), dict):
        raise HessoError("`args` (dict) must be a TrainingArguments: `TrainingArguments(**args)`")
    if getattr(given.get("args"), "use_liger_kernel", False):  # which `Trainer` puts into the model at once
        raise HessoError(
            "`use_liger_kernel` (True) puts kernels for GPUs into the model's classes, with which nothing can be "
            "verified on a tiny model on the CPU; leave it out, and use `torch_compile` for fused kernels"
        )
    loads_by_name = "peft_config" in inspect.signature(make).parameters  # as TRL's trainers do
    if isinstance(model := given.get("model"), str) and not loads_by_name:
        raise HessoError(
            f"`model` ({model!r}) is a name, not a model: load it, "
            f"`AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32)`"
        )
    if isinstance(model, nn.Module):
        check_unquantised(model)  # `Trainer` would ask for an adapter, which is no way out here
    return config


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
    if trainer.is_model_parallel:
        raise HessoError(
            "`model` lies on several devices, or another than the trainer's (`device_map`), which pruning doesn't "
            "support: load it without (TRL: `model_init_kwargs={'device_map': None}`), and where it doesn't fit one "
            "device choose FSDP2 in Accelerate's config"
        )
    engine.refuse(adapters)
    args, tokenizer, data = trainer.args, trainer.processing_class, trainer.train_dataset
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise HessoError(
            f"`processing_class` ({type(tokenizer).__name__}) can't be saved with the model: give the tokenizer "
            "itself, `AutoTokenizer.from_pretrained(...)`"
        )
    if isinstance(data, Sized) and not len(data):
        raise HessoError("`train_dataset` (0 examples) is empty: there is nothing to train on")
    if args.learning_rate == 0:
        logger.warning("`learning_rate` (0.0): units go and nothing is learnt to make up for them; set one above 0")
    if args.auto_find_batch_size and (world_size() > 1 or type(engine) is not PlainEngine):
        raise HessoError(
            "`auto_find_batch_size` (True) works on one process without FSDP and DeepSpeed: one of several that runs "
            "out of memory can't have the others begin again; set a batch size that fits"
        )
    if args.push_to_hub and args.hub_strategy in ("checkpoint", "all_checkpoints"):
        logger.warning(f"`hub_strategy` ({args.hub_strategy}): only the smaller model is pushed, no checkpoints")
