"""Compaction under FSDP2: the shards of a model that trains, and of its optimizer's state, become a smaller model's.

Modules, and what FSDP2 and a training loop hold of them, stay; parameters are exchanged for smaller DTensors. Nothing
is gathered but one tensor at a time, and a layer at a time where both models compute.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW
from transformers import PreTrainedModel

from ...compat import drop_states, in_shards_dtype, put_shards
from ...distributed.collectives import all_or_none, is_main_process, rank, world_size
from ...distributed.parts import like_parameter, local, named_parameters
from ...export.decision import Compaction, Decision
from ...pruning.compaction import InMemory, check_compactable, cut_in_memory, why_not_compact
from ...pruning.optimizer import HessoOptimizer
from ...pruning.process import PruningProcess
from ...structures.cut import Cuts
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.in_place import InPlace
from .export import ShardedSource, Writers, cut_shards, device_of

OPTIMIZERS = (Adam, AdamW, SGD)  # whose state of a DTensor is made of DTensors like it


def compact(model: PreTrainedModel, optimizer: HessoOptimizer) -> Compaction:
    """Cut the pruned units out of a model under FSDP2 that goes on training, and out of its optimizer's state.

    For training loops of one's own: call it between two steps, once `optimizer.process.finished`, on every process. The
    model and its modules stay the objects that they are. Its parameters don't: take them from the model anew, or from
    `optimizer.param_groups`. Gradients are forgotten.

    Args:
        model: the transformers model, after `fully_shard`.

    Raises:
        HessoError: where pruning hasn't finished, or the model can't be cut in memory, with the reason.
        VerificationError: where the smaller model's logits differ. Nothing has changed then, on any process, as after
            an error of another one (HessoError) and where there is no room.
    """
    layer_widths = optimizer.process.config.layer_widths
    check_compactable(optimizer, why_not_compact(optimizer.base, layer_widths, OPTIMIZERS) or why_not_exchange(model))
    found = cut_in_memory(ShardsInMemory(model), optimizer)
    gc.collect()  # FSDP2's modules refer to each other in circles, those of the smaller model that was put in place too
    return found


def why_not_exchange(model: nn.Module) -> str:
    """Return why FSDP2's parameters can't be exchanged for smaller ones, "" where they can."""
    whole = [name for name, parameter in named_parameters(model).items() if not isinstance(parameter, DTensor)]
    return f"{whole[0]} isn't divided as the others are (`ignored_modules`)" if whole else ""


class ShardsInMemory(InMemory):
    """A model under FSDP2 that trains, to become the smaller one where its shards are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.place = model, _ShardsInPlace(model)

    def decision(self, process: PruningProcess) -> Decision:
        """Return what stays: process and model agree where each holds a part."""
        return Decision(process.groups, process.kept_units())

    def source(self, decision: Decision) -> ShardedSource:
        """Return what makes the smaller model, sharded as the larger one is."""
        return ShardedSource(self.model, decision, Writers(rank(), world_size(), is_main_process()))

    def in_fp32(self) -> AbstractContextManager[None]:
        """Have FSDP2 gather fp32 shards as they are."""
        return in_shards_dtype(self.model)

    def cut_state(self, name: str, values: torch.Tensor, cuts: Cuts, mean: int | None, like: nn.Parameter) -> Any:
        """Return what is left of a DTensor of the optimizer's state, sharded as the smaller parameter is."""
        left = all_or_none(lambda: torch.empty_like(local(like.detach()), dtype=values.dtype), device_of(self.model))
        target = like_parameter(left, like)
        cut_shards(name, values, [(replace(axis, power=0), units, total) for axis, units, total in cuts], target)
        return target


class _ShardsInPlace(InPlace):
    """What FSDP2 held of a model before a smaller one took its place."""

    @torch.no_grad()
    def put(self, small: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
        super().put(small, groups, kept)
        drop_states(self._model, self._undo)

    @torch.no_grad()
    def settle(self) -> None:
        dtypes = {parameter: self._dtypes[name] for name, parameter in named_parameters(self._model).items()}
        put_shards(self._model, lambda parameter: _shard_like(parameter, parameter, dtypes[parameter]), self._undo)

    def _put_parameters(self, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        def shard(parameter: nn.Parameter) -> DTensor | None:
            found = values.get(parameter)  # none of a layer that goes
            return None if found is None else _shard_like(found, parameter, found.dtype)

        put_shards(self._model, shard, self._undo)


def _shard_like(values: torch.Tensor, parameter: nn.Parameter, dtype: torch.dtype) -> Any:
    """Return the shard of a tensor, on the device of a parameter's."""
    return like_parameter(local(values.detach()).to(parameter.device, dtype), values)
