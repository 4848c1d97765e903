"""ZeRO: DeepSpeed keeps fp32 masters as flat vectors, of which each process holds a range of every parameter or none.

What is pruned are those masters. The weights that the model computes with follow: at once in the range of this process,
on the others when DeepSpeed gathers them at the end of its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ...distributed.collectives import is_main_process
from ...errors import CheckpointMismatchError, HessoError
from ...pruning.weights.holdings import Held, Holdings
from ...pruning.weights.snapshot import Snapshot
from .ranges import Frozen3, HeldRange, Master3, Master12, Place, masters_of


class ZeroHoldings(Holdings):
    """How ZeRO's processes share a model's parameters.

    Args:
        zero: DeepSpeed's ZeRO optimizer.

    Attributes:
        stepping: whether DeepSpeed is in its step, at whose end it gathers what changed.
    """

    def __init__(self, zero: Any) -> None:
        self.zero, self.sharded, self.stepping = zero, True, False
        self._divides = hasattr(zero, "fp32_partitioned_groups_flat")  # ZeRO-3 does, the model's parameters too
        self._frozen: dict[str, tuple[torch.Tensor, int, int]] = {}  # what is held, its start and length
        self._held: list[Held] = []

    def held(self, name: str, parameter: nn.Parameter) -> Held:
        """Return what this process holds of a parameter."""
        find = self._trained if parameter.requires_grad else self._untrained
        self._held.append(find(name, parameter))
        return self._held[-1]

    def _trained(self, name: str, parameter: Any) -> Held:
        place = self.place(parameter)
        if place is None:
            return HeldRange(parameter, 0, 0)
        if self._divides:
            return Master3(self.zero, parameter, place)
        mapping = parameter._hp_mapping
        if not torch.equal(mapping.lp_fragment, mapping.hp_fragment.detach().to(mapping.lp_fragment)):
            raise HessoError(
                f"{name}: DeepSpeed's map of where its fp32 weights lie is wrong; leave unusual settings out of "
                "`zero_optimization`, or update deepspeed"
            )
        return Master12(self.zero, parameter, place)

    def _untrained(self, name: str, parameter: Any) -> Held:
        if not self._divides:
            self._frozen[name] = (parameter, 0, parameter.numel())
            return Held(name, parameter, is_main_process())
        start, count = self._divided(parameter)
        self._frozen[name] = (parameter.ds_tensor, start, count)
        return Frozen3(parameter, start, count)

    def place(self, parameter: Any) -> Place | None:
        """Return where this process' range of a trained parameter lies, None where it has none."""
        if self._divides:
            start, count = self._divided(parameter)
            vector, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            return Place(vector, offset, start, count) if count else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        held, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
        return Place(mapping.param_group_index, offset, held.start, held.numel)

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
        return [*masters_of(self.zero), *(held for held, _, _ in self._frozen.values())]

    def places(self) -> dict[str, Place]:
        """Return where in `vectors` this process' range of a parameter lies, by name, where it holds one."""
        first = len(masters_of(self.zero))
        found = {name: Place(n, 0, *place) for n, (name, (_, *place)) in enumerate(self._frozen.items(), first)}
        for group in self.zero.fp16_groups if self._divides else self.zero.bit16_groups:
            for parameter in group:
                place = self.place(parameter)
                if place is not None:
                    found[self.zero.param_names[parameter]] = place
        return found

    def publish(self) -> None:
        """Let all processes compute with the masters as they are: at once, or at the end of DeepSpeed's step."""
        for held in self._held:
            held.weights_changed()
        if self.stepping:
            return
        if not self._divides:
            self.zero.update_lp_params()
            return
        persistent = self.zero.persistent_parameters  # small ones that ZeRO-3 keeps gathered
        self.zero.parameter_offload.partition_all_parameters()
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Make passes through the model within DeepSpeed's step, where ZeRO-3 has all weights divided."""
        try:
            yield
        finally:
            if self._divides:
                self.zero.parameter_offload.release_backward_leftovers()
                self.zero.parameter_offload.partition_all_parameters()


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
