"""What an upgrade may break: the private names of torch, Transformers and DeepSpeed that the library uses, in one file.

A name that is used in one way is a function here. What is overridden or read where it belongs (a Trainer's methods, the
fields of ZeRO's optimizers) is a table, which says where the name comes from. tests/test_compat.py checks every one
against the installed packages, and that no other private name is used anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import Store
    from transformers import PretrainedConfig, PreTrainedModel

# -- torch -------------------------------------------------------------------------------------------------------------


def default_store() -> Store:
    """Return the store that all processes share (torch.distributed.distributed_c10d has no public form of it)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def set_buffer(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put another tensor in a buffer's place; `register_buffer` would forget whether it is saved (nn.Module)."""
    module._buffers[name] = value


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in another's place, also one of another shape or shared with others (nn.Module)."""
    module._parameters[name] = parameter


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the hooks before and after a module's forward, by the key that removes them (nn.Module).

    The handles that torch gives don't survive a copy of the model.
    """
    return module._forward_pre_hooks, module._forward_hooks  # type: ignore[return-value]


# -- transformers ------------------------------------------------------------------------------------------------------


def attention_of(config: PretrainedConfig) -> str | None:
    """Return the attention that a config chose, as `attn_implementation` takes it (PretrainedConfig; not saved)."""
    return config._attn_implementation


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Choose the attention of a model that has been built already (PretrainedConfig)."""
    config._attn_implementation = name


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether a class computes attention by torch's own (PreTrainedModel)."""
    return bool(model._supports_sdpa)


def build_model(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model of a class from its config in a dtype; AutoModel's `from_config` would choose the class itself."""
    return model_class._from_config(config, dtype=dtype)


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------


def engine_options(engine: Any) -> Any:
    """Return the options of DeepSpeed's engine, `load_universal_checkpoint` among them (DeepSpeedEngine)."""
    return engine._config


# -- what is overridden or read where it belongs -----------------------------------------------------------------------

# Parameters of these methods that the oldest Transformers hasn't.
NEWER = ("private",)

# Methods of transformers.Trainer that the mixin overrides, with the parameters that it counts on.
TRAINER_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "_clip_grad_norm": ("model",),
    "_determine_best_metric": ("metrics", "trial"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_wrap_model": ("model", "training", "dataloader"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": (
        "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset",
        "dataset_args",
    ),
    "create_accelerator_and_postprocess": (),
    "create_optimizer": ("model",),
    "log": ("logs", "start_time"),
    "push_to_hub": ("commit_message", "blocking", "token", "revision", "kwargs"),
    "save_model": ("output_dir", "_internal_call"),
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}  # fmt: skip

# Methods of transformers.Trainer without a documented form that the mixin calls.
TRAINER_CALLS: Mapping[str, tuple[str, ...]] = {
    "_finish_current_push": (),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
    "_prepare_inputs": ("inputs",),
    "compute_loss_context_manager": (),
    "get_tp_size": (),
    "init_hf_repo": ("token",),
    "set_initial_training_values": ("args", "dataloader"),
}

# Attributes of a transformers.Trainer that its documentation doesn't promise.
TRAINER_ATTRIBUTES = (
    "compute_loss_func",
    "current_gradient_accumulation_steps",
    "hub_model_id",
    "is_distributed_loading_by_transformers",
    "loss_is_scaled_for_ga",
    "model_accepts_loss_kwargs",
)

# Fields of DeepSpeed's ZeRO optimizers (deepspeed.runtime.zero), by the file that sets them.
ZERO_FIELDS: Mapping[str, tuple[str, ...]] = {
    "stage_1_and_2": (
        "bit16_groups", "check_grad_overflow", "cpu_offload", "param_names", "single_partition_of_fp32_groups",
        "update_lp_params",
    ),
    "stage3": (
        "dp_process_group", "fp16_groups", "fp32_partitioned_groups_flat", "get_param_id", "grad_position",
        "param_names", "parameter_offload", "persistent_parameters",
    ),
}  # fmt: skip

# Private names that are used where they belong, and whose they are.
PRIVATE_NAMES: Mapping[str, str] = {
    "_attn_implementation": "transformers.configuration_utils",
    "_buffers": "torch.nn.modules.module",
    "_enable_checkpoint": "transformers.trainer_jit_checkpoint.CheckpointManager",
    "_hf_deepspeed_config_weak_ref": "transformers.integrations.deepspeed",
    "_hp_mapping": "deepspeed.utils.tensor_fragment",
    "_loss_shifts_labels": "transformers.trainer",
    "_index_in_param_group": "deepspeed.utils.mixed_precision_linkage",
    "_model_mapping": "transformers.models.auto.auto_factory",
    "_no_split_modules": "transformers.modeling_utils",
    "_save_checkpoint": "transformers.trainer",
}
