"""What an upgrade may break: the private names of torch, Transformers and DeepSpeed that the library uses.

A name that is used in one way is a function here. What is overridden or read where it belongs (a Trainer's methods, the
fields of ZeRO's optimizers) stands in the tables of tests/test_compat.py, which checks every one against the installed
packages, and that no other private name is used anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import Store
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PretrainedConfig, PreTrainedModel

# -- torch -------------------------------------------------------------------------------------------------------------


def default_store() -> Store:
    """Return the store that all processes share (torch.distributed.distributed_c10d has no public form of it)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def dispatch_mode() -> type:
    """Return the class whose children see every operation (torch.utils has no public form of it)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


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


def multiply_all_(tensors: list[torch.Tensor], factors: list[torch.Tensor], shift: float = 0.0) -> None:
    """Make each tensor (t + shift) * f - shift without rounding where f is 1; f broadcasts (torch._foreach_mul_).

    It is one call for all, and where tensor and factor have equal shapes one launch.
    """
    import torch

    torch._foreach_mul_(tensors, factors)
    if shift:
        torch._foreach_add_(tensors, torch._foreach_sub(factors, 1.0), alpha=shift)


def why_not_refit(ddp: DistributedDataParallel) -> str:
    """Return which of DDP's settings `refit` would lose, "" where none is (DistributedDataParallel)."""
    from torch.distributed import group

    if ddp._comm_hooks:
        return "DDP has a communication hook"
    if ddp.mixed_precision is not None:
        return "DDP has a precision of its own"
    if ddp.process_group is not group.WORLD:
        return "DDP is over a process group of its own"
    return ""


def refit(ddp: DistributedDataParallel) -> None:
    """Have gradients averaged in buckets that fit parameters of other shapes, or fewer of them.

    DDP makes them anew where it is unpickled (DistributedDataParallel).
    """
    named = ddp.module.named_parameters()
    ddp._module_parameters = [parameter for name, parameter in named if name not in ddp.parameters_to_ignore]
    ddp.__setstate__(ddp.__getstate__())


def fsdp_states(model: nn.Module) -> list[Any]:
    """Return what FSDP2 keeps of a model's modules, of some together once (FSDPModule)."""
    from torch.distributed.fsdp import FSDPModule

    found = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return list(dict.fromkeys(found))


def put_shards(
    model: nn.Module, shard_of: Callable[[nn.Parameter], DTensor | None], undo: list[Callable[[], Any]]
) -> None:
    """Have FSDP2 gather and train other shards in the place of a model's, which no forward pass has left gathered.

    What it keeps of each is made anew, as for a model on the meta device (FSDPState, FSDPParamGroup, FSDPParam).

    Args:
        shard_of: returns what takes a parameter's place, split over the same processes; None for one of a module that
            goes.
        undo: takes what undoes it, in this order, also where it fails half-way.
    """
    for state in fsdp_states(model):
        for group in state._fsdp_param_groups:
            before, made = group.fsdp_params, list[Any]()
            undo.append(functools.partial(_put_back, group, before, made))
            for old in before:
                shard = shard_of(old.sharded_param)
                made.append(old if shard is None else _resharded(old, shard, group.offload_policy))
            group.fsdp_params = made
            group._init_mp_dtypes()


def _resharded(old: Any, shard: DTensor, offload_policy: Any) -> Any:
    import torch

    trained = old.sharded_param.requires_grad
    like = torch.nn.Parameter(torch.empty(shard.shape, dtype=shard.dtype, device="meta"), requires_grad=trained)
    known = old._module_info, old.mesh_info, old.post_forward_mesh_info, old.device
    new = type(old)(like, *known, None, old.mp_policy, offload_policy)
    old._post_load_hook_handle.remove()
    try:
        new._setattr_on_modules(torch.nn.Parameter(shard, requires_grad=trained))
        new.reset_sharded_param()  # pads it
    except Exception:
        _put_back(None, [old], [new])
        raise
    return new


def _put_back(group: Any, before: list[Any], made: list[Any]) -> None:
    for new in made:
        new._post_load_hook_handle.remove()
    for old in before:
        old._post_load_hook_handle.remove()
        register = old._module_info.module.register_load_state_dict_post_hook
        old._post_load_hook_handle = register(lambda *_, param=old: param.reset_sharded_param())
        old._setattr_on_modules(old.sharded_param)
    if group is not None:
        group.fsdp_params = before
        group._init_mp_dtypes()


def drop_states(model: nn.Module, undo: list[Callable[[], Any]]) -> None:
    """Have FSDP2 forget modules that are no longer in a model (FSDPStateContext).

    Args:
        undo: takes what undoes it.
    """
    known, left = fsdp_states(model)[0]._state_ctx, fsdp_states(model)
    before = known.all_states
    undo.append(lambda: setattr(known, "all_states", before))
    known.all_states = [state for state in before if state in left]
    for state in before:  # no backward pass is to come that goes by the order of the forward passes so far
        for group in state._fsdp_param_groups:
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


@contextmanager
def in_shards_dtype(model: nn.Module) -> Iterator[None]:
    """Have FSDP2 gather and compute in the dtype of the shards that `put_shards` puts in meanwhile (FSDPState)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    states = fsdp_states(model)
    groups = [group for state in states for group in state._fsdp_param_groups]
    before = [state._mp_policy for state in states], [group.mp_policy for group in groups]
    try:
        for state in states:
            state._mp_policy = MixedPrecisionPolicy()
        for group in groups:
            group.mp_policy = MixedPrecisionPolicy()
        yield
    finally:
        for state, policy in zip(states, before[0], strict=True):
            state._mp_policy = policy
        for group, policy in zip(groups, before[1], strict=True):
            group.mp_policy = policy


# -- transformers ------------------------------------------------------------------------------------------------------


def attention_of(config: PretrainedConfig) -> str | None:
    """Return the attention that a config chose, as `attn_implementation` takes it (PretrainedConfig; not saved)."""
    return config._attn_implementation


def experts_of(config: PretrainedConfig) -> str | None:
    """Return the way to compute experts that a config chose (PretrainedConfig; not saved)."""
    return config._experts_implementation


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Choose the attention of a model that has been built already (PretrainedConfig)."""
    config._attn_implementation = name


def set_experts(config: PretrainedConfig, name: str | None) -> None:
    """Choose the way to compute experts (PretrainedConfig)."""
    config._experts_implementation = name


@contextmanager
def whole_rows(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Have a forward of token ids alone take each row as one sequence (transformers.masking_utils).

    It looks for packed ones in position ids that it has made itself, and the host waits for the device to know.
    """
    from transformers import masking_utils

    plain = masking_utils.find_packed_sequence_indices
    if inputs.keys() <= {"input_ids", "use_cache"}:
        masking_utils.find_packed_sequence_indices = _one_sequence
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain


def _one_sequence(position_ids: torch.Tensor) -> None:
    return None


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
