"""ZeRO: DeepSpeed keeps fp32 masters as flat vectors, of which each process holds a range of every parameter or none.

What is pruned are those masters. The weights that the model computes with follow: at once in the range of this process,
on the others when DeepSpeed gathers them at the end of its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ...distributed.collectives import is_main_process
from ...distributed.parts import full_shape, local
from ...errors import CheckpointMismatchError, HessoError
from ...pruning.weights.holdings import Held, Holdings
from ...pruning.weights.snapshot import Snapshot
from .ranges import Frozen3, Master, Master3, Master12, Nothing, Place, masters_of


class ZeroHoldings(Holdings):
    """How ZeRO's processes share a model's parameters.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        parameters: the model's.

    Attributes:
        stepping: whether DeepSpeed is in its step, at whose end it gathers what changed.
    """

    def __init__(self, zero: Any, parameters: Iterable[nn.Parameter]) -> None:
        self.zero, self.sharded, self.stepping = zero, True, False
        self._frozen: list[torch.Tensor] = []
        self._frozen_places: dict[str, tuple[int, int]] = {}
        self._held: list[Held] = []

    def held(self, name: str, parameter: nn.Parameter) -> Held:
        """Return what this process holds of a parameter."""
        found = self._find(name, parameter)
        self._held.append(found)
        return found

    def _find(self, name: str, parameter: Any) -> Held:
        if hasattr(parameter, "ds_tensor"):
            if not parameter.requires_grad:
                start, count = self._divided(parameter)
                self._frozen.append(parameter.ds_tensor)
                self._frozen_places[name] = (start, count)
                return Frozen3(parameter, start, count)
            return self._trained(parameter) or Nothing(full_shape(parameter))
        if not parameter.requires_grad:
            self._frozen.append(parameter)
            self._frozen_places[name] = (0, parameter.numel())
            return Held(name, parameter, is_main_process())
        mapping, found = parameter._hp_mapping, self._trained(parameter)
        if found is None:
            return Nothing(full_shape(parameter))
        if not torch.equal(mapping.lp_fragment, mapping.hp_fragment.detach().to(mapping.lp_fragment)):
            raise HessoError(
                f"{name}: DeepSpeed's map of where its fp32 weights lie is wrong; leave unusual settings out of "
                "`zero_optimization`, or update deepspeed"
            )
        return found

    def _trained(self, parameter: Any) -> Master | None:
        """Return this process' range of a trained parameter, None where it has none."""
        if hasattr(parameter, "ds_tensor"):
            start, count = self._divided(parameter)
            vector, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            return Master3(self.zero, parameter, start, count, vector, offset) if count else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
        return Master12(self.zero, parameter, place.start, place.numel, mapping.param_group_index, offset)

    def _divided(self, parameter: Any) -> tuple[int, int]:
        """Return where this process' range of a parameter under ZeRO-3 begins, and its length."""
        length = parameter.ds_tensor.numel()
        start = length * dist.get_rank(group=self.zero.dp_process_group)
        return start, max(0, min(length, parameter.ds_numel - start))

    def snapshot(self, optimizer: Optimizer, scaled: Iterable[torch.Tensor], on_cpu: bool) -> Snapshot:
        """Copy the flat vectors with their optimizer state, and frozen weights."""
        return ZeroSnapshot(self, self.vectors(), optimizer, on_cpu)

    def vectors(self) -> list[torch.Tensor]:
        """Return what a snapshot copies, in its order: the flat vectors, and frozen weights."""
        return [*masters_of(self.zero), *self._frozen]

    def places(self) -> dict[str, Place]:
        """Return where in `vectors` this process' range of a parameter lies, by name, where it holds one."""
        first = len(masters_of(self.zero))
        found = {n: (first + i, 0, *place) for i, (n, place) in enumerate(self._frozen_places.items())}
        divided = hasattr(self.zero, "fp32_partitioned_groups_flat")
        for group in self.zero.fp16_groups if divided else self.zero.bit16_groups:
            for parameter in group:
                held = self._trained(parameter)
                if held is not None:
                    found[self.zero.param_names[parameter]] = held.place
        return found

    def publish(self) -> None:
        """Let all processes compute with the masters as they are: at once, or at the end of DeepSpeed's step."""
        for held in self._held:
            held.weights_changed()
        if self.stepping:
            return
        if not hasattr(self.zero, "fp32_partitioned_groups_flat"):
            self.zero.update_lp_params()
            return
        persistent = self.zero.persistent_parameters  # small ones that ZeRO-3 keeps gathered
        self.zero.parameter_offload.partition_all_parameters()
        if persistent:
            persistent[0].all_gather(persistent)


class ZeroSnapshot(Snapshot):
    """A snapshot of ZeRO's flat vectors; the weights of the model follow when they return."""

    def __init__(
        self, holdings: ZeroHoldings, vectors: list[torch.Tensor], optimizer: Optimizer | None, on_cpu: bool
    ) -> None:
        super().__init__(vectors, optimizer, on_cpu)
        self._holdings = holdings

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the weights back and nothing else."""
        super().restore_weights()
        self._holdings.publish()

    @torch.no_grad()
    def swap_weights(self) -> None:
        """Exchange the weights with the copies."""
        super().swap_weights()
        self._holdings.publish()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies that were saved.

        Raises:
            CheckpointMismatchError: where the flat vectors had other lengths.
        """
        saved, present = ([tuple(value.shape) for value in values] for values in (state["weights"], self._weights))
        if saved != present:
            raise CheckpointMismatchError(
                f"the saved CRIC snapshot holds vectors of lengths {saved}, this run has {present}; resume with the "
                "same number of processes, ZeRO stage and parameter groups"
            )
        super().load_state_dict(state)


@contextlib.contextmanager
def gathered(parameter: Any) -> Iterator[None]:
    """Put a parameter that ZeRO-3 has divided together; all processes do it, in the same order."""
    if not hasattr(parameter, "ds_tensor"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def divide_frozen(model: PreTrainedModel, config: Mapping[str, Any], batch_size: int) -> PreTrainedModel:
    """Divide a model that isn't trained over the processes, as ZeRO-3 divides the one that is.

    Args:
        model: on any device; what was divided while it was loaded stays so.
        config: DeepSpeed's, of the trained model.
        batch_size: examples in one process' micro-batch, which DeepSpeed asks for.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    kept = ("stage", "stage3_param_persistence_threshold", "offload_param")
    zero = {name: value for name, value in config["zero_optimization"].items() if name in kept}
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": batch_size,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    return engine.module


def whole_fp32(parameter: Any) -> torch.Tensor:
    """Return a whole parameter in fp32; all processes call it, in the same order."""
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach()
    if not hasattr(parameter, "ds_tensor"):
        return local(parameter.detach()).float()
    with gathered(parameter):
        return parameter.detach().float().clone()
